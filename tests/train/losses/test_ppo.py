import math

import pytest
import torch
from torch import Tensor

from equipoise.train.losses.ppo import (
    answer_mean,
    clipped_actor_loss,
    clipped_critic_loss,
    combined_advantages,
    flat_groups,
    gae,
    grpo_advantages,
    rloo_advantages,
    token_rewards,
)

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


def test_the_mean_of_an_answer_is_over_its_own_tokens() -> None:
    means = answer_mean(
        rows([1, 2, 6], [4, 100, 100], [7, 7, 7]), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    )
    assert means.tolist() == [3.0, 4.0, 0.0]


def test_token_rewards_by_hand() -> None:
    log_ratio = rows([0.5, -1.0, 2.0], [1.0, 9.0, 9.0])
    rewards = token_rewards(torch.tensor([3.0, -2.0]), log_ratio, MASK, kl_coef=0.1, clip=50)
    torch.testing.assert_close(rewards, rows([-0.05, 0.1, 3 - 0.2], [-2 - 0.1, 0, 0]))
    costs = token_rewards(torch.tensor([3.0, -2.0]), log_ratio, MASK, kl_coef=-0.1, clip=50)
    torch.testing.assert_close(costs, rows([0.05, -0.1, 3 + 0.2], [-2 + 0.1, 0, 0]))


def test_the_halves_of_the_kl_penalty_add_up_to_half_whatever_lambda() -> None:
    log_ratio, score, cost = rows([0.5, -1.0, 2.0]), torch.tensor([1.5]), torch.tensor([-0.7])
    mask = torch.ones(1, 3, dtype=torch.bool)
    plain = rows([0, 0, 1.0])
    for multiplier in (0.0, 0.3, 4.0):
        reward = token_rewards(score, log_ratio, mask, kl_coef=0.05, clip=50)
        costs = token_rewards(cost, log_ratio, mask, kl_coef=-0.05, clip=50)
        both = combined_advantages(reward, costs, torch.tensor([multiplier]))
        expected = plain * (score - multiplier * cost) / (1 + multiplier) - 0.05 * log_ratio
        torch.testing.assert_close(both, expected)


def test_scores_are_clipped_with_their_penalty() -> None:
    rewards = token_rewards(torch.tensor([60.0, -70.0]), torch.zeros(2, 3), MASK, kl_coef=0.1, clip=50)
    assert rewards.tolist() == [[0, 0, 50], [-50, 0, 0]]


def test_gae_by_hand() -> None:
    rewards, values = rows([1.0, 0.0, 2.0], [5.0, 99.0, 99.0]), rows([0.5, 1.0, 1.5], [2.0, 99.0, 99.0])
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.5)
    delta = [1 + 0.9 * 1.0 - 0.5, 0 + 0.9 * 1.5 - 1.0, 2 - 1.5]  # behind the last token there is no value
    third = delta[2]
    second = delta[1] + 0.45 * third
    first = delta[0] + 0.45 * second
    torch.testing.assert_close(advantages, rows([first, second, third], [3.0, 0, 0]))
    torch.testing.assert_close(returns, rows([first + 0.5, second + 1, third + 1.5], [5.0, 0, 0]))
    assert not returns.requires_grad


def test_gae_limits() -> None:
    """lam = 1: return to come minus value; lam = 0: the temporal-difference error alone."""
    rewards, values = rows([1.0, -2.0, 4.0]), rows([0.3, 0.6, 0.9])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, rows([3.0, 2.0, 4.0]))
    torch.testing.assert_close(advantages, rows([3.0, 2.0, 4.0]) - values)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0)
    torch.testing.assert_close(advantages, rows([1 + 0.6 - 0.3, -2 + 0.9 - 0.6, 4 - 0.9]))


def test_rloo_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    valid = torch.ones(6, dtype=torch.bool)
    assert rloo_advantages(scores, valid, 3).tolist() == [-3.0, -1.5, 4.5, 0, 0, 0]
    valid[2] = False
    scores[2] = torch.nan  # whatever stands there
    assert rloo_advantages(scores, valid, 3).tolist() == [-1.0, 1.0, 0, 0, 0, 0]
    assert rloo_advantages(torch.tensor([3.0, 8.0]), torch.tensor([True, False]), 2).tolist() == [0, 0]


def test_grpo_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    valid = torch.ones(6, dtype=torch.bool)
    std = math.sqrt((4 + 1 + 9) / 2)
    expected = torch.tensor([-2 / std, -1 / std, 3 / std, 0, 0, 0])
    torch.testing.assert_close(grpo_advantages(scores, valid, 3), expected)
    scores[2], valid[2] = torch.inf, False
    root = math.sqrt(0.5)
    torch.testing.assert_close(
        grpo_advantages(scores, valid, 3), torch.tensor([-0.5 / root, 0.5 / root, 0, 0, 0, 0])
    )


def test_groups_that_say_nothing() -> None:
    scores = torch.tensor([1.0, 2.0, 5.0, 5.0, 3.0, 9.0, 1.0, 1.0])
    valid = torch.tensor([True, True, True, True, True, False, False, False])
    assert flat_groups(scores, valid, 2).tolist() == [False, True, True, True]


def test_combined_advantages() -> None:
    reward, cost = rows([1.0, 2.0], [1.0, 2.0]), rows([4.0, -6.0], [4.0, -6.0])
    both = combined_advantages(reward, cost, torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(both, rows([1.0, 2.0], [(1 - 12) / 4, (2 + 18) / 4]))
    assert torch.equal(both[0], reward[0])  # bit by bit: lambda = 0 is PPO


@pytest.mark.parametrize(("advantage", "clipped_at"), [(2.0, 1.2), (-2.0, 0.8)])
def test_the_actor_loss_stops_pulling_beyond_the_clip(advantage: float, clipped_at: float) -> None:
    old = rows([0.0, 0.0, 0.0])
    beyond = 1.5 if advantage > 0 else 0.5
    ratio = torch.tensor([[1.0, beyond, 1 / beyond]])
    new = ratio.log().requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, clipped = clipped_actor_loss(new, old, torch.full((1, 3), advantage), mask, clip=0.2)
    # The third token moved against its advantage: nothing holds it back from coming home.
    expected = -advantage * (1.0 + clipped_at + 1 / beyond) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert clipped.tolist() == [1]
    loss.sum().backward()
    gradient = new.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, rows([-advantage / 3, 0.0, -advantage / beyond / 3]))


def test_the_actor_loss_on_policy_is_the_policy_gradient() -> None:
    old = rows([-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0])
    new = old.clone().requires_grad_()
    advantages = rows([1.0, -3.0, 2.0], [4.0, 9.0, 9.0])
    loss, clipped = clipped_actor_loss(new, old, advantages, MASK, clip=0.2)
    loss.mean().backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -rows([1 / 6, -3 / 6, 2 / 6], [4 / 2, 0, 0]))
    assert clipped.tolist() == [0, 0]


def test_the_critic_loss_by_hand() -> None:
    values = rows([1.0, 9.0, 0.0]).requires_grad_()
    old, returns = rows([0.0, 0.0, 0.0]), rows([2.0, 10.0, 100.0])
    mask = torch.tensor([[1, 1, 0]]).bool()
    loss = clipped_critic_loss(values, old, returns, mask, clip=5.0)
    assert loss.item() == pytest.approx(0.5 * (1 + 25) / 2)  # the second: max((9 - 10)^2, (5 - 10)^2)
    loss.sum().backward()
    assert values.grad is not None
    # Value 1 is pulled up to 2; value 9 has moved 9 from where it was, further than it may: no gradient.
    torch.testing.assert_close(values.grad, rows([-0.5, 0.0, 0.0]))
