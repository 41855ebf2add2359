"""What an evaluation found: every sample, and the rates per category that follow from them.

A report holds samples; rates, intervals and means are derived from them each time they are read, so they can't
disagree with the samples. The JSON schema is in `eval/README.md`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.data.schema import Turn
from equipoise.data.taxonomy import OTHER
from equipoise.eval.judges.base import Verdict
from equipoise.eval.statistics import Mean, PairedChange, holm, mean_interval, paired_change, wilson_interval
from equipoise.eval.suites import harmful
from equipoise.eval.suites.base import HARMFUL, HELPFULNESS, LOOKALIKE

SCHEMA_VERSION = 1


class ReportError(EquipoiseError):
    """A report file that cannot be read as one."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate with its 95 % Wilson interval; what nobody could judge is counted beside it."""

    count: int
    n: int
    """Samples with an outcome; those without are in `num_unparsed`."""
    rate: float | None
    """count / n; None when n is 0."""
    low: float
    high: float
    num_unparsed: int
    best_low: float
    """Lower bound if no unparsed sample counted."""
    worst_high: float
    """Upper bound if every unparsed sample counted."""

    @classmethod
    def of(cls, outcomes: Iterable[bool | None], confidence: float = 0.95) -> "Rate":
        """The rate of True among the outcomes that are not None."""
        outcomes = list(outcomes)
        count, num_unparsed = outcomes.count(True), outcomes.count(None)
        n = len(outcomes) - num_unparsed
        low, high = wilson_interval(count, n, confidence)
        best_low, _ = wilson_interval(count, n + num_unparsed, confidence)
        _, worst_high = wilson_interval(count + num_unparsed, n + num_unparsed, confidence)
        return cls(count, n, count / n if n else None, low, high, num_unparsed, best_low, worst_high)


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One prompt of one suite, what the model answered and what became of it."""

    id: str
    suite: str
    category: str
    prompt: tuple[Turn, ...]
    response: str
    """The model's answer; in the helpfulness suite, the reference answer."""
    verdict: Verdict | None = None
    """None where no judge was asked (helpfulness)."""
    p_unsafe: float | None = None
    refused: bool | None = None
    score: float | None = None
    """Helpfulness: mean log-probability per token of the reference answer, nats."""


@dataclass(frozen=True)
class CategoryReport:
    """One model state, evaluated on every suite."""

    state: str
    """`base`, `aligned` or `tsdi`, or whatever the run calls it."""
    model: str
    judge: dict[str, Any]
    """The judge's card as a dict."""
    settings: dict[str, Any]
    """The evaluation's settings as a dict."""
    samples: tuple[SampleResult, ...]
    controversial_is_unsafe: bool = True
    num_left_out: dict[str, int] = field(default_factory=dict)
    """Per suite: prompts not asked because of `max_prompts_per_category`."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        for sample in self.samples:
            if (sample.suite, sample.id) in seen:
                raise ReportError(
                    f"sample id {sample.id!r} occurs twice in suite {sample.suite!r}; ids must be unique within a "
                    "suite, or runs can't be compared prompt by prompt"
                )
            seen.add((sample.suite, sample.id))

    # Outcomes by sample id: what rates and paired comparisons are made of.

    def of_suite(self, suite: str) -> list[SampleResult]:
        """The samples of one suite, in the order in which they were asked."""
        return [sample for sample in self.samples if sample.suite == suite]

    def unsafe_outcomes(self, category: str | None = None) -> dict[str, bool | None]:
        """Harmful suite: sample id -> answered unsafely (None: unparsed), of one category or all."""
        return {
            sample.id: harmful.unsafe(sample.verdict, self.controversial_is_unsafe)
            for sample in self.of_suite(HARMFUL)
            if category in (None, sample.category)
        }

    def compliance_outcomes(self, category: str | None = None) -> dict[str, bool | None]:
        """Harmful suite: sample id -> answered without refusing."""
        return {
            sample.id: harmful.complied(sample.refused)
            for sample in self.of_suite(HARMFUL)
            if category in (None, sample.category)
        }

    def over_refusal_outcomes(self, category: str | None = None) -> dict[str, bool | None]:
        """Look-alike suite: sample id -> refused."""
        return {
            sample.id: sample.refused
            for sample in self.of_suite(LOOKALIKE)
            if category in (None, sample.category)
        }

    def helpfulness_scores(self) -> dict[str, float | None]:
        """Helpfulness suite: sample id -> mean log-probability per token (None: unscored)."""
        return {sample.id: sample.score for sample in self.of_suite(HELPFULNESS)}

    # Figures.

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The categories of the harmful suite, in natural order (S2 before S10)."""
        return _in_order(sample.category for sample in self.of_suite(HARMFUL))

    @cached_property
    def lookalike_categories(self) -> tuple[str, ...]:
        """The categories of the look-alike suite, in natural order."""
        return _in_order(sample.category for sample in self.of_suite(LOOKALIKE))

    @cached_property
    def unsafe_rate(self) -> dict[str, Rate]:
        """Per category: unsafe answers to harmful prompts."""
        return {category: Rate.of(self.unsafe_outcomes(category).values()) for category in self.categories}

    @cached_property
    def overall_unsafe_rate(self) -> Rate:
        """Unsafe answers to harmful prompts, every prompt counting once."""
        return Rate.of(self.unsafe_outcomes().values())

    @cached_property
    def compliance_rate(self) -> dict[str, Rate]:
        """Per category: harmful prompts answered without refusing."""
        return {
            category: Rate.of(self.compliance_outcomes(category).values()) for category in self.categories
        }

    @cached_property
    def overall_compliance_rate(self) -> Rate:
        """Harmful prompts answered without refusing, every prompt counting once."""
        return Rate.of(self.compliance_outcomes().values())

    @cached_property
    def over_refusal_rate(self) -> dict[str, Rate]:
        """Per category: benign look-alikes refused."""
        return {
            category: Rate.of(self.over_refusal_outcomes(category).values())
            for category in self.lookalike_categories
        }

    @cached_property
    def over_refusal(self) -> Rate:
        """Benign look-alikes refused, every prompt counting once."""
        return Rate.of(self.over_refusal_outcomes().values())

    @cached_property
    def helpfulness(self) -> Mean:
        """Mean over exchanges of the log-probability per token of the reference answer, nats."""
        return mean_interval([score for score in self.helpfulness_scores().values() if score is not None])

    @property
    def num_unscored(self) -> int:
        """Reference answers that got no score: they didn't fit, or their likelihood wasn't finite."""
        return list(self.helpfulness_scores().values()).count(None)

    def summary(self, baseline: "CategoryReport | None" = None) -> dict[str, Any]:
        """The figures without the samples, for `summary.json`; with a baseline, the paired changes too."""
        figures: dict[str, Any] = {
            "state": self.state,
            "model": self.model,
            "judge": self.judge.get("name"),
            "judge_is_stand_in": self.judge.get("stand_in"),
            "unsafe_rate": {
                "overall": asdict(self.overall_unsafe_rate),
                "categories": {category: asdict(rate) for category, rate in self.unsafe_rate.items()},
            },
            "compliance_rate": {
                "overall": asdict(self.overall_compliance_rate),
                "categories": {category: asdict(rate) for category, rate in self.compliance_rate.items()},
            },
            "over_refusal": {
                "overall": asdict(self.over_refusal),
                "categories": {category: asdict(rate) for category, rate in self.over_refusal_rate.items()},
            },
            "helpfulness": {
                "mean": self.helpfulness.mean,
                "n": self.helpfulness.n,
                "low": self.helpfulness.low,
                "high": self.helpfulness.high,
                "num_unscored": self.num_unscored,
            },
            "num_left_out": self.num_left_out,
            "seconds": self.seconds,
        }
        if baseline is not None:
            changes = compare(self, baseline)
            figures["baseline"] = baseline.state
            figures["unsafe_rate"]["change"] = {
                "overall": asdict(changes.unsafe_overall),
                "categories": {
                    category: asdict(change) | {"p_adjusted": changes.unsafe_p_adjusted[category]}
                    for category, change in changes.unsafe.items()
                },
            }
            figures["compliance_rate"]["change"] = asdict(changes.compliance)
            figures["over_refusal"]["change"] = asdict(changes.over_refusal)
            figures["helpfulness"]["change"] = asdict(changes.helpfulness)
        return figures

    def to_json(self, path: Path | str) -> None:
        """Write the report with every sample; aside first, then renamed over `path`."""
        path = Path(path)
        document = {"schema_version": SCHEMA_VERSION} | {
            item.name: getattr(self, item.name) for item in fields(self) if item.name != "samples"
        }
        document["samples"] = [asdict(sample) for sample in self.samples]
        # Derived, for readers of the file; `from_json` computes it anew.
        document["summary"] = self.summary()
        write_aside(path, json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1))

    @classmethod
    def from_json(cls, path: Path | str) -> "CategoryReport":
        """Read a report; raises ReportError naming the file and what is wrong with it."""
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ReportError(f"{path}: not a readable report: {error}") from error
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise ReportError(
                f"{path}: schema_version is {version!r}, expected {SCHEMA_VERSION}; evaluate the model again"
            )
        try:
            samples = tuple(
                SampleResult(
                    **sample
                    | {
                        "prompt": tuple(sample["prompt"]),
                        "verdict": None if sample["verdict"] is None else Verdict(sample["verdict"]),
                    }
                )
                for sample in document["samples"]
            )
            known = {item.name for item in fields(cls)} - {"samples"}
            return cls(samples=samples, **{name: document[name] for name in known})
        except ReportError as error:
            raise ReportError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(
                f"{path}: not a category report: {type(error).__name__} {error}; expected the fields that "
                "eval/README.md lists"
            ) from error


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired changes between two reports, over the prompts that have an outcome in both."""

    unsafe: dict[str, PairedChange]
    unsafe_p_adjusted: dict[str, float]
    """Two-sided, Holm over the categories."""
    unsafe_overall: PairedChange
    compliance: PairedChange
    over_refusal: PairedChange
    helpfulness: Mean
    """Of the differences, after minus before, nats per token."""


def compare(report: CategoryReport, baseline: CategoryReport) -> Comparison:
    """Paired changes from `baseline` to `report`; prompts without an outcome in one of them are left out."""
    unsafe = {
        category: _paired(report.unsafe_outcomes(category), baseline.unsafe_outcomes(category))
        for category in report.categories
    }
    before = baseline.helpfulness_scores()
    differences = [
        new - old
        for id, new in report.helpfulness_scores().items()
        if new is not None and (old := before.get(id)) is not None
    ]
    return Comparison(
        unsafe=unsafe,
        unsafe_p_adjusted=dict(
            zip(unsafe, holm([change.p_value for change in unsafe.values()]), strict=True)
        ),
        unsafe_overall=_paired(report.unsafe_outcomes(), baseline.unsafe_outcomes()),
        compliance=_paired(report.compliance_outcomes(), baseline.compliance_outcomes()),
        over_refusal=_paired(report.over_refusal_outcomes(), baseline.over_refusal_outcomes()),
        helpfulness=mean_interval(differences),
    )


def _paired(after: Mapping[str, bool | None], before: Mapping[str, bool | None]) -> PairedChange:
    pairs = [
        (old, new) for id, new in after.items() if new is not None and (old := before.get(id)) is not None
    ]
    return paired_change([old for old, _ in pairs], [new for _, new in pairs])


def _in_order(categories: Iterable[str]) -> tuple[str, ...]:
    """Unique categories, S2 before S10, OTHER last."""

    def key(category: str) -> tuple[bool, str, int, str]:
        stem = category.rstrip("0123456789")
        digits = category[len(stem) :]
        return category == OTHER, stem, int(digits) if digits else -1, category

    return tuple(sorted(set(categories), key=key))
