import json
import math

import pytest
import torch

from equipoise.train.losses.lagrange import ALL, Multipliers


def multipliers(initial: float = 1.0, window: int = 4, **thresholds: float) -> Multipliers:
    return Multipliers(thresholds or {ALL: 0.5}, initial=initial, maximum=5.0, window=window)


def take(state: Multipliers, costs: list[float], index: list[int], eta: float = 0.1) -> None:
    state.update(state.observe(torch.tensor(costs), torch.tensor(index)), eta=eta)


def test_one_step_by_hand() -> None:
    state = multipliers(initial=2.0)
    take(state, [1.0, 3.0], [0, 0])
    assert float(state.log_multiplier) == pytest.approx(math.log(2) + 0.1 * 2 * (2.0 - 0.5))
    take(state, [-4.0], [0])
    grown = math.exp(math.log(2) + 0.3)
    assert float(state.log_multiplier) == pytest.approx(math.log(grown) + 0.1 * grown * (0.0 - 0.5))


def test_the_step_is_gradient_ascent_in_log_lambda() -> None:
    log = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (log.exp() * (1.3 - 0.5)).backward()
    state = multipliers(initial=math.exp(0.7))
    take(state, [1.3], [0], eta=0.2)
    assert log.grad is not None
    assert float(state.log_multiplier) == pytest.approx(0.7 + 0.2 * float(log.grad))


def test_the_window_forgets_the_oldest() -> None:
    state = multipliers(window=3)
    take(state, [9.0, 1.0, 2.0, 3.0], [0, 0, 0, 0])
    assert state.mean_costs() == [2.0]


def test_lambda_stops_at_its_maximum_and_comes_back() -> None:
    state = multipliers(initial=4.0, window=1)
    take(state, [100.0], [0])
    assert float(state.log_multiplier.exp()) == pytest.approx(5.0)
    take(state, [-0.5], [0])
    assert float(state.log_multiplier.exp()) < 5.0


def test_a_multiplier_of_zero_stays_zero() -> None:
    state = multipliers(initial=0.0)
    take(state, [100.0, 50.0], [0, 0])
    assert state.of(torch.tensor([0, 0])).tolist() == [0.0, 0.0]


def test_categories_have_thresholds_and_windows_of_their_own() -> None:
    state = multipliers(S1=0.0, S2=3.0)
    index = state.index(["S2", "helpful", "S1"])
    assert index.tolist() == [1, -1, 0]
    take(state, [2.0, 2.0, 100.0], [0, 1, -1])
    assert state.log_multiplier.tolist() == pytest.approx([0.1 * 2, 0.1 * (2 - 3)])
    assert state.of(index).tolist() == pytest.approx([math.exp(-0.1), 0.0, math.exp(0.2)])
    before = float(state.log_multiplier[1])
    take(state, [1.0], [0])  # S2 was not seen: its window says nothing new
    assert float(state.log_multiplier[1]) == before
    assert state.metrics()["episode_cost/S1"] == 1.5
    assert state.metrics()["lambda/S2"] == pytest.approx(math.exp(-0.1))


def test_one_multiplier_is_over_all_categories() -> None:
    state = multipliers()
    assert state.index(["S1", "helpful"]).tolist() == [0, 0]
    assert set(state.metrics()) == {"lambda"}


def test_the_state_comes_back_exactly_through_json() -> None:
    state = multipliers(initial=0.3, S1=0.0, S2=1.0)
    take(state, [0.1, 0.7, 1 / 3], [0, 1, 0])
    state.log_multiplier[1] = -torch.inf
    other = multipliers(S1=0.0, S2=1.0)
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert torch.equal(other.log_multiplier, state.log_multiplier)
    assert other.costs == state.costs
    assert other.costs[0].maxlen == 4
    with pytest.raises(ValueError, match="saved for"):
        multipliers(S1=0.0).load_state_dict(state.state_dict())
