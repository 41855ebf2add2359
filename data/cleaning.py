"""Take out of the data what should not be trained on, by rules that are counted, and say of every record why."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Generic, TypeVar

from equipoise.data.config import CLEANING_RULES, CleaningConfig
from equipoise.data.errors import DataError
from equipoise.data.near_duplicates import near_duplicates
from equipoise.data.refusal import reads_as_refusal
from equipoise.data.schema import HELPFUL, LabelledExchange, PreferencePair, Turn
from equipoise.data.splits import normalise_prompt
from equipoise.data.text_rules import broken_turn, is_empty, is_truncated

PII = ("EMAIL", "PHONE", "SSN", "CREDIT_CARD")
"""What `pii` looks for; names, places and dates are in every other conversation."""

PSafe = Callable[[Sequence[Sequence[Turn]], Sequence[str]], Sequence[float | None]]
"""(conversations, answers) -> P(safe) of each answer, None where it could not be judged."""

Cleanable = TypeVar("Cleanable", PreferencePair, LabelledExchange)

Findings = Iterator[tuple[int, str]]
"""(index of a record, what was found in it)."""


@dataclass(frozen=True)
class Finding(Generic[Cleanable]):
    """A record that a rule took out or marked."""

    record: Cleanable
    rule: str
    detail: str
    dropped: bool


class CountedFindings:
    """How often each rule found something, for what keeps a list of findings."""

    findings: Sequence[Finding[Any]]

    @property
    def dropped(self) -> Counter[str]:
        """Rule -> records dropped by it."""
        return Counter(finding.rule for finding in self.findings if finding.dropped)

    @property
    def marked(self) -> Counter[str]:
        """Rule -> records marked by it; one may be dropped by a later rule."""
        return Counter(finding.rule for finding in self.findings if not finding.dropped)


@dataclass
class Cleaned(CountedFindings, Generic[Cleanable]):
    """Records behind the rules, and everything that the rules found."""

    kept: list[Cleanable]
    findings: list[Finding[Cleanable]] = field(default_factory=list)


def clean(
    records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None = None
) -> Cleaned[Cleanable]:
    """Apply every rule whose action is not `keep`, in the order of `CleaningConfig`.

    p_safe: asked by `judged_unsafe` with `p_safe: judge`. Raises DataError where a rule lacks what it needs.
    """
    cleaned = Cleaned(list(records))
    for name, rule in RULES.items():
        action = getattr(config, name)
        if action == "keep":
            continue
        found = dict(rule(cleaned.kept, config, p_safe))
        kept: list[Cleanable] = []
        for index, record in enumerate(cleaned.kept):
            if index not in found:
                kept.append(record)
                continue
            cleaned.findings.append(Finding(record, name, found[index], action == "drop"))
            if action == "mark":
                kept.append(_marked(record, name))
        cleaned.kept = kept
    return cleaned


def to_row(record: PreferencePair | LabelledExchange) -> dict[str, Any]:
    """A record as the fields of the user's own files (README.md), but for those that say nothing."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    values["prompt"] = [dict(turn) for turn in record.prompt]
    return {
        name: value for name, value in values.items() if value is not None and value != {} and value != ""
    }


def answers_of(record: PreferencePair | LabelledExchange) -> tuple[str, ...]:
    """The answers of a record, the one that is to be learnt first."""
    return (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record.response,)


def _marked(record: Cleanable, rule: str) -> Cleanable:
    flags = record.meta.get("flags")
    earlier: list[object] = flags if isinstance(flags, list) else []
    return replace(record, meta={**record.meta, "flags": [*earlier, rule]})


# ---- rules: (records, config, p_safe) -> what was found --------------------------------------------------------------


def _empty(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    for index, record in enumerate(records):
        texts = [("prompt", turn["content"]) for turn in record.prompt]
        texts += [("answer", answer) for answer in answers_of(record)]
        name = next((name for name, text in texts if is_empty(text)), None)
        if name is not None:
            yield index, f"the {name} says nothing"


def _broken_turns(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    for index, record in enumerate(records):
        found = [broken_turn(turn["content"], answer=False) for turn in record.prompt]
        found += [broken_turn(answer, answer=True) for answer in answers_of(record)]
        detail = next((detail for detail in found if detail is not None), None)
        if detail is not None:
            yield index, detail


def _contradictions(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    verdicts: dict[tuple[str, str], set[bool]] = defaultdict(set)
    preferred: set[tuple[str, ...]] = set()
    keys = [_key(record) for record in records]
    for record, (prompt, *answers) in zip(records, keys, strict=True):
        for answer, safe in zip(answers, _labels(record), strict=True):
            if safe is not None:
                verdicts[prompt, answer].add(safe)
        preferred.add((prompt, *answers))
    for index, (prompt, *answers) in enumerate(keys):
        if any(len(verdicts.get((prompt, answer), ())) == 2 for answer in answers):
            yield index, "an answer is labelled safe here and unsafe elsewhere, or the other way round"
        elif len(answers) == 2 and (prompt, answers[1], answers[0]) in preferred:
            yield index, "the same two answers are preferred the other way round elsewhere"


def _exact_duplicates(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    first: dict[tuple[str, ...], int] = {}
    for index, record in enumerate(records):
        earlier = first.setdefault(_key(record), index)
        if earlier != index:
            yield index, f"repeats {records[earlier].id}"


def _near_duplicates(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    texts = ["\n".join(_key(record)) for record in records]
    for index, earlier, similarity in near_duplicates(texts, config.near_duplicate_similarity):
        yield index, f"repeats {records[earlier].id}, similarity {similarity:.2f}"


def _judged_unsafe(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    pairs: list[tuple[int, PreferencePair]] = []
    for index, record in enumerate(records):
        if isinstance(record, PreferencePair):
            pairs.append((index, record))
    found: Sequence[float | None]
    if config.p_safe == "judge":
        if p_safe is None:
            raise DataError("data.cleaning.p_safe is judge, but there is no judge here; give a column.")
        found = p_safe([pair.prompt for _, pair in pairs], [pair.chosen for _, pair in pairs])
    else:
        found = [_column(pair) for _, pair in pairs]
        if pairs and all(value is None for value in found):
            raise DataError(
                "data.cleaning.judged_unsafe reads P(safe) from the field chosen_p_safe, which no pair has. Add it, or "
                "set data.cleaning.p_safe=judge or data.cleaning.judged_unsafe=keep."
            )
    for (index, _), value in zip(pairs, found, strict=True):
        if value is not None and value < config.min_p_safe:
            yield index, f"P(safe) of the chosen answer is {value:.3f}"


def _column(pair: PreferencePair) -> float | None:
    value = pair.meta.get("chosen_p_safe")
    if value is None:
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise DataError(f"{pair.id}: chosen_p_safe: found {value!r}, expected a number in [0, 1].")
    return number


def _refused_helpful(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    for index, record in enumerate(records):
        if (
            isinstance(record, PreferencePair)
            and record.category == HELPFUL
            and reads_as_refusal(record.chosen)
        ):
            yield index, "the chosen answer to a harmless prompt is a refusal"


def _rejected_refusal(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    for index, record in enumerate(records):
        if (
            isinstance(record, PreferencePair)
            and record.category != HELPFUL
            and reads_as_refusal(record.rejected)
            and not reads_as_refusal(record.chosen)
        ):
            yield index, "the refusal of a harmful prompt is the rejected answer"


def _truncated(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    for index, record in enumerate(records):
        if is_truncated(answers_of(record)[0]):
            yield index, f"ends with {answers_of(record)[0].rstrip()[-20:]!r}"


def _language(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    classify = _needs("py3langid", "language").classify
    for index, record in enumerate(records):
        text = f"{record.prompt[-1]['content']}\n{answers_of(record)[0]}"
        if sum(map(str.isalpha, text)) < 40:  # too short to tell
            continue
        found = classify(text[:1000])[0]
        if found not in config.languages:
            yield index, f"reads as {found}"


def _pii(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    annotator = _pii_annotator()
    for index, record in enumerate(records):
        found = sorted(
            {
                name
                for text in _texts(record)
                for name, spans in annotator.annotate(text).items()
                if spans and name in PII
            }
        )
        if found:
            yield index, ", ".join(found)


def _secrets(records: Sequence[Cleanable], config: CleaningConfig, p_safe: PSafe | None) -> Findings:
    detectors = _secret_detectors()
    for index, record in enumerate(records):
        found = sorted(
            {
                detector.secret_type
                for text in _texts(record)
                for detector in detectors
                if any(True for _ in detector.analyze_string(text))
            }
        )
        if found:
            yield index, ", ".join(found)


Rule = Callable[[Sequence[Any], CleaningConfig, PSafe | None], Findings]

RULES: dict[str, Rule] = {
    "empty": _empty,
    "broken_turns": _broken_turns,
    "contradictions": _contradictions,
    "exact_duplicates": _exact_duplicates,
    "near_duplicates": _near_duplicates,
    "judged_unsafe": _judged_unsafe,
    "refused_helpful": _refused_helpful,
    "rejected_refusal": _rejected_refusal,
    "truncated": _truncated,
    "language": _language,
    "pii": _pii,
    "secrets": _secrets,
}
"""Rules by their key in `data.cleaning`, in the order in which they apply."""

assert tuple(RULES) == CLEANING_RULES


def _key(record: PreferencePair | LabelledExchange) -> tuple[str, ...]:
    """Prompt and answers, each in the form by which they are compared."""
    return (normalise_prompt(record.prompt), *(normalise_prompt(answer) for answer in answers_of(record)))


def _labels(record: PreferencePair | LabelledExchange) -> tuple[bool | None, ...]:
    if isinstance(record, PreferencePair):
        return (record.chosen_safe, record.rejected_safe)
    return (record.safe,)


def _texts(record: PreferencePair | LabelledExchange) -> tuple[str, ...]:
    return (*(turn["content"] for turn in record.prompt), *answers_of(record))


def _needs(module: str, rule: str) -> Any:
    """A library of the extra `cleaning`; DataError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"data.cleaning.{rule} needs {error.name}: pip install 'equipoise[cleaning]', or set it to keep."
        ) from error


@cache
def _pii_annotator() -> Any:
    # By this module and not by `datafog` itself, which looks for models first; nothing is ever sent anywhere.
    module = _needs("datafog.processing.text_processing.regex_annotator.regex_annotator", "pii")
    return module.RegexAnnotator(enabled_labels=PII)


@cache
def _secret_detectors() -> tuple[Any, ...]:
    """detect-secrets' detectors of tokens with a form of their own; its guesses by entropy fire on ordinary prose."""
    base = _needs("detect_secrets.plugins.base", "secrets")
    plugins = _needs("detect_secrets.core.plugins.util", "secrets").get_mapping_from_secret_type_to_class()
    return tuple(
        plugin()
        for plugin in plugins.values()
        if issubclass(plugin, base.RegexBasedDetector) and plugin.__name__ not in _GUESSING
    )


_GUESSING = ("Base64HighEntropyString", "HexHighEntropyString", "IPPublicDetector")
