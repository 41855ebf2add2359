"""Where the records come from: the shipped samples, a user's own files, data sets of the hub, or a mixture of them.

`load_data` is what a run calls. The files' schema and every source are in `data/README.md`; a source is one function
`load(version, config) -> Records` and one line in `HUB_SOURCES`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from equipoise.data.categorise import fit_classifier
from equipoise.data.config import DataConfig
from equipoise.data.contamination import SuiteIndex
from equipoise.data.errors import DataError
from equipoise.data.preparation import Helpers, Preparation, prepare
from equipoise.data.records import Records
from equipoise.data.schema import HELPFUL, Exchange, LabelledExchange, PreferencePair
from equipoise.data.sources import files, helpful, hh_rlhf, labelled, pku_saferlhf, samples
from equipoise.data.sources.files import load_jsonl_pairs
from equipoise.data.sources.hub import HubSet
from equipoise.data.sources.mixture import part_sizes, take
from equipoise.data.splits import Prompted, Record, normalise_prompt, split_by_prompt
from equipoise.data.taxonomy import OTHER

__all__ = [
    "FILE_SOURCES",
    "HUB_SOURCES",
    "SHIPPED_PARTS",
    "SafetyData",
    "load_data",
    "load_jsonl_pairs",
    "load_records",
    "load_samples",
    "normalise_prompt",
    "source_version",
]


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub: its versions, the default first, and what reads them."""

    versions: Mapping[str, HubSet]
    load: Callable[[str, DataConfig], Records]


HUB_SOURCES: dict[str, HubSource] = {
    "pku_saferlhf": HubSource(pku_saferlhf.VERSIONS, pku_saferlhf.load),
    "beavertails": HubSource(labelled.BEAVERTAILS, labelled.load_beavertails),
    "hh_rlhf": HubSource(hh_rlhf.VERSIONS, hh_rlhf.load),
    "ultrafeedback_binarized": HubSource(helpful.ULTRAFEEDBACK, helpful.load_ultrafeedback),
    "helpsteer": HubSource(helpful.HELPSTEER, helpful.load_helpsteer),
    "do_not_answer": HubSource(labelled.DO_NOT_ANSWER, labelled.load_do_not_answer),
    "wildguardmix": HubSource(labelled.WILDGUARDMIX, labelled.load_wildguardmix),
    "aegis2": HubSource(labelled.AEGIS2, labelled.load_aegis2),
}
"""Data sets by the name that `data.source` and `data.mixture` call them by."""

FILE_SOURCES: dict[str, Callable[[DataConfig], Records]] = {
    **dict.fromkeys(files.FORMATS, files.load_pairs),
    "labelled": files.load_labelled,
}
"""A user's own files, at `data.path`."""

SHIPPED_PARTS: dict[str, Callable[[], list[PreferencePair]]] = {
    "safety": samples.safety_pairs,
    "helpful": samples.helpful_pairs,
}
"""The shipped training pairs, as parts of a mixture."""


_ALWAYS_TOLD = ("read", "other", "held_out", "dropped_in_suites")


@dataclass(frozen=True)
class SafetyData:
    """Everything a run trains on and is judged on."""

    safety_pairs: list[PreferencePair]
    helpful_pairs: list[PreferencePair]
    harmful_prompts: list[Exchange]
    """Held out; the unsafe rate is measured on the answers to these."""
    lookalike_prompts: list[Exchange]
    """Benign prompts that merely look dangerous; over-refusal is measured on these."""
    helpful_prompts: list[Exchange]
    """Held out, each with a reference answer in `response`."""
    labelled: list[LabelledExchange]
    """Answers that somebody judged: the source's own for training, or the shipped ones where it has none."""
    counts: dict[str, int] = field(default_factory=dict)
    """What became of the rows of a source that is not shipped: `read`, in category `OTHER`, `held_out`,
    `dropped_in_suites`, and every other reason for which one was left out, or what was done to it."""

    preparations: Mapping[str, Preparation] = field(default_factory=dict)
    """What was done to the records of each source before they were split."""

    def summary(self) -> str:
        """For the terminal: how many of what, and what was left out and why."""
        text = (
            f"{len(self.safety_pairs)} safety pairs and {len(self.helpful_pairs)} helpful pairs; judged on "
            f"{len(self.harmful_prompts)} harmful, {len(self.lookalike_prompts)} look-alike and "
            f"{len(self.helpful_prompts)} helpful prompts"
        )
        if not self.counts:
            return text
        counts = dict(self.counts)
        text += (
            f" (of {counts.pop('read')} rows read: {counts.pop('other')} pairs in category OTHER, "
            f"{counts.pop('held_out')} records held out, {counts.pop('dropped_in_suites')} dropped because a shipped "
            "suite asks the same)"
        )
        return text + "".join(f"\n  {number}: {reason}" for reason, number in counts.items())


def load_data(config: DataConfig, seed: int, helpers: Helpers | None = None) -> SafetyData:
    """The data of a run.

    A source other than `samples` replaces the shipped training pairs, and the shipped labelled answers where it has
    its own; the shipped suites stay. Records whose prompt occurs in a suite are dropped, and about
    `config.held_out_fraction` of the prompts are kept out of training and added to the suites: hazards to the harmful
    prompts, `helpful` to the helpful ones with the chosen answer as reference. All of it is counted in `counts`.

    Before that they are categorised and cleaned, as the recipe says (`preparation`). Raises `DataError`.
    """
    shipped = load_samples()
    if config.source == "samples":
        return shipped
    suites = shipped.harmful_prompts + shipped.lookalike_prompts + shipped.helpful_prompts
    classifier = None
    if config.categorise == "classifier":
        own: list[PreferencePair | LabelledExchange] = [
            *shipped.safety_pairs,
            *shipped.helpful_pairs,
            *shipped.labelled,
        ]
        classifier = fit_classifier(config, own)
    parts: dict[str, _Part] = {}
    preparations: dict[str, Preparation] = {}
    for name in config.mixture or (config.source,):
        records = load_records(name, config)
        preparations[name] = prepare(records, config, helpers, classifier)
        parts[name] = _Part.split(records, suites, config.held_out_fraction, seed)
    judged_on: list[Prompted] = [*suites]
    for part in parts.values():
        judged_on += [*part.held_out_pairs, *part.held_out_prompts]
    _drop_overlapping(parts, judged_on, config.max_suite_overlap)
    counts: Counter[str] = Counter()
    training = _mixed(parts, config, seed, counts)
    held_out = [pair for part in parts.values() for pair in part.held_out_pairs]
    prompts = [prompt for part in parts.values() for prompt in part.held_out_prompts]
    answers = [exchange for part in parts.values() for exchange in part.labelled]
    if not training and not answers:
        raise DataError(
            f"{config.source} leaves nothing to train on: {_told(parts, counts)}. Lower data.held_out_fraction "
            f"({config.held_out_fraction:g}), raise data.max_suite_overlap ({config.max_suite_overlap:g}), or give "
            "more data."
        )
    asked = _one_a_prompt(held_out)
    judged = {normalise_prompt(pair.prompt) for pair in asked}
    unanswered = [
        prompt for prompt in _one_a_prompt(prompts) if normalise_prompt(prompt.prompt) not in judged
    ]
    return replace(
        shipped,
        safety_pairs=[pair for pair in training if pair.category != HELPFUL],
        helpful_pairs=[pair for pair in training if pair.category == HELPFUL],
        harmful_prompts=shipped.harmful_prompts
        + [_held_out_exchange(pair, None) for pair in asked if pair.category != HELPFUL]
        + [prompt for prompt in unanswered if prompt.category != HELPFUL],
        helpful_prompts=shipped.helpful_prompts
        + [_held_out_exchange(pair, pair.chosen) for pair in asked if pair.category == HELPFUL],
        labelled=answers or shipped.labelled,
        counts=_counts(parts, counts),
        preparations=preparations,
    )


def load_records(name: str, config: DataConfig) -> Records:
    """The records of one source or part of a mixture, before anything is split.

    Raises `DataError` for an unknown name, and whatever is wrong with the data.
    """
    if name in SHIPPED_PARTS:
        pairs = SHIPPED_PARTS[name]()
        return Records(pairs=pairs, num_read=len(pairs))
    source, version = source_version(name)
    if source in FILE_SOURCES:
        if config.path is None:
            raise DataError(f"data.source is {source} but data.path names no file; add data.path=FILE.")
        return FILE_SOURCES[source](replace(config, source=source))
    if source not in HUB_SOURCES or version not in HUB_SOURCES[source].versions:
        raise DataError(f"data.source is {name!r}; possible: samples, mixture, {', '.join(source_names())}.")
    return HUB_SOURCES[source].load(version, config)


def source_version(name: str) -> tuple[str, str]:
    """`pku_saferlhf/30k` -> its parts; without a version the default one."""
    source, _, version = name.partition("/")
    if not version and source in HUB_SOURCES:
        version = next(iter(HUB_SOURCES[source].versions))
    return source, version


def source_names() -> list[str]:
    """Every name that `data.source` takes, besides `samples` and `mixture`: sources, and each of several versions."""
    names = list(FILE_SOURCES)
    for name, source in HUB_SOURCES.items():
        names.append(name)
        names += [f"{name}/{version}" for version in source.versions if len(source.versions) > 1]
    return names


def load_samples() -> SafetyData:
    """The shipped records, written for this project."""
    return SafetyData(
        safety_pairs=samples.safety_pairs(),
        helpful_pairs=samples.helpful_pairs(),
        harmful_prompts=samples.suite("harmful"),
        lookalike_prompts=samples.suite("lookalike"),
        helpful_prompts=samples.suite("helpful"),
        labelled=samples.labelled(),
    )


@dataclass
class _Part:
    """The records of one source, split."""

    records: Records
    pairs: list[PreferencePair]
    held_out_pairs: list[PreferencePair]
    held_out_prompts: list[Exchange]
    labelled: list[LabelledExchange]
    num_in_suites: int
    num_held_out: int

    @staticmethod
    def split(records: Records, suites: list[Exchange], held_out_fraction: float, seed: int) -> "_Part":
        in_suites = {normalise_prompt(exchange.prompt) for exchange in suites}

        def fresh(items: list[Record]) -> list[Record]:
            return [item for item in items if normalise_prompt(item.prompt) not in in_suites]

        pairs, labelled, prompts = fresh(records.pairs), fresh(records.labelled), fresh(records.prompts)
        training, held_out = split_by_prompt(pairs, held_out_fraction, seed)
        kept, held_out_labelled = split_by_prompt(labelled, held_out_fraction, seed)
        unused, held_out_prompts = split_by_prompt(prompts, held_out_fraction, seed)
        if unused:
            records.left_out["a prompt without an answer, and not held out"] += len(unused)
        as_prompts = [
            Exchange(
                exchange.id, exchange.prompt, exchange.category, source=exchange.source, meta=exchange.meta
            )
            for exchange in held_out_labelled
            if exchange.category != HELPFUL
        ]
        return _Part(
            records,
            training,
            held_out,
            held_out_prompts + as_prompts,
            kept,
            num_in_suites=sum(
                len(items) - len(left)
                for items, left in (
                    (records.pairs, pairs),
                    (records.labelled, labelled),
                    (records.prompts, prompts),
                )
            ),
            num_held_out=len(held_out) + len(held_out_prompts) + len(held_out_labelled),
        )


def _drop_overlapping(parts: dict[str, _Part], judged_on: Sequence[Prompted], max_overlap: float) -> None:
    """Drop what would be trained on and nearly asks what the run is judged on, and count it."""
    if max_overlap >= 1:
        return
    index = SuiteIndex(record.prompt for record in judged_on)

    def fresh(items: list[Record]) -> list[Record]:
        return [item for item in items if index.overlap(item.prompt) <= max_overlap]

    for part in parts.values():
        before = len(part.pairs) + len(part.labelled)
        part.pairs, part.labelled = fresh(part.pairs), fresh(part.labelled)
        num_dropped = before - len(part.pairs) - len(part.labelled)
        if num_dropped:
            reason = (
                f"a prompt that shares more than {max_overlap:.0%} of a held-out or suite prompt's n-grams"
            )
            part.records.left_out[reason] += num_dropped


def _mixed(
    parts: dict[str, _Part], config: DataConfig, seed: int, counts: Counter[str]
) -> list[PreferencePair]:
    """The training pairs of all parts, in their shares."""
    if not config.mixture:
        return [pair for part in parts.values() for pair in part.pairs]
    empty = [name for name, part in parts.items() if not part.pairs]
    if empty:
        raise DataError(
            f"data.mixture.{empty[0]}: this part has no pair to train on "
            f"({_told({empty[0]: parts[empty[0]]}, counts)}); take it out of the mixture."
        )
    sizes = part_sizes({name: len(part.pairs) for name, part in parts.items()}, config.mixture)
    training: list[PreferencePair] = []
    for name, part in parts.items():
        training += take(part.pairs, sizes[name], seed)
        if sizes[name] < len(part.pairs):
            counts[f"left out of {name}: the mixture's shares leave no room"] += len(part.pairs) - sizes[name]
    return training


def _counts(parts: dict[str, _Part], mixture: Counter[str]) -> dict[str, int]:
    counts: Counter[str] = Counter(
        {
            "read": sum(part.records.num_read for part in parts.values()),
            "other": sum(pair.category == OTHER for part in parts.values() for pair in part.records.pairs),
            "held_out": sum(part.num_held_out for part in parts.values()),
            "dropped_in_suites": sum(part.num_in_suites for part in parts.values()),
        }
    )
    for part in parts.values():
        counts.update({f"left out: {reason}": number for reason, number in part.records.left_out.items()})
        counts.update(part.records.notes)
    return {**dict.fromkeys(_ALWAYS_TOLD, 0), **(counts + mixture)}


def _told(parts: dict[str, _Part], mixture: Counter[str]) -> str:
    counts = _counts(parts, mixture)
    of_pairs = sum(len(part.records.pairs) for part in parts.values())
    reasons = [f"{number} {reason}" for reason, number in counts.items() if reason not in _ALWAYS_TOLD]
    return "; ".join(
        [
            f"of {counts['read']} rows read and {of_pairs} pairs, {counts['dropped_in_suites']} records have a prompt "
            f"of a shipped suite and {counts['held_out']} are held out",
            *reasons,
        ]
    )


def _held_out_exchange(pair: PreferencePair, reference: str | None) -> Exchange:
    return Exchange(
        pair.id, pair.prompt, pair.category, response=reference, source=pair.source, meta=pair.meta
    )


def _one_a_prompt(records: list[Record]) -> list[Record]:
    """The first record of every prompt: a suite asks a question once."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(normalise_prompt(record.prompt), record)
    return list(first.values())
