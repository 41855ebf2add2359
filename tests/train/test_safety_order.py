from typing import Any

import pytest

from equipoise.data.errors import DataError
from equipoise.data.schema import PreferencePair
from equipoise.train.pairs import encode_pairs
from equipoise.train.safety_order import order_by_safety


def pair(
    id: str, chosen_safe: bool | None, rejected_safe: bool | None, category: str = "S1"
) -> PreferencePair:
    prompt = ({"role": "user", "content": f"question {id}"},)
    return PreferencePair(
        id, prompt, "better", "worse", category, chosen_safe, rejected_safe, meta={"from": id}
    )


LABELLED = [
    pair("both safe", True, True),
    pair("rejected unsafe", True, False),
    pair("chosen unsafe", False, True),
    pair("both unsafe", False, False),
]


def test_both_unsafe_is_dropped_and_only_the_chosen_swapped() -> None:
    order = order_by_safety(LABELLED, "error")
    assert [p.id for p in order.pairs] == ["both safe", "rejected unsafe", "chosen unsafe"]
    assert order.pairs[:2] == LABELLED[:2]
    swapped = order.pairs[2]
    assert (swapped.chosen, swapped.rejected) == ("worse", "better")
    assert (swapped.chosen_safe, swapped.rejected_safe) == (True, False)
    assert (swapped.prompt, swapped.meta) == (LABELLED[2].prompt, {"from": "chosen unsafe"})
    assert order.counts() == {"num_swapped": 1, "num_both_unsafe": 1, "num_unlabelled": 0}
    assert order.summary() == (
        "SafeDPO keeps 3 pairs: 1 swapped because only the chosen answer was unsafe; 1 dropped because both were"
    )


def test_the_order_does_not_change_when_it_is_taken_again() -> None:
    once = order_by_safety(LABELLED, "error")
    again = order_by_safety(once.pairs, "error")
    assert again.pairs == once.pairs
    assert (again.num_swapped, again.num_both_unsafe) == (0, 0)


def test_the_gap_is_one_where_a_safe_answer_meets_an_unsafe_one(tiny_tokenizer: Any) -> None:
    """u_l - u_w in SafeDPO's order is 0 or 1; as the data had it, -1 too."""
    gaps = encode_pairs(order_by_safety(LABELLED, "error").pairs, tiny_tokenizer, 512).dataset["unsafe_gap"]
    assert list(gaps) == [0, 1, 1]
    assert list(encode_pairs(LABELLED, tiny_tokenizer, 512).dataset["unsafe_gap"]) == [0, 1, -1, 0]


@pytest.mark.parametrize("labels", [(None, None), (True, None), (None, False)])
def test_a_missing_label_is_an_error_or_a_count(labels: tuple[bool | None, bool | None]) -> None:
    pairs = [*LABELLED, pair("who knows", *labels)]
    with pytest.raises(
        DataError, match=r"1 of 5 pairs do not say \(first: who knows\).* loss\.unlabelled=drop"
    ):
        order_by_safety(pairs, "error")
    order = order_by_safety(pairs, "drop")
    assert (len(order.pairs), order.num_unlabelled) == (3, 1)
    assert order.summary().endswith("1 dropped because both were, 1 because nobody said")


def test_a_helpful_pair_without_labels_has_two_safe_answers() -> None:
    plain = pair("small talk", None, None, "helpful")
    assert order_by_safety([plain], "error").pairs == [plain]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="leaves none of 2 pairs: 1 have two unsafe answers, 1 lack a label"):
        order_by_safety([pair("a", False, False), pair("b", None, None)], "drop")
