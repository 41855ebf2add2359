import math

import torch

from equipoise.train.losses.kl import k3, sequence_mean


def test_k3_in_closed_form() -> None:
    # r = log pi_ref - log pi: 0, log 2, -log 4
    value = k3(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1 + math.log(2), -1 - math.log(4)]))
    torch.testing.assert_close(value, torch.tensor([0.0, 1 - math.log(2), 0.25 + math.log(4) - 1]))


def test_k3_is_never_negative_and_pulls_toward_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = (-5 * torch.rand(1000, generator=generator)).requires_grad_()
    ref = -5 * torch.rand(1000, generator=generator)
    value = k3(log_probs, ref)
    assert bool((value >= -1e-6).all())
    value.sum().backward()
    assert log_probs.grad is not None
    # d k3 / d log pi = 1 - pi_ref / pi
    torch.testing.assert_close(log_probs.grad, 1 - torch.exp(ref - log_probs.detach()), atol=1e-4, rtol=1e-4)


def test_k3_is_unbiased_for_tokens_sampled_from_the_policy() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(6, generator=generator).log_softmax(-1)
    log_q = torch.randn(6, generator=generator).log_softmax(-1)
    expectation = (log_p.exp() * k3(log_p, log_q)).sum()
    torch.testing.assert_close(expectation, (log_p.exp() * (log_p - log_q)).sum())


def test_mean_over_each_sequence() -> None:
    per_token = torch.tensor([1.0, 2.0, 3.0, 10.0], requires_grad=True)
    mean = sequence_mean(per_token, torch.tensor([0, 0, 0, 2]), 4)
    torch.testing.assert_close(mean, torch.tensor([2.0, 0.0, 10.0, 0.0]))
    mean.sum().backward()
    torch.testing.assert_close(per_token.grad, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
