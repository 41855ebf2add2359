from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.train.rewards.answers import (
    MAX_CHARACTERS,
    Outcome,
    abstains,
    claimed_answer,
    claimed_number,
    numbers,
    outcome,
    parse_number,
    same_number,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-12", -12),
        ("−12", -12),  # a minus sign, not a hyphen
        ("+ 12", 12),
        ("- 12", -12),
        ("12.", 12),
        ("(12)", 12),
        ("12,", 12),
        ("**12**", 12),
        ("1,234", 1234),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1{,}234", 1234),
        ("1_000", 1000),
        ("1\u202f000", 1000),
        (".5", Fraction(1, 2)),
        ("0.125", Fraction(1, 8)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("1 3/4", Fraction(7, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        ("2e3", 2000),
        ("2E-3", Fraction(1, 500)),
        ("2 × 10^3", 2000),
        (r"2 \times 10^{-3}", Fraction(1, 500)),
        ("$5", 5),
        ("-$5.50", Fraction(-11, 2)),
        (r"\$5", 5),
        ("50%", 50),
        ("12 apples", 12),
        ("12 km/h", 12),
        ("1.5 million people", 1_500_000),
        ("x = 12", 12),
        ("7 + 5 = 12", 12),
        ("12km", 12),
        ("", None),
        ("twelve", None),
        ("H2O", None),
        ("3 or 4", None),
        ("5-3", None),
        ("5 - 3", None),
        ("3–5", None),
        ("1,2", None),
        ("1,2,3", None),
        ("1,23,4", None),
        ("1.2.3", None),
        ("1/2/2024", None),
        ("3/0", None),
        ("1e999999999", None),
        ("1e-999999999", None),
        ("2 × 10^999999999999999999999", None),
    ],
)
def test_a_number_is_read_exactly_or_not_at_all(text: str, value: int | Fraction | None) -> None:
    assert parse_number(text) == value


def test_numbers_in_order_with_signs_that_belong_to_them() -> None:
    assert numbers("from 3 to -4.5, i.e. 1/2 of it") == [3, Fraction(-9, 2), Fraction(1, 2)]
    assert numbers("10 - 3 is 7") == [10, 3, 7]


def test_whole_numbers_have_to_be_the_same_and_others_nearly() -> None:
    assert not same_number(Fraction(10_000_001), Fraction(10_000_000))
    assert same_number(Fraction(1, 3), Fraction("0.3333333"))
    assert not same_number(Fraction(1, 3), Fraction("0.333"))


@pytest.mark.parametrize(
    ("text", "claimed"),
    [
        ("12", None),
        ("Answer: 12", "12"),
        ("**Answer:** 12", "12"),
        ("The answer is 12.", "12."),
        ("the answer is: 12", "12"),
        ("#### 12", "12"),
        ("Answer:\n12\nbecause", "12"),
        ("Answer: 1\nno, wait\nAnswer: 2", "2"),
        (r"so \boxed{12}", "12"),
        (r"\boxed{\frac{3}{4}} is it", r"\frac{3}{4}"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{1} or \boxed{2", "1"),  # cut off
        (r"\boxed{1} Answer: 2", "2"),
        (r"Answer: 1 \boxed{2}", "2"),
        ("Answer:", ""),
        ("I can't answer 3 questions", None),
    ],
)
def test_what_is_marked_last_is_the_answer(text: str, claimed: str | None) -> None:
    assert claimed_answer(text) == claimed


@pytest.mark.parametrize(
    "text",
    [
        "I don't know",
        "I don’t know.",
        "i do not know, sorry",
        "IDK",
        "Unknown.",
        "n/a",
        "I'm not sure, maybe 12",
        "It cannot be determined.",
        "That can't be solved without x",
        "There is not enough information",
        "Answer: I don't know",
        r"I first thought 12. \boxed{unknown}",
    ],
)
def test_an_abstention_is_recognised(text: str) -> None:
    assert abstains(text)


@pytest.mark.parametrize(
    "text", ["12", "I don't know at first, but 3 + 4: Answer: 7", "x is an unknown number, 12", "", "I know"]
)
def test_an_answer_is_no_abstention(text: str) -> None:
    assert not abstains(text)


@pytest.mark.parametrize(
    ("text", "answer", "unanswerable", "found"),
    [
        ("3 + 4 = 7", "7", False, Outcome.CORRECT),
        ("7 apples", "7", False, Outcome.CORRECT),
        ("It is 7. That is 8 less than 15.", "7", False, Outcome.WRONG),  # the last number counts
        ("Answer: 7. That is 8 less than 15.", "7", False, Outcome.WRONG),  # and a marked answer has one
        ("14/2", "7", False, Outcome.CORRECT),
        ("8", "7", False, Outcome.WRONG),
        ("", "7", False, Outcome.WRONG),
        ("  \n", None, True, Outcome.WRONG),
        ("seven", "7", False, Outcome.WRONG),
        ("I don't know", "7", False, Outcome.ABSTAINED),
        ("I don't know", None, True, Outcome.ABSTAINED),
        ("7", None, True, Outcome.WRONG),
        ("paris.", "Paris", False, Outcome.CORRECT),
        ("The answer is  “Paris”", "Paris", False, Outcome.WRONG),  # typographic quotes are no plain ones
        ("Answer: 'Paris'", "Paris", False, Outcome.CORRECT),
        ("Rome", "Paris", False, Outcome.WRONG),
        ("anything", None, False, None),
    ],
)
def test_what_became_of_a_task(
    text: str, answer: str | None, unanswerable: bool, found: Outcome | None
) -> None:
    assert outcome(text, answer, unanswerable) is found


PIECES = st.sampled_from(
    [
        *"0123456789.,/-+eE$%{}\\ \n",
        "\\boxed{",
        "}",
        "Answer:",
        "frac",
        "\\frac{1}{",
        "10^",
        " × ",
        "don't know",
        "½",
        "٣",
    ]
)


@settings(max_examples=300, deadline=None, database=None)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)))
def test_nothing_that_a_model_writes_stops_the_reader(text: str) -> None:
    claimed_answer(text)
    abstains(text)
    for value in numbers(text):
        assert abs(value) < 10 ** (MAX_CHARACTERS + 500)
    assert outcome(text, "7") in Outcome
    assert outcome(text, text) in Outcome


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "{:,}", "Answer: {}", "\\boxed{{{}}}", "so {} apples."]),
)
def test_every_written_integer_is_read_back(value: int, form: str) -> None:
    assert claimed_number(form.format(value)) == value


@settings(max_examples=200, deadline=None, database=None)
@given(st.decimals(-(10**9), 10**9, places=4))
def test_every_written_decimal_is_read_back(value: object) -> None:
    assert claimed_number(f"= {value:f}") == Fraction(str(value))


def test_a_long_answer_costs_no_more_than_its_end() -> None:
    assert claimed_number("1 " * 10**6 + "7") == 7
