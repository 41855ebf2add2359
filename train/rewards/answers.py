"""Reading answers: what a completion claims, whether that is right, and whether it claims anything at all.

A completion's answer is what stands in its last `\\boxed{...}`, behind its last `Answer: ...` (also `the answer is`,
`#### ...`), whichever comes later; without either, the whole text. Nothing here guesses at a meaning: `3 or 4` is no
number, and neither is `3,5`, which is three and a half to some and two numbers to others.
"""

import re
import unicodedata
from enum import StrEnum
from fractions import Fraction

MAX_CHARACTERS = 4096
"""Of an answer that is read: a number that takes more is none, and no pattern has to run over a whole essay."""
MAX_EXPONENT = 400
"""|exponent| of a number that is read: 1e999999999 would fill the memory."""
TOLERANCE = Fraction(1, 10**6)
"""Relative; for comparisons in which a number is not whole."""


class Outcome(StrEnum):
    """What became of a task."""

    CORRECT = "correct"
    ABSTAINED = "abstained"
    WRONG = "wrong"
    """Answered, and not with the answer; an empty completion too."""


_MARKER = re.compile(r"\banswer(?:\s*\**\s*:|\s+is\b\s*:?)|####", re.IGNORECASE)
_ABSTENTION = re.compile(
    r"\b(?:(?:i )?(?:really |honestly )?(?:do not|don'?t|cannot|can'?t|could not|couldn'?t) (?:know|tell|say|determine)"
    r"|i(?:'m| am) not (?:sure|certain)|idk|unanswerable|(?:not enough|insufficient|missing) information"
    r"|(?:cannot|can'?t|can not|could not|couldn'?t) be (?:determined|answered|known|solved|computed|calculated))\b",
    re.IGNORECASE,
)
_ABSTENTION_ALONE = frozenset({"unknown", "undetermined", "none", "n/a", "?", "not known", "no answer"})

_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_POWER_OF_TEN = re.compile(r"\s*(?:[x×*]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?\s*([-+]?\d+)\s*\}?")
# Digits with thousands separators in full groups of three, or none; a mixed number, a fraction, or decimals.
_WHOLE = r"\d{1,3}(?:[,_\u00a0\u202f']\d{3})+|\d+"
_NUMBER = re.compile(
    rf"(?<![\w.,/])(?P<sign>(?<!\d\s)[-+]\s?(?=[\d.$€£¥]))?[$€£¥]?\s?"
    rf"(?:(?:(?P<mixed>\d+)\s+)?(?P<numerator>\d+)\s?/\s?(?P<denominator>\d+)"
    rf"|(?:(?P<whole>{_WHOLE})(?:\.(?P<decimals>\d+))?|\.(?P<bare>\d+))(?:[eE](?P<exponent>[-+]?\d+))?)"
    r"(?![.,/]?\d|/)"
)
_MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9}


def claimed_answer(text: str) -> str | None:
    """What the completion marks as its answer: the last `\\boxed{...}` or `Answer: ...`; None without a mark."""
    box = _last_box(text)
    marker = next(iter(reversed(list(_MARKER.finditer(text)))), None)
    if marker is not None and (box is None or marker.start() > box[0]):
        lines = text[marker.end() :].strip().splitlines()
        return lines[0].strip().strip("*").strip() if lines else ""
    return box[1].strip() if box is not None else None


def _last_box(text: str) -> tuple[int, str] | None:
    """Where the last complete `\\boxed{` starts, and what its braces hold."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return start, text[start + len("\\boxed{") : position]
        end = start  # its braces do not close: cut off; an earlier one may
    return None


def abstains(text: str) -> bool:
    """Whether the completion declines to answer: in its marked answer where it has one, else anywhere."""
    marked = claimed_answer(text)
    shown = (text if marked is None else marked)[:MAX_CHARACTERS].replace("’", "'")
    alone = shown.strip().strip(".!*\"'`").strip().casefold()
    return alone in _ABSTENTION_ALONE or _ABSTENTION.search(shown) is not None


def numbers(text: str) -> list[Fraction]:
    """Every number of a text, exactly, in order: 1,234.5, -3/4, 1 3/4, \\frac{3}{4}, 2e3, 2 × 10^3, $5, 1.5 million.

    A unit or percent sign is left aside (50% is 50). Digits that are no number by themselves (1,2,3; 1/2/2024; 1.2.3;
    division by zero) are passed over.
    """
    if len(text) > MAX_CHARACTERS:
        text = text[-MAX_CHARACTERS:]
    text = (
        text.replace("−", "-").replace("\\$", "$").replace("\\!", "").replace("\\,", "").replace("{,}", ",")
    )
    text = _LATEX_FRACTION.sub(r" \1/\2", text)
    found = []
    position = 0
    while match := _NUMBER.search(text, position):
        position = match.end()
        power = _POWER_OF_TEN.match(text, position)
        position = power.end() if power else position
        value = _value(match, int(power[1][:9]) if power else 0)
        if value is not None:
            word = re.match(r"\s+(\w+)", text[position:])
            found.append(value * 10 ** _MULTIPLES.get(word[1].casefold() if word else "", 0))
    return found


def _value(match: re.Match[str], power: int) -> Fraction | None:
    part = match.groupdict()
    exponent = int((part["exponent"] or "0")[:9]) + power
    if abs(exponent) > MAX_EXPONENT:
        return None
    if part["numerator"] is not None:
        if int(part["denominator"]) == 0:
            return None
        value = int(part["mixed"] or 0) + Fraction(int(part["numerator"]), int(part["denominator"]))
    else:
        whole = re.sub(r"\D", "", part["whole"] or "0")
        value = Fraction(f"{whole}.{part['decimals'] or part['bare'] or '0'}") * Fraction(10) ** exponent
    return -value if (part["sign"] or "").startswith("-") else value


def parse_number(text: str) -> Fraction | None:
    """The one number of an answer, behind its last `=` where it has one; None where it holds none or several."""
    found = numbers(text.rsplit("=", 1)[-1])
    return found[0] if len(found) == 1 else None


def same_number(a: Fraction, b: Fraction) -> bool:
    """Equal if both are whole; else equal within `TOLERANCE` of the larger."""
    if a.denominator == 1 and b.denominator == 1:
        return a == b
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def claimed_number(text: str) -> Fraction | None:
    """The number that a completion answers: the marked answer's, else the last one of the text."""
    marked = claimed_answer(text)
    if marked is not None:
        return parse_number(marked)
    found = numbers(text)
    return found[-1] if found else None


def plain(text: str) -> str:
    """The form in which texts are compared: NFKC, casefolded, single spaces, no quotes, marks or last full stop."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").casefold()
    return " ".join(text.split()).strip("\"'`*$ ").rstrip(".!").strip("\"'`*$ ")


def same_text(text: str, answer: str) -> bool:
    """Whether the completion's answer (marked, or all of it) reads as `answer`."""
    marked = claimed_answer(text)
    return plain(text if marked is None else marked) == plain(answer)


def outcome(text: str, answer: str | None, unanswerable: bool = False) -> Outcome | None:
    """What became of a task; None where it has no answer to check against and is not known to have none.

    A reference that is one number is compared as a number, any other as a text. On an unanswerable task whatever does
    not abstain is wrong.
    """
    if answer is None and not unanswerable:
        return None
    if abstains(text):
        return Outcome.ABSTAINED
    if answer is None or not text.strip():
        return Outcome.WRONG
    expected = parse_number(answer)
    if expected is None:
        return Outcome.CORRECT if same_text(text, answer) else Outcome.WRONG
    given = claimed_number(text)
    return Outcome.CORRECT if given is not None and same_number(given, expected) else Outcome.WRONG
