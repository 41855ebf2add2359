from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.jsonl import MAX_CHARS
from equipoise.data.sources import Records, load_records

HEADER = "prompt,chosen,rejected,category,chosen_safe"


def load(path: Path, source: str = "csv", **keys: Any) -> Records:
    return load_records(source, DataConfig(source=source, path=str(path), **keys))


def write_csv(path: Path, *lines: str | bytes, header: str = HEADER) -> Path:
    encoded = [line if isinstance(line, bytes) else line.encode() for line in (header, *lines)]
    path.write_bytes(b"\r\n".join(encoded) + b"\r\n")
    return path


def write_parquet(path: Path, *rows: Mapping[str, object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def test_csv_cells_are_texts_flags_and_absent_values(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", '"Two\r\nlines, one cell",Yes,No,S2,TRUE', "", "Next,Yes,No,,")
    one, other = load(path).pairs
    assert one.prompt[0]["content"] == "Two\r\nlines, one cell"
    assert (one.category, one.chosen_safe, one.id) == ("S2", True, "a:2")
    assert (other.category, other.chosen_safe, other.id) == ("OTHER", None, "a:5")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\na,b,c\n")
    assert len(load(path).pairs) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b,c,S1,yes"], r"a\.csv:2: chosen_safe: found a text, expected true, false or null"),
        (
            ["a,b,c,S1,", "a,b,c"],
            r"a\.csv:3: line: has 3 fields, the header 5; quote fields that hold a comma",
        ),
        (["a,b,,S1,"], r"a\.csv:2: rejected: is missing, expected a text"),
        (["a,b,c,S99,"], r"a\.csv:2: category: found 'S99', expected one of S1"),
        (
            ["a,b,c,S1,", b"caf\xe9,b,c,S1,"],
            r"a\.csv:3: line: is not UTF-8 \(byte 4\); save the file as UTF-8",
        ),
        (
            ['"a,b,c,S1,', "d,e,f,S1,"],
            r"a\.csv:2: line: is not CSV \(unexpected end of data\); close the quote",
        ),
        (['"a"x,b,c,S1,'], r"a\.csv:2: line: is not CSV"),
        ([f"{'a' * (MAX_CHARS + 1)},b,c,S1,"], r"a\.csv:2: line: is not CSV \(field larger than field limit"),
    ],
)
def test_a_bad_row_is_reported_with_its_line(tmp_path: Path, lines: list[str | bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write_csv(tmp_path / "a.csv", *lines))


@pytest.mark.parametrize("source", ["csv", "parquet"])
def test_a_missing_column_is_named(tmp_path: Path, source: str) -> None:
    path = tmp_path / f"a.{source}"
    if source == "csv":
        write_csv(path, "a,b", header="question,chosen")
    else:
        write_parquet(path, {"question": "a", "chosen": "b"})
    with pytest.raises(
        DataError, match=r"the column prompt is missing; found question, chosen.*data\.fields\.prompt"
    ):
        load(path, source)
    with pytest.raises(DataError, match="the column rejected is missing"):
        load(path, source, fields={"prompt": "question"})


def test_parquet_rows_keep_turns_and_nulls(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    good = {"prompt": turns, "chosen": "b", "rejected": "c", "chosen_safe": True, "note": 3}
    path = write_parquet(tmp_path / "a.parquet", good, good | {"chosen_safe": None, "note": None})
    one, other = load(path, "parquet").pairs
    assert (one.prompt, one.chosen_safe, one.meta) == (tuple(turns), True, {"note": 3})
    assert (other.id, other.chosen_safe) == ("a:2", None)
    bad = write_parquet(tmp_path / "b.parquet", good, good | {"rejected": None})
    with pytest.raises(DataError, match=r"b\.parquet:2: rejected: is missing, expected a text"):
        load(bad, "parquet")


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match=r"a\.parquet is not a parquet file that can be read .*write it anew"):
        load(tmp_path / "a.parquet", "parquet")
    with pytest.raises(DataError, match=r"no\.parquet cannot be read: No such file"):
        load(tmp_path / "no.parquet", "parquet")
    with pytest.raises(DataError, match=r"no\.csv cannot be read: No such file"):
        load(tmp_path / "no.csv")
