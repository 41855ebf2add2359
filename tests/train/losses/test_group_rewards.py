import pytest
import torch

from equipoise.train.losses.group_rewards import group_advantages, normalised

NAN = float("nan")


def test_every_reward_is_normalised_by_itself_before_they_are_added() -> None:
    # One group. Reward 1: mean 0.5, std sqrt(1/3); reward 2, on a scale of 100: mean 25, std 50.
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 100.0]])
    root = 0.5 / (1 / 3) ** 0.5
    a1 = torch.tensor([root, root, -root, -root])
    a2 = torch.tensor([-0.5, -0.5, -0.5, 1.5])
    total = a1 + 2 * a2
    expected = (total - total.mean()) / (total.std() + 1e-4)
    found = group_advantages(rewards, torch.tensor([1.0, 2.0]), 4)
    assert torch.allclose(found.advantages, expected, atol=1e-5)
    assert not found.flat.any()


def test_equal_rewards_teach_exactly_nothing() -> None:
    # -1/3 has no exact mean in fp32: what is left by rounding would be scaled up to the size of a real advantage.
    rewards = torch.tensor([-1 / 3] * 7 + [0.1] * 7)[:, None]
    found = group_advantages(rewards, torch.tensor([1.0]), 7)
    assert found.advantages.tolist() == [0.0] * 14
    assert found.flat.all()


def test_a_flat_group_leaves_the_others_alone_and_gets_zero() -> None:
    rewards = torch.tensor([1.0, 0.0, 2.0, 2.0])[:, None]
    found = group_advantages(rewards, torch.tensor([1.0]), 2)
    assert found.flat.tolist() == [False, False, True, True]
    assert found.advantages[2:].tolist() == [0.0, 0.0]
    assert found.advantages[0] == -found.advantages[1] > 0


def test_a_reward_that_is_missing_neither_counts_nor_moves() -> None:
    assert normalised(torch.tensor([1.0, NAN, 0.0]), 3).tolist() == pytest.approx(
        [0.5**0.5, 0.0, -(0.5**0.5)]
    )
    rewards = torch.tensor([[1.0], [NAN], [NAN], [NAN]])
    found = group_advantages(rewards, torch.tensor([1.0]), 2)  # one alone, and none: nothing to compare with
    assert found.advantages.tolist() == [0.0] * 4
    assert found.flat.all()


def test_lambda_weighs_the_cost_after_it_is_normalised() -> None:
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
    cost = torch.tensor([5.0, -5.0, 5.0, -5.0])  # what is rewarded costs
    free, dear = torch.zeros(4), torch.full((4,), 3.0)
    weights = torch.tensor([1.0])
    without = group_advantages(reward, weights, 4).advantages
    assert torch.allclose(group_advantages(reward, weights, 4, cost, free).advantages, without)
    found = group_advantages(reward, weights, 4, cost, dear).advantages
    assert torch.allclose(found, -without, atol=1e-3)  # (1 - 3) / 4 of it before the batch is scaled
    # One lambda a category: with lambda 1 reward and cost cancel out in the first group, not in the second.
    both = group_advantages(reward, weights, 2, cost, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert both.advantages[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert both.advantages[2] > 0 > both.advantages[3]


def test_the_cost_may_be_all_that_counts() -> None:
    cost = torch.tensor([1.0, 0.0])
    found = group_advantages(torch.empty(2, 0), torch.empty(0), 2, cost, torch.ones(2))
    assert found.advantages[0] < 0 < found.advantages[1]
