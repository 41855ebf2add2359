import pytest

from equipoise.train.rewards.verifiable import (
    answer_format,
    calibrated_abstention,
    exact_answer,
    numeric_answer,
    response_length,
)

TASKS = {
    "completions": ["12", "I don't know", "13", "I don't know", "7", "free text"],
    "answer": ["12", "12", "12", None, None, None],
    "unanswerable": [False, False, False, True, True, False],
}


def test_the_score_of_an_abstention_is_zero_and_of_an_error_minus_the_odds_of_the_threshold() -> None:
    # t = 3/4: -0.75 / 0.25 = -3. The last task has nothing to check.
    assert calibrated_abstention(0.75, **TASKS) == [1, 0, -3, 0, -3, None]
    assert calibrated_abstention(0.5, **TASKS) == [1, 0, -1, 0, -1, None]
    # t = 0: guessing is free, the scoring that makes a model bluff.
    assert calibrated_abstention(0.0, **TASKS) == [1, 0, 0, 0, 0, None]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_answering_pays_exactly_above_the_threshold(threshold: float) -> None:
    right, _, wrong = calibrated_abstention(threshold, **TASKS)[:3]
    assert right is not None
    assert wrong is not None
    for p in (threshold - 0.05, threshold, threshold + 0.05):
        expected = p * right + (1 - p) * wrong
        assert expected == pytest.approx((p - threshold) / (1 - threshold))


def test_a_numeric_answer_is_right_as_a_number_and_an_exact_one_as_a_text() -> None:
    assert numeric_answer(**TASKS) == [1, 0, 0, 1, 0, None]
    assert exact_answer(**TASKS) == [1, 0, 0, None, None, None]
    same = {"completions": ["12.0", "Answer: 12"], "answer": ["12", "12"], "unanswerable": [False, False]}
    assert numeric_answer(**same) == [1, 1]
    assert exact_answer(**same) == [0, 1]


def test_completions_may_be_conversations_as_trl_has_them() -> None:
    turns = [[{"role": "assistant", "content": text}] for text in ("12", None)]
    columns = {"completions": turns, "answer": ["12", "12"], "unanswerable": [False, False]}
    assert calibrated_abstention(0.5, **columns) == [1, -1]  # an answer without content is an empty one


def test_a_format_has_to_match_the_whole_answer() -> None:
    completions = ["<a>1\n2</a>", " <a></a>\n", "<a>1</a>!", ""]
    assert answer_format("<a>.*</a>", completions=completions) == [1, 1, 0, 0]


def test_length_costs_from_the_limit_on_and_no_more_than_one() -> None:
    # limit 4, maximum 8: a quarter a token.
    ids = [[0] * n for n in (1, 4, 5, 8, 12)]
    assert response_length(4, 8, completion_ids=ids) == [0, 0, -0.25, -1, -1]
