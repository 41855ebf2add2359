"""The shipped records, written for this project."""

from pathlib import Path

from equipoise.data.jsonl import Line, read_records
from equipoise.data.schema import Exchange, LabelledExchange, PreferencePair
from equipoise.data.sources.files import labelled_exchange, load_jsonl_pairs

FOLDER = Path(__file__).parent.with_name("samples")


def safety_pairs() -> list[PreferencePair]:
    """Training pairs of every hazard."""
    return load_jsonl_pairs(FOLDER / "safety_pairs.jsonl")


def helpful_pairs() -> list[PreferencePair]:
    """Training pairs without a hazard."""
    return load_jsonl_pairs(FOLDER / "helpful_pairs.jsonl")


def suite(name: str) -> list[Exchange]:
    """Held-out prompts: `harmful`, `lookalike` or `helpful`."""
    return read_records(FOLDER / f"{name}_prompts.jsonl", _exchange)


def labelled() -> list[LabelledExchange]:
    """Answers that judges are fitted on."""
    return read_records(FOLDER / "labelled_exchanges.jsonl", lambda line: labelled_exchange(line, "labelled"))


def _exchange(line: Line) -> Exchange:
    return Exchange(
        id=line.text("id"),
        prompt=line.prompt(),
        category=line.category(),
        response=line.optional_text("response") or None,
        source=line.optional_text("source"),
    )
