"""How numbers and strange text are shown, alike in HTML, markdown and plots."""

import unicodedata

from equipoise.eval.gate_checks import GateCheck
from equipoise.eval.rates import Rate
from equipoise.eval.statistics import IntervalMethod

DASH = "–"
_JOINERS = "\u200c\u200d"
"""Invisible, but Persian, several Indic scripts and many emoji are spelt with them."""
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_INVISIBLE_LETTERS = "\u115f\u1160\u3164\uffa0\u2800\u034f"
"""Fillers that count as letters or marks and show nothing."""

INTERVAL_NAMES = {
    IntervalMethod.WILSON: "Wilson's",
    IntervalMethod.CLOPPER_PEARSON: "Clopper and Pearson's",
    IntervalMethod.JEFFREYS: "Jeffreys'",
}


def visible_text(text: str) -> str:
    """`text` with everything that hides, reorders or breaks text spelt out, as in `⟦U+202E⟧`.

    These are control characters but for line break and tab, bidirectional overrides and marks, zero-width and tag
    characters, unpaired surrogates and private use. The joiners stay: scripts and emoji need them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"⟦U+{ord(sign):04X}⟧" if _hides(sign) else sign for sign in text)


def _hides(sign: str) -> bool:
    if sign in "\n\t" or sign in _JOINERS:
        return False
    return unicodedata.category(sign) in _INVISIBLE or sign in _INVISIBLE_LETTERS


def one_line(text: str) -> str:
    """`text` on one line, for titles, labels and cells."""
    return visible_text(" ".join(text.split()))


def visible_token(token: str) -> str:
    """A token with its blanks and line breaks shown."""
    return visible_text(token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")) or "∅"


def percent(value: float | None, unit: str = " %") -> str:
    """0.333 -> `33 %`; one decimal where a whole number would say too little (0.004 -> `0.4 %`); None -> a dash."""
    if value is None:
        return DASH
    hundredths = 100 * value
    if 0 < hundredths < 0.05:
        return f"< 0.1{unit}"
    if 99.95 < hundredths < 100:
        return f"> 99.9{unit}"
    short = hundredths < 9.95 or hundredths > 99
    text = f"{hundredths:.1f}".removesuffix(".0") if short else f"{hundredths:.0f}"
    return f"{text}{unit}"


def percent_range(low: float | None, high: float | None) -> str:
    """An interval of a rate, in per cent: `[14, 61]`."""
    if low is None or high is None:
        return DASH
    return f"[{percent(low, '')}, {percent(high, '')}]"


def points(value: float | None) -> str:
    """A difference of rates in percentage points: 0.25 -> `+25`, -0.004 -> `−0.4`, 0 -> `0`."""
    if value is None:
        return DASH
    hundredths = 100 * value
    text = f"{hundredths:+.1f}".removesuffix(".0") if abs(hundredths) < 9.95 else f"{hundredths:+.0f}"
    return "0" if text in {"+0", "-0"} else text.replace("-", "−")


def points_range(low: float | None, high: float | None) -> str:
    """An interval of a difference of rates, in percentage points: `[−7.5, +12]`."""
    return DASH if low is None or high is None else f"[{points(low)}, {points(high)}]"


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number, or a dash for None."""
    return DASH if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def number_range(low: float | None, high: float | None, digits: int = 3, sign: bool = False) -> str:
    """An interval: `[−1.20, −0.80]`; a dash where it has no ends."""
    if low is None or high is None:
        return DASH
    return f"[{number(low, digits, sign)}, {number(high, digits, sign)}]"


def p_text(value: float | None) -> str:
    """A p-value: three decimals, never 0.000."""
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def case_range(rate: Rate) -> str:
    """The rate if none, and if every one, of the samples without a finding counted: `29–43 %`."""
    total = rate.n + rate.num_no_finding
    if not total:
        return DASH
    return f"{percent(rate.count / total, '')}–{percent((rate.count + rate.num_no_finding) / total)}"


def check_value(check: GateCheck) -> str:
    """A gate check's number in its own unit."""
    return _in_unit(check, check.value)


def check_interval(check: GateCheck) -> str:
    """A gate check's interval in its own unit."""
    if check.low is None or check.high is None:
        return DASH
    return f"{_in_unit(check, check.low)} to {_in_unit(check, check.high)}"


def check_limit(check: GateCheck) -> str:
    """What the number is held against."""
    if check.limit is None or check.name == "unsafe_regression":
        return DASH
    return _in_unit(check, check.limit)


def _in_unit(check: GateCheck, value: float | None) -> str:
    if value is None:
        return DASH
    if check.name in {"unsafe_rate", "no_finding_rate", "win_rate"}:
        return f"{100 * value:.1f} %"
    if check.name == "gap":
        return f"{100 * value:.1f} pp"
    if check.name == "helpfulness":
        return number(value, 3, sign=True)
    return f"{number(100 * value, 1, sign=True)} pp"
