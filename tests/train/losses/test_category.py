import json
import math

import pytest
import torch
from torch import Tensor

from equipoise.train.losses.category import (
    CategoryState,
    per_pair,
    set_error_from_evaluation,
    set_inverse_frequency,
    shrink,
    update_error,
    update_group_dro,
    update_margins,
    update_multipliers,
)

NAN = float("nan")


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_state(*counts: float) -> CategoryState:
    return CategoryState(tuple(f"S{i + 1}" for i in range(len(counts))), t(*counts))


def test_a_new_state_is_neutral() -> None:
    state = make_state(3, 5)
    torch.testing.assert_close(state.margin, t(0, 0))
    torch.testing.assert_close(state.weight, t(1, 1))
    torch.testing.assert_close(state.log_multiplier, t(0, 0))
    assert bool(torch.isnan(state.error).all())


def test_categories_without_a_pair_are_left_out() -> None:
    state = CategoryState.from_pairs(["S2", "helpful", "S2", "S10"], ["S1", "S2", "S10"])
    assert state.categories == ("S2", "S10")
    torch.testing.assert_close(state.counts, t(2, 1))
    assert state.index(["S10", "helpful", "S2", "S1"]).tolist() == [1, -1, 0, -1]


def test_a_pair_of_no_category_gets_the_neutral_value() -> None:
    values = per_pair(t(0.5, 0.25), torch.tensor([1, -1, 0]), 7.0)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([0.25, 7.0, 0.5]))


def test_margins_move_and_are_clipped() -> None:
    state = make_state(1, 1, 1)
    update_margins(state, t(0.6, 0.1, 0.0), eta=0.5, target=0.1, maximum=0.4)
    torch.testing.assert_close(state.margin, t(0.25, 0, 0))  # never below 0
    update_margins(state, t(0.6, 0.3, 0.0), eta=0.5, target=0.1, maximum=0.4)
    torch.testing.assert_close(state.margin, t(0.4, 0.1, 0))  # 0.5 is over the largest
    update_margins(state, t(0.0, 0.1, 0.0), eta=0.5, target=0.1, maximum=0.4)
    torch.testing.assert_close(state.margin, t(0.35, 0.1, 0))  # shrinks again when better than its target


def test_multipliers_move_both_ways_and_are_clipped() -> None:
    state = make_state(1, 1, 1)
    update_multipliers(state, t(0.6, 0.1, 0.0), eta=2.0, target=0.1, maximum=1.5)
    torch.testing.assert_close(state.log_multiplier, t(1.0, 0, -0.2))
    for _ in range(9):
        update_multipliers(state, t(0.6, 0.1, 0.0), eta=2.0, target=0.1, maximum=1.5)
    torch.testing.assert_close(state.log_multiplier, t(1.5, 0, -1.5))


def test_group_dro_by_hand() -> None:
    state = make_state(6, 2)  # p = 3/4, 1/4
    update_group_dro(state, t(3 * math.log(2), math.log(8)), t(3, 1), eta=1.0)
    # q ~ 3/4 * 2, 1/4 * 8 = 6/4, 8/4 -> 3/7, 4/7; w = q / p
    torch.testing.assert_close(state.weight, t(4 / 7, 16 / 7))
    update_group_dro(state, t(0, math.log(2)), t(0, 1), eta=2.0)  # no pair of S1: exp(0)
    # q ~ 3/7 * 1, 4/7 * 4 = 3/7, 16/7 -> 3/19, 16/19
    torch.testing.assert_close(state.weight, t(4 / 19, 64 / 19))


def test_group_dro_keeps_the_mean_weight_of_pairs_at_one_and_raises_the_worst() -> None:
    state = make_state(10, 3, 7)
    previous = state.weight
    for _ in range(50):
        update_group_dro(state, t(0.5, 0.9, 0.1), t(1, 1, 1), eta=0.1)
        assert float((state.counts * state.weight).sum() / state.counts.sum()) == pytest.approx(1)
        assert state.weight[1] > previous[1]
        assert state.weight[2] < previous[2]
        previous = state.weight


def test_group_dro_with_equal_losses_stays_where_it_is() -> None:
    state = make_state(10, 3)
    update_group_dro(state, t(5 * 0.7, 0.7), t(5, 1), eta=1.0)
    torch.testing.assert_close(state.weight, t(1, 1))


def test_group_dro_does_not_overflow() -> None:
    state = make_state(1, 1)
    update_group_dro(state, t(1e6, 0), t(1, 1), eta=10.0)
    torch.testing.assert_close(state.weight, t(2, 0))


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(0.0, (1, 1)), (1.0, (5 / 8, 5 / 2)), (0.5, (5 / 6, 5 / 3))],
)
def test_inverse_frequency(temperature: float, expected: tuple[float, float]) -> None:
    state = make_state(8, 2)  # ratio of the weights 1, 4, 2; mean over ten pairs 1
    set_inverse_frequency(state, temperature)
    torch.testing.assert_close(state.weight, t(*expected))
    assert float((state.counts * state.weight).sum() / 10) == pytest.approx(1)


def test_shrinkage_is_toward_the_overall_rate() -> None:
    # (1 * 2 + 8 * 0.25) / 10, none known, many samples: hardly moved
    shrunk = shrink(t(1.0, NAN, 0.5), t(2, 0, 8000), 0.25, 8.0)
    torch.testing.assert_close(shrunk, t(0.4, 0.25, (4000 + 2) / 8008))


def test_no_shrinkage_leaves_rates_alone() -> None:
    torch.testing.assert_close(shrink(t(0.5, 0.1), t(2, 10), 0.9, 0.0), t(0.5, 0.1))


def test_running_errors() -> None:
    state = make_state(1, 1, 1)
    update_error(state, t(2, 0, 0), t(4, 0, 4), ema=0.75, shrinkage=0.0)
    # The first window counts in full; what was not seen stays unknown.
    torch.testing.assert_close(state.error, t(0.5, NAN, 0.0), equal_nan=True)
    update_error(state, t(4, 1, 0), t(4, 2, 0), ema=0.75, shrinkage=0.0)
    torch.testing.assert_close(state.error, t(0.75 * 0.5 + 0.25, 0.5, 0.0))
    update_error(state, t(0, 0, 0), t(0, 0, 0), ema=0.75, shrinkage=0.0)
    torch.testing.assert_close(state.error, t(0.625, 0.5, 0.0))


def test_running_errors_are_shrunk_toward_the_window() -> None:
    state = make_state(1, 1)
    update_error(state, t(2, 0), t(2, 6), ema=0.9, shrinkage=8.0)
    torch.testing.assert_close(state.error, t((2 + 8 / 4) / 10, (0 + 8 / 4) / 14))


def test_errors_of_an_evaluation() -> None:
    state = make_state(1, 1)
    # S9 is judged but not trained: part of the overall rate 10/20. S2 was not judged: the overall rate.
    set_error_from_evaluation(state, {"S1": (2, 12), "S9": (8, 8)}, shrinkage=8.0)
    torch.testing.assert_close(state.error, t((2 + 8 * 0.5) / 20, 0.5))


def test_an_evaluation_of_nothing_changes_nothing() -> None:
    state = make_state(1)
    set_error_from_evaluation(state, {"S1": (0, 0)}, shrinkage=8.0)
    assert bool(torch.isnan(state.error).all())


def test_the_state_survives_json() -> None:
    state = make_state(8, 2)
    update_margins(state, t(0.6, 0.3), eta=0.3, target=0.1, maximum=2.0)
    update_multipliers(state, t(0.6, 0.3), eta=0.3, target=0.1, maximum=2.0)
    set_inverse_frequency(state, 0.7)
    state.error = t(1 / 3, NAN)
    restored = make_state(1, 1)
    restored.load_state_dict(json.loads(json.dumps(state.state_dict())))
    for name in ("counts", "margin", "weight", "log_multiplier", "error"):
        mine, theirs = getattr(state, name), getattr(restored, name)
        assert torch.equal(mine.nan_to_num(-1), theirs.nan_to_num(-1)), name  # to the last bit
        assert theirs.dtype == torch.float64


def test_a_state_of_other_categories_is_refused() -> None:
    with pytest.raises(ValueError, match=r"was saved for \['S1', 'S2'\], this run has \['S1'\]"):
        make_state(1).load_state_dict(make_state(1, 1).state_dict())
