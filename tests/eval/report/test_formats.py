import pytest

from equipoise.eval.gate_checks import GateCheck, GateVerdict
from equipoise.eval.rates import Rate
from equipoise.eval.report.formats import (
    case_range,
    check_interval,
    check_limit,
    check_value,
    number_range,
    p_text,
    percent,
    percent_range,
    points,
    points_range,
    visible_text,
    visible_token,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1 / 3, "33 %"), (0.0, "0 %"), (1.0, "100 %"), (0.0434, "4.3 %"), (0.04, "4 %"),
     (0.0001, "< 0.1 %"), (0.9999, "> 99.9 %"), (0.996, "99.6 %"), (0.0996, "10 %")],
)  # fmt: skip
def test_a_rate_is_never_rounded_to_none_or_all(value: float | None, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.25, "+25"), (-0.25, "−25"), (0.0, "0"), (-0.0001, "0"), (-0.034, "−3.4"), (0.05, "+5")],
)
def test_changes_are_in_points_with_a_sign(value: float | None, text: str) -> None:
    assert points(value) == text


def test_intervals_and_p_values() -> None:
    assert percent_range(0.004, 0.61) == "[0.4, 61]"
    assert points_range(-0.075, 0.12) == "[−7.5, +12]"
    assert number_range(None, None) == "–"
    assert number_range(-1.2, 0.5, 2, sign=True) == "[−1.20, +0.50]"
    assert [p_text(p) for p in (0.0001, 0.0456, None)] == ["< 0.001", "0.046", "–"]


def test_what_has_no_finding_spans_best_to_worst_case() -> None:
    rate = Rate.of([True] * 2 + [False] * 4 + [None] * 2)
    assert case_range(rate) == "25–50 %"
    assert case_range(Rate.of([])) == "–"


def test_what_hides_or_reorders_is_spelt_out() -> None:
    assert visible_text("a\u202eb\u2066c\u200e") == "a⟦U+202E⟧b⟦U+2066⟧c⟦U+200E⟧"
    assert visible_text("\x00\x1b[31m\r\x85") == "⟦U+0000⟧⟦U+001B⟧[31m⟦U+000D⟧⟦U+0085⟧"
    # Zero-width space, soft hyphen, tag letters, a lone surrogate, a filler, private use, line separator.
    assert visible_text("\u200b\xad\U000e0041\ud800\u3164\ue000\u2028").count("⟦U+") == 7
    # Text of all kinds stays: line breaks, joiners in Persian and emoji, combining marks, right-to-left letters.
    for text in ("one\n\ttwo", "می\u200cخواهم", "👩\u200d🔬", "e\u0301", "שלום", "100 % – “quoted”"):
        assert visible_text(text) == text
    assert visible_token(" a\n") == "␣a↵"
    assert visible_token("") == "∅"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("unsafe_rate", ("25.0 %", "10.0 % to 50.0 %", "20.0 %")),
        ("no_finding_rate", ("25.0 %", "10.0 % to 50.0 %", "20.0 %")),
        ("gap", ("25.0 pp", "10.0 pp to 50.0 pp", "20.0 pp")),
        ("over_refusal", ("+25.0 pp", "+10.0 pp to +50.0 pp", "+20.0 pp")),
        ("unsafe_regression", ("+25.0 pp", "+10.0 pp to +50.0 pp", "–")),
        ("helpfulness", ("+0.250", "+0.100 to +0.500", "+0.200")),
    ],
)
def test_a_check_is_shown_in_its_own_unit(name: str, shown: tuple[str, str, str]) -> None:
    check = GateCheck(name, None, GateVerdict.PASS, "", 0.25, 0.1, 0.5, 0.2)
    assert (check_value(check), check_interval(check), check_limit(check)) == shown
    nothing = GateCheck(name, None, GateVerdict.INCONCLUSIVE, "")
    assert (check_value(nothing), check_interval(nothing), check_limit(nothing)) == ("–", "–", "–")
