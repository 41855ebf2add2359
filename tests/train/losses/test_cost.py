import math

import pytest
import torch
from torch import Tensor

from equipoise.train.losses.cost import cost_loss, reward_loss

UNSAFE, SAFE = torch.tensor([1.0]), torch.tensor([-1.0])


def value(x: float) -> Tensor:
    return torch.tensor([x], requires_grad=True)


def softplus(x: float) -> float:
    """-log sigmoid(-x), by another route than the code's."""
    return math.log(1 + math.exp(x))


def test_reward_loss_by_hand() -> None:
    # -log sigmoid(2 - 0.5) + 0.001 (4 + 0.25)
    assert reward_loss(value(2.0), value(0.5)).item() == pytest.approx(softplus(-1.5) + 0.00425, rel=1e-6)
    assert reward_loss(value(0.5), value(2.0), regularization=0.0).item() == pytest.approx(
        softplus(1.5), rel=1e-6
    )


def test_reward_loss_raises_the_better_answer() -> None:
    better, worse = value(0.3), value(0.3)
    reward_loss(better, worse, regularization=0.0).backward()
    assert better.grad is not None
    assert worse.grad is not None
    assert better.grad.item() == pytest.approx(-0.5)  # -sigmoid(R_l - R_w)
    assert worse.grad.item() == pytest.approx(0.5)


def test_reward_loss_does_not_see_the_offset_but_for_the_penalty() -> None:
    scores, offset = (value(1.0), value(-1.0)), 7.0
    shifted = [score + offset for score in scores]
    assert torch.equal(reward_loss(*scores, regularization=0.0), reward_loss(*shifted, regularization=0.0))
    assert reward_loss(*shifted) > reward_loss(*scores)


def test_cost_loss_by_hand() -> None:
    # C_u = 1.5 (unsafe), C_s = -0.5 (safe): -log sigmoid(2) - log sigmoid(1.5) - log sigmoid(0.5) + 0.001 (2.25 + 0.25)
    expected = softplus(-2.0) + softplus(-1.5) + softplus(-0.5) + 0.0025
    assert cost_loss(value(1.5), value(-0.5), UNSAFE, SAFE).item() == pytest.approx(expected, rel=1e-6)
    # Both safe: the unsafer one is still the costlier, but its cost should be below 0.
    expected = softplus(-2.0) + softplus(1.5) + softplus(-0.5) + 0.0025
    assert cost_loss(value(1.5), value(-0.5), SAFE, SAFE).item() == pytest.approx(expected, rel=1e-6)


def test_cost_loss_raises_the_unsafe_and_lowers_the_safe_answer() -> None:
    unsafer, safer = value(0.0), value(0.0)
    cost_loss(unsafer, safer, UNSAFE, SAFE).backward()
    assert unsafer.grad is not None
    assert safer.grad is not None
    assert unsafer.grad.item() == pytest.approx(-1.0)  # -sigmoid(0) of the order, -sigmoid(0) of the sign
    assert safer.grad.item() == pytest.approx(1.0)


def test_of_two_unsafe_answers_the_safer_is_pulled_both_ways() -> None:
    unsafer, safer = value(0.0), value(0.0)
    cost_loss(unsafer, safer, UNSAFE, UNSAFE).backward()
    assert unsafer.grad is not None
    assert safer.grad is not None
    assert unsafer.grad.item() == pytest.approx(-1.0)
    assert safer.grad.item() == pytest.approx(0.0)


def test_scores_of_zero_and_far_scores() -> None:
    zero = torch.zeros(1)
    assert reward_loss(zero, zero).item() == pytest.approx(math.log(2))
    assert cost_loss(zero, zero, UNSAFE, SAFE).item() == pytest.approx(3 * math.log(2))
    far = torch.tensor([200.0])
    assert reward_loss(far, -far, regularization=0.0).item() == 0.0
    assert cost_loss(far, -far, UNSAFE, SAFE, regularization=0.0).item() == 0.0
    assert reward_loss(-far, far, regularization=0.0).item() == pytest.approx(400.0)  # no overflow
    assert cost_loss(-far, far, UNSAFE, SAFE, regularization=0.0).item() == pytest.approx(800.0)


def test_a_pair_without_order_has_its_sign_terms_alone() -> None:
    unsafer, safer = torch.tensor([1.0, 1.0]), torch.tensor([-2.0, -2.0])
    signs = SAFE.expand(2)
    loss = cost_loss(unsafer, safer, signs, signs, ordered=torch.tensor([1.0, 0.0]), regularization=0.0)
    assert loss[1].item() == pytest.approx(softplus(1.0) + softplus(-2.0), rel=1e-6)
    assert (loss[0] - loss[1]).item() == pytest.approx(softplus(-3.0), rel=1e-5)


def test_losses_are_per_pair() -> None:
    scores = torch.arange(3.0)
    assert reward_loss(scores, scores).shape == (3,)
    assert cost_loss(scores, scores, UNSAFE.expand(3), SAFE.expand(3)).shape == (3,)
