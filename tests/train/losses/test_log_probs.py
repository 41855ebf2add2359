from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equipoise.train.losses.log_probs import selected_log_probs, token_kl

NUM_TOKENS, HIDDEN, VOCABULARY = 7, 5, 11
CHUNKS = [1, 3, 7, 256]
HEADS = [
    pytest.param(1.0, None, id="plain"),
    pytest.param(0.25, None, id="scaled"),
    pytest.param(1.0, 2.0, id="softcapped"),
    pytest.param(3.0, 1.5, id="scaled and softcapped"),
]


def tensor(*shape: int, seed: int, grad: bool = False) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.requires_grad_(grad)


def full_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """The head as the models' own code has it, all logits at once."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def gradients(value: Tensor, *of: Tensor) -> list[Tensor]:
    """Of a sum that weighs every token differently, so that mixed-up tokens show."""
    weights = tensor(len(value), seed=9)
    return list(torch.autograd.grad((weights * value).sum(), of))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_log_probs_equal_those_of_all_logits(
    scale: float, softcap: float | None, trained: bool, bias: bool, chunk: int
) -> None:
    hidden = tensor(NUM_TOKENS, HIDDEN, seed=1, grad=True)
    weight = tensor(VOCABULARY, HIDDEN, seed=2, grad=trained)
    b = tensor(VOCABULARY, seed=3, grad=trained) if bias else None
    targets = torch.tensor([0, 10, 3, 3, 5, 0, 7])
    ours = selected_log_probs(hidden, weight, b, targets, scale=scale, softcap=softcap, chunk=chunk)
    plain = full_logits(hidden, weight, b, scale, softcap).log_softmax(-1)[torch.arange(NUM_TOKENS), targets]
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    of = [hidden, *([weight] if trained else []), *([b] if trained and b is not None else [])]
    for mine, theirs in zip(gradients(ours, *of), gradients(plain, *of), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("estimator", ["forward", "reverse"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_kl_equals_that_of_torch_distributions(
    scale: float, softcap: float | None, trained: bool, estimator: str, chunk: int
) -> None:
    hidden = tensor(NUM_TOKENS, HIDDEN, seed=1, grad=True)
    ref_hidden = tensor(NUM_TOKENS, HIDDEN, seed=4, grad=True)
    weight, ref_weight = tensor(VOCABULARY, HIDDEN, seed=2, grad=trained), tensor(VOCABULARY, HIDDEN, seed=5)
    bias = tensor(VOCABULARY, seed=3, grad=trained)
    ours = token_kl(
        hidden,
        ref_hidden,
        weight,
        bias,
        estimator=estimator,
        ref_weight=ref_weight,
        scale=scale,
        softcap=softcap,
        chunk=chunk,
    )
    policy = torch.distributions.Categorical(logits=full_logits(hidden, weight, bias, scale, softcap))
    reference = torch.distributions.Categorical(
        logits=full_logits(ref_hidden, ref_weight, bias, scale, softcap).detach()
    )
    pair = (policy, reference) if estimator == "forward" else (reference, policy)
    plain = torch.distributions.kl_divergence(*pair)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    of = [hidden, *([weight, bias] if trained else [])]
    for mine, theirs in zip(gradients(ours, *of), gradients(plain, *of), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("estimator", ["forward", "reverse"])
def test_the_reference_never_gets_a_gradient(estimator: str, trained: bool) -> None:
    hidden, ref_hidden = tensor(3, HIDDEN, seed=1, grad=True), tensor(3, HIDDEN, seed=4, grad=True)
    weight = tensor(VOCABULARY, HIDDEN, seed=2, grad=trained)
    ref_weight = tensor(VOCABULARY, HIDDEN, seed=5, grad=True)
    token_kl(hidden, ref_hidden, weight, None, estimator=estimator, ref_weight=ref_weight).sum().backward()
    assert hidden.grad is not None
    assert ref_hidden.grad is None
    assert ref_weight.grad is None


@pytest.mark.parametrize("estimator", ["forward", "reverse"])
def test_kl_of_equal_models_is_zero_and_so_is_its_gradient(estimator: str) -> None:
    hidden = tensor(NUM_TOKENS, HIDDEN, seed=1, grad=True)
    kl = token_kl(hidden, hidden, tensor(VOCABULARY, HIDDEN, seed=2), None, estimator=estimator)
    assert kl.abs().max() < 1e-6
    kl.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-6


Call = Callable[[Tensor, Tensor], Tensor]
CALLS: list[object] = [
    pytest.param(
        lambda h, w: selected_log_probs(h, w, None, torch.zeros(len(h), dtype=torch.int64)), id="log_probs"
    ),
    pytest.param(lambda h, w: token_kl(h, h, w, None, estimator="forward"), id="kl"),
]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_no_tokens_give_no_values_and_a_gradient_of_zero(call: Call, trained: bool) -> None:
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    value = call(hidden, tensor(VOCABULARY, HIDDEN, seed=2, grad=trained))
    assert value.shape == (0,)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_bf16_states_give_fp32_values_and_bf16_gradients(call: Call, trained: bool) -> None:
    hidden = tensor(NUM_TOKENS, HIDDEN, seed=1).bfloat16().requires_grad_()
    weight = tensor(VOCABULARY, HIDDEN, seed=2).bfloat16().requires_grad_(trained)
    value = call(hidden, weight)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_bf16_log_probs_differ_from_fp32_by_rounding_only() -> None:
    hidden, weight = tensor(200, 64, seed=1), tensor(VOCABULARY, 64, seed=2) / 8
    targets = torch.arange(200) % VOCABULARY
    exact = selected_log_probs(hidden, weight, None, targets)
    rounded = selected_log_probs(hidden.bfloat16(), weight.bfloat16(), None, targets)
    assert (exact - rounded).abs().max() < 0.05


def test_no_gradient_is_kept_where_none_is_wanted() -> None:
    with torch.no_grad():
        value = selected_log_probs(
            tensor(3, HIDDEN, seed=1), tensor(VOCABULARY, HIDDEN, seed=2), None, torch.tensor([1, 2, 3])
        )
    assert not value.requires_grad
    torch.testing.assert_close(value <= 0, torch.ones(3, dtype=torch.bool))
