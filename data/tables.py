"""Rows of CSV and parquet files, as the lines that `jsonl.read_records` reads."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from equipoise.data.errors import DataError
from equipoise.data.jsonl import MAX_CHARS, Line

BATCH_ROWS = 1024


def csv_lines(path: Path, required: Sequence[str]) -> Iterator[Line]:
    """The rows of a CSV file with a header, in UTF-8; `number` is the line in the file on which a row begins.

    required: columns without which nothing can be read; `DataError` names the one that is missing. An empty cell is an
    absent value. Behind a quote that is never closed nothing more is read.
    """
    not_utf8: dict[int, int] = {}  # line -> byte

    def decoded() -> Iterator[str]:
        with path.open("rb") as file:
            for number, encoded in enumerate(file, start=1):
                try:
                    yield encoded.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    not_utf8[number] = error.start + 1
                    yield encoded.decode("utf-8", errors="replace")

    csv.field_size_limit(MAX_CHARS)
    reader = csv.reader(decoded(), strict=True)
    header: list[str] = []
    while True:
        begins = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        except csv.Error as error:
            line = Line({}, begins)
            hint = "close the quote, cut the field, or double the quotes inside it; the lines behind were not read"
            line.problem("line", f"is not CSV ({error}); {hint}")
            yield line
            return
        if not header:
            header = row
            _require(header, required, f"{path}:1")
            continue
        if not any(row):
            continue
        cells = (cell or None for cell in row)
        line = Line(dict(zip(header, cells, strict=False)), begins, from_text=True)
        if len(row) != len(header):
            line.problem(
                "line", f"has {len(row)} fields, the header {len(header)}; quote fields that hold a comma"
            )
        for number in range(begins, reader.line_num + 1):
            if number in not_utf8:
                line.problem("line", f"is not UTF-8 (byte {not_utf8[number]}); save the file as UTF-8")
        yield line


def parquet_lines(path: Path, required: Sequence[str]) -> Iterator[Line]:
    """The rows of a parquet file, counted from 1, some at a time; `required` as for `csv_lines`."""
    import pyarrow.parquet  # here: it takes half a second to import, and most runs read no parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require(file.schema_arrow.names, required, str(path))
            number = 0
            for batch in file.iter_batches(BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Line(values, number)
    except FileNotFoundError as error:
        raise DataError(f"{path} cannot be read: No such file or directory.") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path} is not a parquet file that can be read ({reason}); write it anew."
        ) from error


def _require(columns: Sequence[str], required: Sequence[str], where: str) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        raise DataError(
            f"{where}: the column {missing[0]} is missing; found {', '.join(columns) or 'none'}. Rename a column, or "
            f"say which it is with data.fields.{missing[0]}=COLUMN."
        )
