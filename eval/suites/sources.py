"""Where a suite's prompts come from: the shipped samples, a published set (`published.py`), or a file of the user's."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from equipoise.data.crosswalk import find_crosswalk
from equipoise.data.errors import DataError
from equipoise.data.jsonl import Line, json_lines, read_records
from equipoise.data.schema import HELPFUL, Exchange
from equipoise.data.sources import samples
from equipoise.data.sources.files import find_files
from equipoise.data.sources.hub import HubSet, read_rows
from equipoise.data.tables import csv_lines, parquet_lines
from equipoise.data.taxonomy import OTHER
from equipoise.eval.suites.base import COMPLIANCE, HARMFUL, HELPFULNESS, LOOKALIKE, Suite
from equipoise.eval.suites.published import SOURCES, Source

FORMATS = ("jsonl", "json", "csv", "parquet")
"""Of files: JSON lines, one JSON array, CSV with a header, parquet."""

FIELDS = ("id", "prompt", "context", "category", "response")
"""What is read of a row: `context` is put before the prompt, `response` is a reference answer."""


OWN_FIELDS = {name: (name,) for name in FIELDS}
"""Of a user's file: the names are those of the fields, unless `suite.fields` says otherwise."""

_SAMPLES = {HARMFUL: "harmful", LOOKALIKE: "lookalike", HELPFULNESS: "helpful", COMPLIANCE: "helpful"}


def load_suite(
    suite: str,
    source: str,
    path: str | None = None,
    fields: Mapping[str, str] | None = None,
    taxonomy: str | None = None,
    mirror: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
) -> Suite:
    """The prompts of `suite` out of `source`: `samples`, `file`, or a name in `SOURCES`.

    path: the user's file or folder, or a local copy of a published set with its authors' columns. fields: what a
    field is called in the user's file. taxonomy: the crosswalk of the user's categories. mirror: a folder with copies
    of hub repositories. limit: at most so many prompts, drawn evenly over the categories. revision: of a set on the
    hub, in place of the one it is pinned to.

    Raises `DataError` with every problem of a file, or where a set cannot be had.
    """
    left_out: Counter[str] = Counter()
    facts: dict[str, Any] = {"suite": suite, "source": source}
    if source == "samples":
        exchanges = samples.suite(_SAMPLES[suite])
        facts |= {"licence": "Apache-2.0", "upstream": "shipped with equipoise"}
    else:
        known = SOURCES.get(source)
        if known is None:
            reader = Source((suite,), None, "the user's file", OWN_FIELDS | _own(fields), taxonomy, "", "", 0)
        else:
            reader = known
            facts |= {
                "licence": known.licence,
                "paper": known.paper,
                "upstream": known.upstream,
                "faults": list(known.faults),
                "num_published": known.num_prompts,
            }
        if path is not None:
            exchanges = _from_files(suite, reader, path, left_out)
            facts["path"] = path
        else:
            assert reader.hub is not None, "checked with the configuration"
            hub = reader.hub if revision is None else replace(reader.hub, revision=revision)
            exchanges = _from_hub(suite, source, reader, hub, mirror, left_out)
            facts["repository"] = hub.repo
            facts["revision"] = "local copy" if mirror is not None else commit_of(hub)
    asked = spread(exchanges, limit)
    facts |= {"num_prompts": len(asked), "num_available": len(exchanges), "left_out": dict(left_out)}
    return Suite(suite, asked, len(exchanges), facts)


def spread(exchanges: Sequence[Exchange], limit: int | None) -> list[Exchange]:
    """`limit` of the exchanges, as evenly over the categories as they allow, the first of each; in their order."""
    if limit is None or limit >= len(exchanges):
        return list(exchanges)
    seen: Counter[str] = Counter()
    ranks = []
    for place, exchange in enumerate(exchanges):
        ranks.append((seen[exchange.category], place))
        seen[exchange.category] += 1
    return [exchanges[place] for place in sorted(place for _, place in sorted(ranks)[:limit])]


def commit_of(hub_set: HubSet) -> str:
    """The commit that is read: the pinned one, or what the branch points to now."""
    if len(hub_set.revision) == 40:
        return hub_set.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        found = HfApi().dataset_info(hub_set.repo, revision=hub_set.revision, timeout=20).sha
    except (HTTPError, OSError):
        found = None  # read from the cache without a network
    return found or f"{hub_set.revision} (commit unknown: the hub was not reached)"


def _own(fields: Mapping[str, str] | None) -> dict[str, tuple[str, ...]]:
    return {name: (column,) for name, column in (fields or {}).items()}


def _from_files(suite: str, source: Source, path: str, left_out: Counter[str]) -> list[Exchange]:
    exchanges: list[Exchange] = []
    for file in find_files(path, FORMATS):

        def parse(line: Line, stem: str = file.stem) -> Exchange | None:
            return _exchange(suite, stem, line, source, left_out)

        exchanges += read_records(file, parse, _lines)
    return _unique(exchanges, path)


def _from_hub(
    suite: str, name: str, source: Source, hub: HubSet, mirror: str | None, left_out: Counter[str]
) -> list[Exchange]:
    exchanges = []
    for number, row in enumerate(read_rows(hub, mirror, None), start=1):
        line = Line(row, number)
        exchange = _exchange(suite, name, line, source, left_out)
        if line.problems:
            raise DataError(f"{hub.where}, row {number}: {line.problems[0]}.")
        if exchange is not None:
            exchanges.append(exchange)
    return _unique(exchanges, hub.where)


def _exchange(suite: str, stem: str, line: Line, source: Source, left_out: Counter[str]) -> Exchange | None:
    """One row as an exchange; None where it is not asked (counted) or has problems (noted in `line`)."""
    for column, kept in source.keep.items():
        if column not in line.values:
            line.problem(column, "is missing")
        elif line.values[column] not in kept:
            left_out[f"{column} is not {' or '.join(kept)}"] += 1
            return None
    values: dict[str, object] = {
        name: next((line.values[column] for column in columns if line.values.get(column) is not None), None)
        for name, columns in source.fields.items()
    }
    if values.get("context") == "":  # most behaviours have none
        values["context"] = None
    _name_missing_columns(line, source)
    row = Line(values, line.number, line.problems, line.from_text)
    prompt = row.prompt()
    context = row.optional_text("context")
    if context:
        prompt = (*prompt[:-1], {"role": "user", "content": f"{context}\n\n{prompt[-1]['content']}"})
    id = values.get("id")
    response = row.optional_text("response") or None
    if suite == HELPFULNESS and response is None:
        row.problem("response", "is missing; helpfulness is the likelihood of a reference answer")
    labels = row.labels()
    return Exchange(
        id=str(id) if id is not None else f"{stem}:{line.number}",
        prompt=prompt,
        category=_category(suite, row, source),
        response=response,
        source=str(line.values.get("source") or ""),
        meta={"labels": list(labels)} if labels else {},
    )


def _name_missing_columns(line: Line, source: Source) -> None:
    """A required column by the names it may have, rather than by ours."""
    for name in ("prompt", "category"):
        columns = source.fields.get(name, ())
        required = name == "prompt" or source.paper != ""
        if required and columns and not any(column in line.values for column in columns):
            found = ", ".join(map(str, line.values)) or "none"
            line.problem(" or ".join(columns), f"no such column; found {found}")


def _category(suite: str, row: Line, source: Source) -> str:
    value = row.values.get("category")
    if suite in (HELPFULNESS, COMPLIANCE):
        return HELPFUL
    if source.taxonomy is not None:
        row.crosswalk = find_crosswalk(source.taxonomy)
        return row.category()
    if source.paper:  # its own kinds of prompts, no harm of ours
        return row.text("category") if value is not None else OTHER
    return row.category()


def _lines(path: Path) -> Iterator[Line]:
    match path.suffix:
        case ".csv":
            yield from csv_lines(path, ())
        case ".parquet":
            yield from parquet_lines(path, ())
        case ".json":
            yield from _array_lines(path)
        case _:
            yield from json_lines(path)


def _array_lines(path: Path) -> Iterator[Line]:
    """The objects of one JSON array, or of JSON lines that somebody called `.json`."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            if first != "[":
                yield from json_lines(path)
                return
            rows = json.loads(first + file.read())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is no JSON array in UTF-8 ({error}); expected [{{...}}, {{...}}]."
        ) from error
    for number, row in enumerate(rows, start=1):
        line = Line(row if isinstance(row, dict) else {}, number)
        if not isinstance(row, dict):
            line.problem("row", "is no JSON object")
        yield line


def _unique(exchanges: list[Exchange], where: str) -> list[Exchange]:
    seen: set[str] = set()
    for exchange in exchanges:
        if exchange.id in seen:
            raise DataError(f"{where}: the id {exchange.id!r} occurs twice; ids have to be unique.")
        seen.add(exchange.id)
    return exchanges
