"""Answers that come one by one, each desirable or not: what KTO trains on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.data.errors import DataError
from equipoise.data.jsonl import Line, read_records
from equipoise.data.schema import HELPFUL, Exchange, LabelledExchange, PreferencePair, UnpairedExchange
from equipoise.data.splits import normalise_prompt

_FIELDS = frozenset({"id", "prompt", "response", "desirable", "label", "category", "source"})


@dataclass(frozen=True)
class UnpairedData:
    """Unpaired answers to train on."""

    exchanges: list[UnpairedExchange]
    num_in_suites: int = 0
    """Dropped, because a suite that the run is judged on asks the same."""
    num_unlabelled: int = 0
    """Left out, because their labels do not say whether they are desirable."""


def load_unpaired(path: str | Path, suites: Iterable[Exchange]) -> UnpairedData:
    """The answers of a JSONL file but for those whose prompt one of `suites` asks too.

    Raises `DataError` with every problem of the file, or where nothing is left.
    """
    read = read_unpaired(path)
    asked = {normalise_prompt(exchange.prompt) for exchange in suites}
    fresh = [exchange for exchange in read if normalise_prompt(exchange.prompt) not in asked]
    if not fresh:
        raise DataError(
            f"{path} leaves no answer to train on: the prompts of all {len(read)} occur in the suites that the run is "
            "judged on. Give a file with other prompts."
        )
    return UnpairedData(fresh, len(read) - len(fresh))


def read_unpaired(path: str | Path) -> list[UnpairedExchange]:
    """Unpaired answers, one JSON object a line; one without `id` gets `FILE:LINE`.

    Raises `DataError` with every problem of the file.
    """
    path = Path(path).expanduser()

    def parse(line: Line) -> UnpairedExchange:
        if "chosen" in line.values or "rejected" in line.values:
            line.problem(
                "line",
                "is a preference pair (chosen, rejected), expected one answer in response; give pairs as data.path and "
                "set split_pairs=true in the stage",
            )
        return UnpairedExchange(
            id=line.optional_text("id", f"{path.stem}:{line.number}"),
            prompt=line.prompt(),
            response=line.text("response"),
            desirable=_desirable(line),
            category=line.category(),
            source=line.optional_text("source"),
            meta=line.meta(_FIELDS),
        )

    return read_records(path, parse)


def _desirable(line: Line) -> bool:
    """`desirable`, or `label` as TRL calls it; one of them, and never null."""
    given = [name for name in ("desirable", "label") if line.values.get(name) is not None]
    if len(given) == 1:
        return bool(line.flag(given[0]))
    if given:
        line.problem("desirable", "is given twice, as desirable and as label; give one of them")
    else:
        line.problem("desirable", "is missing, expected true or false (label is read too)")
    return False


def from_labelled(exchanges: Sequence[LabelledExchange]) -> UnpairedData:
    """Labelled answers as unpaired ones, those whose labels do not say whether they are desirable left out."""
    labelled = [(exchange, _is_desirable(exchange)) for exchange in exchanges]
    found = [
        UnpairedExchange(e.id, e.prompt, e.response, desirable, e.category, e.source)
        for e, desirable in labelled
        if desirable is not None
    ]
    return UnpairedData(found, num_unlabelled=len(labelled) - len(found))


def _is_desirable(exchange: LabelledExchange) -> bool | None:
    """To a harmful request: a safe answer. To a harmless one: a safe answer that is no refusal."""
    if exchange.category != HELPFUL or exchange.safe is False:
        return exchange.safe
    return None if exchange.refusal is None else not exchange.refusal


def from_pairs(pairs: Sequence[PreferencePair]) -> list[UnpairedExchange]:
    """Preference pairs split in two: the chosen answer is desirable, the rejected one is not."""
    return [
        UnpairedExchange(f"{p.id}/{name}", p.prompt, text, name == "chosen", p.category, p.source)
        for p in pairs
        for name, text in (("chosen", p.chosen), ("rejected", p.rejected))
    ]
