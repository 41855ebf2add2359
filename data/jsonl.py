"""Read the lines of a file into records, and report everything that is wrong with the file in one error.

JSON lines here; `tables.py` reads the rows of CSV and parquet as such lines.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from equipoise.data.crosswalk import Crosswalk
from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL, Turn
from equipoise.data.taxonomy import OTHER, load_taxonomy
from equipoise.data.transcripts import is_transcript, parse_transcript

MAX_LISTED = 50
"""Problems printed in full; the rest are counted."""

MAX_CHARS = 1_000_000
"""Of one text: more is a slip (a file pasted into a field, a quote never closed), and no model reads it."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

ROLES = ("system", "user", "assistant")

Record = TypeVar("Record")


@dataclass
class Line:
    """The JSON object on one line, or a row of a table; its methods fetch a field or note what is wrong with it.

    A fetch that fails returns a harmless value of the right type: the record it ends up in is never used,
    because `read_records` raises once the file has been read.
    """

    values: dict[str, object]
    number: int
    """Counted from 1."""
    problems: list[str] = field(default_factory=list)
    """"FIELD: REASON", in the order found."""
    from_text: bool = False
    """Every value was read as text (CSV), so that `true` and `false` are words."""
    crosswalk: Crosswalk | None = None
    """Whose labels stand in `category`."""
    default_category: str = OTHER
    """Of a record that names none."""

    def problem(self, name: str, reason: str) -> None:
        """Note that the field `name` cannot be used."""
        self.problems.append(f"{name}: {reason}")

    def text(self, name: str) -> str:
        """A required text with at least one character that is not white space."""
        return self._text(self.values.get(name), name)

    def optional_text(self, name: str, default: str = "") -> str:
        """A text, or `default` where the field is absent or null."""
        value = self.values.get(name)
        return default if value is None else self._text(value, name)

    def flag(self, name: str) -> bool | None:
        """True, false, or None where the field is absent or null."""
        value = self.values.get(name)
        if value is None or isinstance(value, bool):
            return value
        if self.from_text and isinstance(value, str) and value.strip().casefold() in ("true", "false"):
            return value.strip().casefold() == "true"
        self.problem(name, f"found {_kind(value)}, expected true, false or null")
        return None

    def category(self) -> str:
        """A category id or `helpful`; `default_category` where the field is absent, null or an empty list.

        With a crosswalk the field may hold its labels, one or a list; labels that speak of no harm are `helpful`.
        Without one, a list of other people's labels is `OTHER`.

        An unknown text is a problem (a slip of the pen would move a pair to `OTHER` unseen), and so is a list
        with a known category in it: a record has one. `labels` returns the list.
        """
        value, labels, crosswalk = self.values.get("category"), self.labels(), self.crosswalk
        known = crosswalk.taxonomy if crosswalk else load_taxonomy()
        if value is None or value == []:
            return self.default_category
        if crosswalk and labels and all(crosswalk.knows(label) for label in labels):
            return crosswalk.category(labels) or HELPFUL
        if isinstance(value, list) and not crosswalk and not any(label in known for label in labels):
            return OTHER
        if not isinstance(value, str) or (value != HELPFUL and value not in known):
            found = repr(value) if isinstance(value, str) else _kind(value)
            expected = f"one of {', '.join(known.ids)}, {HELPFUL}, or no category"
            if crosswalk:
                stranger = next(
                    (label for label in labels or (value,) if not crosswalk.knows(str(label))), value
                )
                found = repr(stranger)
                expected += f", or labels of {crosswalk.name}: {'; '.join(crosswalk.labels)}"
            self.problem("category", f"found {found}, expected {expected}")
            return OTHER
        return value

    def labels(self) -> tuple[str, ...]:
        """What other people call the harm: the list in `category`, or its text where that is a label of theirs."""
        value = self.values.get("category")
        if isinstance(value, list):
            return tuple(str(label) for label in value)
        if not isinstance(value, str):
            return ()
        if self.crosswalk and self.crosswalk.knows(value):
            return (value,)
        known = self.crosswalk.taxonomy if self.crosswalk else load_taxonomy()
        return () if value == HELPFUL or value in known else (value,)

    def prompt(self) -> tuple[Turn, ...]:
        """A text (one user turn; a transcript is parsed into turns), or a list of turns, the last one the user's."""
        value = self.values.get("prompt")
        if isinstance(value, str) and is_transcript(value):
            return self._transcript(value)
        if not isinstance(value, list):
            return ({"role": "user", "content": self._text(value, "prompt", "a text or a list of turns")},)
        turns = tuple(self._turn(turn, f"prompt[{index}]") for index, turn in enumerate(value))
        if not turns:
            self.problem("prompt", "is an empty list")
        elif turns[-1]["role"] in ("system", "assistant"):
            self.problem("prompt", f"ends with a turn of {turns[-1]['role']!r}, expected 'user'")
        if any(turn["role"] == "system" for turn in turns[1:]):
            self.problem("prompt", "has a system turn that is not the first")
        return turns

    def meta(self, known: frozenset[str]) -> dict[str, object]:
        """The object `meta`, with every key of the line that is not `known`, and `labels`, beside it."""
        value = self.values.get("meta")
        if isinstance(value, str):  # tables have it as text; one that is no JSON is a problem below
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if value is not None and not isinstance(value, dict):
            self.problem("meta", f"found {_kind(value)}, expected an object")
            value = None
        extra = {key: item for key, item in self.values.items() if key not in known and key != "meta"}
        if self.labels():
            extra["labels"] = list(self.labels())
        return {**(value or {}), **extra}

    def _transcript(self, text: str) -> tuple[Turn, ...]:
        try:
            turns = parse_transcript(self._text(text, "prompt"))
        except DataError as error:
            self.problem("prompt", str(error))
            return ()
        if turns[-1]["role"] != "user":
            self.problem(
                "prompt", "is a transcript in which the assistant spoke last, expected 'Human:' to have"
            )
        return turns

    def _turn(self, turn: object, name: str) -> Turn:
        if not isinstance(turn, dict):
            self.problem(name, f'found {_kind(turn)}, expected {{"role": ..., "content": ...}}')
            return {"role": "", "content": ""}
        for key in turn.keys() - {"role", "content"}:
            self.problem(f"{name}.{key}", "unknown key; a turn has role and content")
        role = turn.get("role")
        if role not in ROLES:
            self.problem(f"{name}.role", f"found {role!r}, expected one of {', '.join(ROLES)}")
        return {"role": str(role), "content": self._text(turn.get("content"), f"{name}.content")}

    def _text(self, value: object, name: str, expected: str = "a text") -> str:
        if not isinstance(value, str):
            found = "is missing" if value is None else f"found {_kind(value)}"
            self.problem(name, f"{found}, expected {expected}")
        elif not value.strip():
            self.problem(name, "is empty" if not value else "is only white space")
        elif len(value) > MAX_CHARS:
            self.problem(
                name, f"has {len(value):,} characters, expected at most {MAX_CHARS:,}; cut it or leave it out"
            )
        elif not _encodable(value):
            self.problem(name, "holds half of a surrogate pair, which no tokenizer can read")
        else:
            return value
        return ""


def json_lines(path: Path) -> Iterator[Line]:
    """The lines of a file in UTF-8, each a JSON object; blank lines are passed over."""
    try:
        with path.open("rb") as file:
            for number, encoded in enumerate(file, start=1):
                line = _json_line(encoded.removeprefix(BYTE_ORDER_MARK) if number == 1 else encoded, number)
                if line is not None:
                    yield line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def read_records(
    path: Path, parse: Callable[[Line], Record | None], lines: Callable[[Path], Iterable[Line]] = json_lines
) -> list[Record]:
    """One record a line, in the file's order; None from `parse` leaves a line out.

    Raises `DataError` with line, field and reason of every problem in the file: what cannot be read, what
    `parse` noted, and an id that occurs twice.
    """
    records: list[Record] = []
    listed: list[str] = []
    num_problems = 0
    ids: dict[object, int] = {}
    for line in lines(path):
        record = None if line.problems else parse(line)
        given = line.values.get("id")
        if isinstance(given, str) and (first := ids.setdefault(given, line.number)) != line.number:
            line.problem("id", f"{given!r} is the id of line {first} too")
        num_problems += len(line.problems)
        listed += [f"{path}:{line.number}: {p}" for p in line.problems[: MAX_LISTED - len(listed)]]
        if record is not None and not num_problems:
            records.append(record)
    if num_problems:
        raise DataError(_listed(path, listed, num_problems))
    if not records:
        raise DataError(f"{path} holds no record; at least one is expected.")
    return records


def _json_line(encoded: bytes, number: int) -> Line | None:
    line = Line({}, number)
    try:
        text = encoded.removesuffix(b"\n").decode("utf-8")
        if not text.strip():
            return None
        value = json.loads(text)
    except UnicodeDecodeError as error:
        line.problem("line", f"is not UTF-8 (byte {error.start + 1}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        line.problem("line", f"is not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        line.problem("line", f"is not JSON that can be read ({error})")
    else:
        if isinstance(value, dict):
            line.values = value
        else:
            line.problem("line", f"found {_kind(value)}, expected a JSON object")
    return line


def _listed(path: Path, listed: list[str], num_problems: int) -> str:
    lines = "\n".join(f"  {problem}" for problem in listed)
    rest = num_problems - len(listed)
    more = f"\n  ... and {rest} more" if rest > 0 else ""
    return f"{path} has {num_problems} problem{'s'[: num_problems > 1]}:\n{lines}{more}"


def _kind(value: object) -> str:
    """What JSON calls a value, without its text: the records may be harmful to print."""
    names: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
