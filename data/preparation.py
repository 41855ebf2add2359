"""What is done to a source's records before they are split: categories for those without, and cleansing."""

from dataclasses import dataclass, field

from equipoise.data.categorise import Categoriser, CategoryClassifier, categorise
from equipoise.data.cleaning import CountedFindings, Finding, PSafe, clean
from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.records import Records
from equipoise.data.schema import LabelledExchange, PreferencePair


@dataclass(frozen=True)
class Helpers:
    """What cannot be done from the data alone."""

    p_safe: PSafe | None = None
    categoriser: Categoriser | None = None
    """For `categorise: judge`."""


@dataclass
class Preparation(CountedFindings):
    """What was done to the records of one source, for its report."""

    before: list[PreferencePair | LabelledExchange]
    """As they were read."""
    after: list[PreferencePair | LabelledExchange]
    """As they go to the split."""
    classifier: CategoryClassifier | None = None
    findings: list[Finding[PreferencePair] | Finding[LabelledExchange]] = field(default_factory=list)

    @property
    def asked(self) -> bool:
        """Whether the recipe asked for anything to be done."""
        return self.before is not self.after


def prepare(
    records: Records,
    config: DataConfig,
    helpers: Helpers | None = None,
    classifier: CategoryClassifier | None = None,
) -> Preparation:
    """Categorise and clean `records` in place, as the recipe says, with every record counted in them.

    classifier: for `categorise: classifier`. Raises DataError where nothing is left.
    """
    helpers = helpers or Helpers()
    before: list[PreferencePair | LabelledExchange] = [*records.pairs, *records.labelled]
    if config.categorise == "classifier":
        assert classifier is not None
        categorise(records, classifier, config.min_confidence)
    elif config.categorise == "judge":
        if helpers.categoriser is None:
            raise DataError("data.categorise is judge, but there is no judge here; take classifier.")
        categorise(records, helpers.categoriser, config.min_confidence)
    preparation = Preparation(before, before, classifier if config.categorise == "classifier" else None)
    if config.cleaning.enabled:
        pairs = clean(records.pairs, config.cleaning, helpers.p_safe)
        labelled = clean(records.labelled, config.cleaning, helpers.p_safe)
        records.pairs, records.labelled = pairs.kept, labelled.kept
        preparation.findings = [*pairs.findings, *labelled.findings]
        records.left_out.update({f"cleaning, {rule}": n for rule, n in preparation.dropped.items()})
        records.notes.update({f"cleaning, marked {rule}": n for rule, n in preparation.marked.items()})
        if before and not records.pairs and not records.labelled:
            told = ", ".join(f"{rule} {n}" for rule, n in preparation.dropped.items())
            raise DataError(
                f"Cleaning left none of {len(before)} records ({told}). Set the rule to mark or keep: "
                f"data.cleaning.{preparation.dropped.most_common(1)[0][0]}=mark."
            )
    if config.cleaning.enabled or config.categorise != "none":
        preparation.after = [*records.pairs, *records.labelled]
    return preparation
