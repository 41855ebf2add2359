import math

import pytest
import torch

from equipoise.train.losses.kto import advantage, balancing_weight, kto_loss, reference_point


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_values_by_hand() -> None:
    log_ratio = torch.tensor([2.0, -1.0, 3.0, -0.5])
    desirable = torch.tensor([True, True, False, False])
    loss = kto_loss(
        log_ratio, desirable, torch.tensor(0.5), 0.2, desirable_weight=1.5, undesirable_weight=0.5
    )
    expected = [
        1.5 * (1 - sigmoid(0.2 * (2.0 - 0.5))),
        1.5 * (1 - sigmoid(0.2 * (-1.0 - 0.5))),
        0.5 * (1 - sigmoid(0.2 * (0.5 - 3.0))),
        0.5 * (1 - sigmoid(0.2 * (0.5 + 0.5))),
    ]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)
    assert advantage(log_ratio, desirable, torch.tensor(0.5)).tolist() == [1.5, -1.5, -2.5, 1.0]


def test_gradient_raises_the_desirable_and_lowers_the_undesirable() -> None:
    log_ratio = torch.tensor([0.3, 0.3, 40.0, -40.0], requires_grad=True)
    z_ref = torch.tensor(0.1, requires_grad=True)
    loss = kto_loss(log_ratio, torch.tensor([True, False, True, True]), z_ref.detach(), 0.5)
    loss.sum().backward()
    assert log_ratio.grad is not None
    slope = 0.5 * sigmoid(0.5 * 0.2) * (1 - sigmoid(0.5 * 0.2))
    assert log_ratio.grad[:2].tolist() == pytest.approx([-slope, slope], abs=1e-6)
    assert log_ratio.grad[2:].abs().max() < 1e-8  # far from the reference point on either side nothing pulls


def test_limits() -> None:
    far = torch.tensor([1e4, -1e4, 1e4, -1e4])
    desirable = torch.tensor([True, True, False, False])
    loss = kto_loss(far, desirable, torch.tensor(0.0), 0.1, desirable_weight=2.0, undesirable_weight=3.0)
    assert loss.tolist() == [0.0, 2.0, 3.0, 0.0]
    at_start = kto_loss(torch.zeros(4), desirable, torch.tensor(0.0), 0.1)
    assert at_start.tolist() == [0.5] * 4


def test_a_beta_for_each_example_is_that_beta() -> None:
    log_ratio, desirable = torch.tensor([1.0, -2.0]), torch.tensor([True, False])
    both = kto_loss(log_ratio, desirable, torch.tensor(0.2), torch.tensor([0.1, 0.4]))
    for i, beta in enumerate((0.1, 0.4)):
        alone = kto_loss(log_ratio[i : i + 1], desirable[i : i + 1], torch.tensor(0.2), beta)
        torch.testing.assert_close(both[i : i + 1], alone)


def test_the_reference_point_is_a_mean_never_negative_and_without_gradient() -> None:
    total = torch.tensor(6.0, requires_grad=True)
    assert reference_point(total, torch.tensor(4.0)).item() == 1.5
    assert not reference_point(total, torch.tensor(4.0)).requires_grad
    assert reference_point(torch.tensor(-6.0), torch.tensor(4.0)).item() == 0


def test_the_balancing_weight_makes_both_sides_count_the_same() -> None:
    assert balancing_weight(30, 10, 2.0) * 10 == 2.0 * 30
    assert balancing_weight(0, 10, 2.0) == balancing_weight(10, 0, 2.0) == 2.0
