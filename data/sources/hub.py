"""Rows of a data set of the Hugging Face hub at a pinned revision, or of a local copy with the same layout."""

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.data.errors import DataError

TEXT: tuple[type, ...] = (str,)
FLAG: tuple[type, ...] = (bool,)
WHOLE: tuple[type, ...] = (int,)
NUMBER: tuple[type, ...] = (int, float)
MAPPING: tuple[type, ...] = (dict,)
TURNS: tuple[type, ...] = (list,)

TYPE_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
}


_READERS = {".parquet": "parquet", ".csv": "csv"}
"""The reader of `datasets` by the suffix of the files; absent: JSON, one object a line or one array."""


@dataclass(frozen=True)
class HubSet:
    """Files of a data set, and what the loader that was written for them expects in a row."""

    repo: str
    """owner/name on the hub."""
    revision: str
    """Commit; a branch where no commit is known."""
    files: tuple[str, ...]
    """Paths inside the repository, `*` allowed: the training split."""
    columns: Mapping[str, tuple[type, ...]]
    """Column -> its types; any value may be null."""

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"{self.repo} at {self.revision[:8]}"


def read_rows(hub_set: HubSet, mirror: str | None, num_rows: int | None) -> Iterator[dict[str, Any]]:
    """The rows of a data set, the first `num_rows` of them.

    A local copy is streamed from its files. From the hub, a few rows are streamed, and a whole set is downloaded once
    and read from the cache after that.

    Raises `DataError` where the set cannot be had, and where a row lacks a column or holds another type.
    """
    import datasets  # here: it takes a second to import, and most runs read no hub

    folder = None if mirror is None else Path(mirror).expanduser() / hub_set.repo
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"data.mirror: {folder} is no folder; expected a copy of the repository {hub_set.repo} there."
        )
    source = hub_set.where if folder is None else str(folder)
    base = f"hf://datasets/{hub_set.repo}@{hub_set.revision}" if folder is None else glob.escape(str(folder))
    try:
        rows = datasets.load_dataset(
            # The files by themselves: a repository's card may name configurations, splits and features of its own.
            _READERS.get(Path(hub_set.files[0]).suffix, "json"),
            data_files=[f"{base}/{file}" for file in hub_set.files],
            split="train",
            streaming=folder is not None or num_rows is not None,
        )
        for number, row in enumerate(rows, start=1):
            if num_rows is not None and number > num_rows:
                break
            _check_row(row, number, hub_set, source)
            yield row
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{source}: a file is missing ({_first_line(error)}); expected {', '.join(hub_set.files)} as at revision "
            f"{hub_set.revision} of {hub_set.repo}."
        ) from error
    except (
        Exception
    ) as error:  # of datasets, huggingface_hub, pyarrow, fsspec: whatever they raise, the set is not read
        hint = (
            "Mend the file, or copy it again."
            if folder is not None
            else "Check the network, accept the data set's conditions and log in (`hf auth login`) where it is gated, "
            "or point data.mirror at a local copy."
        )
        raise DataError(f"{source} cannot be read: {_reason(error)}. {hint}") from error


def _check_row(row: Mapping[str, Any], number: int, hub_set: HubSet, source: str) -> None:
    missing = [name for name in hub_set.columns if name not in row]
    if missing:
        raise DataError(
            f"{source}, row {number}: the column {missing[0]} is missing; found {', '.join(row)}. The loader was "
            f"written for {hub_set.repo} at {hub_set.revision}: give data.mirror a copy of that revision."
        )
    for name, types in hub_set.columns.items():
        value = row[name]
        # bool is an int to Python; a column of numbers that turns into flags is another schema.
        wrong = value is not None and (
            not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
        )
        if wrong:
            found = TYPE_NAMES.get(type(value), type(value).__name__)
            raise DataError(
                f"{source}, row {number}: the column {name} holds {found}, expected {TYPE_NAMES[types[0]]}; the "
                f"loader was written for {hub_set.repo} at {hub_set.revision}."
            )


def _reason(error: BaseException) -> str:
    """The first line of the cause: datasets wraps the error that says which file and row in one that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
