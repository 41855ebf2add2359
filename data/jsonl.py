"""Read JSON lines into records, and report everything that is wrong with a file in one error."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL, Turn
from equipoise.data.taxonomy import OTHER, load_taxonomy

MAX_LISTED = 50
"""Problems printed in full; the rest are counted."""

ROLES = ("system", "user", "assistant")

Record = TypeVar("Record")


@dataclass
class Line:
    """The JSON object on one line; its methods fetch a field or note what is wrong with it.

    A fetch that fails returns a harmless value of the right type: the record it ends up in is never used,
    because `read_records` raises once the file has been read.
    """

    values: dict[str, object]
    number: int
    """Counted from 1."""
    problems: list[str] = field(default_factory=list)
    """"FIELD: REASON", in the order found."""

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
        self.problem(name, f"found {_kind(value)}, expected true, false or null")
        return None

    def category(self) -> str:
        """A category id or `helpful`; `OTHER` where the field is absent, null, or a list of other people's labels.

        An unknown text is a problem (a slip of the pen would move a pair to `OTHER` unseen), and so is a list
        with a known category in it: a record has one. `labels` returns the list.
        """
        known = load_taxonomy()
        value = self.values.get("category")
        if value is None or (self.labels() and not any(label in known for label in self.labels())):
            return OTHER
        if not isinstance(value, str) or (value != HELPFUL and value not in known):
            found = repr(value) if isinstance(value, str) else _kind(value)
            expected = f"one of {', '.join(known.ids)}, {HELPFUL}, or no category"
            self.problem("category", f"found {found}, expected {expected}")
            return OTHER
        return value

    def labels(self) -> tuple[str, ...]:
        """The labels in `category` where it is a list, as data sets with several categories a record have it."""
        value = self.values.get("category")
        return tuple(str(label) for label in value) if isinstance(value, list) else ()

    def prompt(self) -> tuple[Turn, ...]:
        """A text (one user turn), or a list of turns of which the last is the user's."""
        value = self.values.get("prompt")
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
        if value is not None and not isinstance(value, dict):
            self.problem("meta", f"found {_kind(value)}, expected an object")
            value = None
        extra = {key: item for key, item in self.values.items() if key not in known and key != "meta"}
        if self.labels():
            extra["labels"] = list(self.labels())
        return {**(value or {}), **extra}

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
        elif not _encodable(value):
            self.problem(name, "holds half of a surrogate pair, which no tokenizer can read")
        else:
            return value
        return ""


def read_records(path: Path, parse: Callable[[Line], Record]) -> list[Record]:
    """One record a line, in the file's order; blank lines hold no record.

    Raises `DataError` with line, field and reason of every problem in the file: what cannot be read, what
    `parse` noted, and an id that occurs twice.
    """
    records: list[Record] = []
    problems: list[str] = []
    ids: dict[object, int] = {}
    for line in _lines(path):
        record = None if line.problems else parse(line)
        given = line.values.get("id")
        if isinstance(given, str) and (first := ids.setdefault(given, line.number)) != line.number:
            line.problem("id", f"{given!r} is the id of line {first} too")
        problems += [f"{path}:{line.number}: {problem}" for problem in line.problems]
        if record is not None:
            records.append(record)
    if problems:
        raise DataError(_listed(path, problems))
    if not records:
        raise DataError(f"{path} holds no record; one JSON object a line is expected.")
    return records


def _lines(path: Path) -> Iterator[Line]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    for number, encoded in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = Line({}, number)
        try:
            text = encoded.decode("utf-8")
            if not text.strip():
                continue
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
        yield line


def _listed(path: Path, problems: list[str]) -> str:
    listed = "\n".join(f"  {problem}" for problem in problems[:MAX_LISTED])
    rest = len(problems) - MAX_LISTED
    more = f"\n  ... and {rest} more" if rest > 0 else ""
    return f"{path} has {len(problems)} problem{'s'[: len(problems) > 1]}:\n{listed}{more}"


def _kind(value: object) -> str:
    """What JSON calls a value, without its text: the records may be harmful to print."""
    names: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names[type(value)]


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
