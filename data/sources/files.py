"""A user's own files: JSON lines, CSV, parquet, or a folder of them."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from equipoise.data.config import DataConfig
from equipoise.data.crosswalk import Crosswalk, find_crosswalk, find_taxonomy
from equipoise.data.errors import DataError
from equipoise.data.jsonl import Line, json_lines, read_records
from equipoise.data.records import Records
from equipoise.data.schema import HELPFUL, LabelledExchange, PreferencePair
from equipoise.data.sources.pairing import pair_up, settle
from equipoise.data.tables import csv_lines, parquet_lines

FORMATS = ("jsonl", "csv", "parquet")
"""Sources of the user's own pairs, each with the suffix of its files."""

PAIR_FIELDS = frozenset(
    {"id", "prompt", "chosen", "rejected", "category", "chosen_safe", "rejected_safe", "source"}
)
LABELLED_FIELDS = frozenset({"id", "prompt", "response", "category", "safe", "refusal", "source"})

Record = TypeVar("Record", PreferencePair, LabelledExchange)


def load_pairs(config: DataConfig) -> Records:
    """The pairs of `config.path`, in the format that `config.source` names."""
    assert config.path is not None
    records = Records()
    for path in find_files(config.path, (config.source,)):
        records.pairs += _read(path, config.source, config, _pair, ("prompt", "chosen", "rejected"))
    _unique([pair.id for pair in records.pairs], config.path)
    records.num_read = len(records.pairs)
    return records


def load_labelled(config: DataConfig) -> Records:
    """The labelled answers of `config.path`, in the format that the suffix says, and the pairs they make."""
    assert config.path is not None
    records = Records()
    for path in find_files(config.path, FORMATS):
        format = path.suffix.removeprefix(".")
        records.labelled += _read(path, format, config, labelled_exchange, ("prompt", "response"))
    _unique([exchange.id for exchange in records.labelled], config.path)
    records.num_read = len(records.labelled)
    settle(records)
    pair_up(records)
    return records


def load_jsonl_pairs(path: str | Path) -> list[PreferencePair]:
    """Preference pairs, one JSON object a line; a pair without `id` gets `FILE:LINE`.

    Raises `DataError` with every problem of the file.
    """
    path = Path(path).expanduser()
    return read_records(path, lambda line: _pair(line, path.stem))


def labelled_exchange(line: Line, stem: str) -> LabelledExchange:
    """A labelled answer; one without `id` gets `FILE:LINE`."""
    return LabelledExchange(
        id=line.optional_text("id", f"{stem}:{line.number}"),
        prompt=line.prompt(),
        response=line.text("response"),
        category=line.category(),
        safe=line.flag("safe"),
        refusal=line.flag("refusal"),
        source=line.optional_text("source"),
        meta=line.meta(LABELLED_FIELDS),
    )


def find_files(path: str, formats: tuple[str, ...]) -> list[Path]:
    """The file at `path`, or the files of these formats in the folder there, by name; `DataError` if there are none."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return [place]
    found = sorted(file for format in formats for file in place.glob(f"*.{format}"))
    if not found:
        raise DataError(f"{place} holds no file {' or '.join(f'*.{format}' for format in formats)}.")
    return found


def _pair(line: Line, stem: str) -> PreferencePair:
    pair = PreferencePair(
        id=line.optional_text("id", f"{stem}:{line.number}"),
        prompt=line.prompt(),
        chosen=line.text("chosen"),
        rejected=line.text("rejected"),
        category=line.category(),
        chosen_safe=line.flag("chosen_safe"),
        rejected_safe=line.flag("rejected_safe"),
        source=line.optional_text("source"),
        meta=line.meta(PAIR_FIELDS),
    )
    if pair.chosen and pair.chosen.strip() == pair.rejected.strip():
        line.problem("rejected", "is the same as chosen")
    return pair


def _read(
    path: Path,
    format: str,
    config: DataConfig,
    parse: Callable[[Line, str], Record],
    required: tuple[str, ...],
) -> list[Record]:
    """The records of one file, its fields renamed and its labels mapped as the recipe says."""
    walk = None if config.taxonomy is None else find_crosswalk(config.taxonomy)
    known = [*find_taxonomy(config.taxonomy).ids, HELPFUL]
    if config.default_category not in known:
        raise DataError(
            f"data.default_category: found {config.default_category!r}, expected one of {', '.join(known)}"
        )
    columns = [config.fields.get(name, name).split(".")[0] for name in required]
    unseen = set(config.fields)

    def prepared(path: Path) -> Iterator[Line]:
        for number, line in enumerate(_lines(path, format, columns)):
            if config.num_rows is not None and number >= config.num_rows:
                break
            line.default_category = config.default_category
            _prepare(line, config.fields, walk, unseen)
            yield line
        for name in sorted(unseen):
            raise DataError(f"{path}: data.fields.{name} says {config.fields[name]!r}, which no line has.")

    return read_records(path, lambda line: parse(line, path.stem), prepared)


def _lines(path: Path, format: str, columns: list[str]) -> Iterator[Line]:
    if format == "csv":
        return csv_lines(path, columns)
    return parquet_lines(path, columns) if format == "parquet" else json_lines(path)


def _prepare(line: Line, fields: Mapping[str, str], walk: Crosswalk | None, unseen: set[str]) -> None:
    line.crosswalk = walk
    values = dict(line.values)
    for name, theirs in fields.items():
        outer, *inner = theirs.split(".")
        value: Any = line.values.get(outer)
        for key in inner:
            value = value.get(key) if isinstance(value, dict) else None
        if outer in line.values:
            unseen.discard(name)
        values[name] = value
        if not inner and outer not in fields:
            values.pop(outer, None)
    line.values = values


def _unique(ids: list[str], path: str) -> None:
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            raise DataError(
                f"{path}: the id {id!r} occurs in two files; ids have to be unique over the folder."
            )
        seen.add(id)
