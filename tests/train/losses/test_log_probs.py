import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def test_kl_by_hand() -> None:
    """pi = (1/2, 1/4, 1/4), pi_ref = (1/4, 1/4, 1/2), given as logits through an identity head."""
    policy = torch.log(torch.tensor([[2.0, 1.0, 1.0]])).requires_grad_()
    reference = torch.log(torch.tensor([[1.0, 1.0, 2.0]]))
    forward = token_kl(policy, reference, torch.eye(3), None, estimator="forward")
    torch.testing.assert_close(forward, torch.tensor([math.log(2) / 4]))  # 1/2 ln 2 + 0 - 1/4 ln 2
    # d KL / d z = pi (ln pi / pi_ref - KL)
    (gradient,) = torch.autograd.grad(forward, policy)
    torch.testing.assert_close(gradient, math.log(2) * torch.tensor([[3 / 8, -1 / 16, -5 / 16]]))
    uneven = torch.log(torch.tensor([[2.0, 1.0, 5.0]])).requires_grad_()  # (1/4, 1/8, 5/8)
    reverse = token_kl(uneven, reference, torch.eye(3), None, estimator="reverse")
    by_hand = 0.25 * math.log(1) + 0.25 * math.log(2) + 0.5 * math.log(4 / 5)
    torch.testing.assert_close(reverse, torch.tensor([by_hand]))
    (gradient,) = torch.autograd.grad(reverse, uneven)  # pi - pi_ref
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -1 / 8, 1 / 8]]))


class Memory(TorchDispatchMode):
    """Follows every tensor that is made: the largest one, and how much was alive at once, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.dtype.is_floating_point:
                storage = made.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes() // made.element_size()
                self.largest = max(self.largest, self._alive[StorageWeakRef(storage)])
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


@pytest.mark.parametrize("what", ["log_probs", "forward", "reverse"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_logits_of_a_chunk_are_the_most_that_is_held(trained: bool, what: str) -> None:
    """Forward and backward; with four times the tokens no more is held at once than their hidden states are larger."""
    chunk, vocabulary, width = 16, 4000, 8
    weight = tensor(vocabulary, width, seed=2, grad=trained)

    def used(num_tokens: int) -> Memory:
        hidden, ref_hidden = (tensor(num_tokens, width, seed=seed, grad=True) for seed in (1, 4))
        with Memory() as memory:
            if what == "log_probs":
                targets = torch.zeros(num_tokens, dtype=torch.int64)
                value = selected_log_probs(hidden, weight, None, targets, chunk=chunk)
            else:
                value = token_kl(hidden, ref_hidden, weight, None, estimator=what, chunk=chunk)
            value.sum().backward()
        return memory

    few, many = used(128), used(512)
    assert few.largest == many.largest == chunk * vocabulary
    assert many.peak < 10 * chunk * vocabulary < 512 * vocabulary / 3
    assert many.peak - few.peak < 10 * (512 - 128) * width


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


class Freed:
    """A head as ZeRO-3 keeps it: whole inside `gathered`, without memory behind it."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.whole, self.times = tensors, [t.data for t in tensors], 0
        self._free()

    def _free(self) -> None:
        for tensor in self.tensors:
            tensor.data = torch.empty(0)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        self.times += 1
        for tensor, whole in zip(self.tensors, self.whole, strict=True):
            tensor.data = whole
        yield
        self._free()


@pytest.mark.parametrize("loss", ["log_probs", "forward", "reverse"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_a_head_in_shards_is_gathered_for_the_backward_pass(trained: bool, loss: str) -> None:
    def made() -> tuple[Tensor, ...]:
        hidden, weight = (
            tensor(NUM_TOKENS, HIDDEN, seed=1, grad=True),
            tensor(VOCABULARY, HIDDEN, seed=2, grad=trained),
        )
        return hidden, tensor(NUM_TOKENS, HIDDEN, seed=4), weight, tensor(VOCABULARY, HIDDEN, seed=5)

    def value(
        hidden: Tensor, ref_hidden: Tensor, weight: Tensor, ref_weight: Tensor, **kwargs: Any
    ) -> Tensor:
        if loss == "log_probs":
            return selected_log_probs(hidden, weight, None, torch.arange(NUM_TOKENS), chunk=3, **kwargs)
        return token_kl(
            hidden, ref_hidden, weight, None, estimator=loss, ref_weight=ref_weight, chunk=3, **kwargs
        )

    plain, sharded = made(), made()
    expected = value(*plain)
    head = Freed(*sharded[2:])
    with head.gathered():
        found = value(*sharded, gathered=head.gathered)
    torch.testing.assert_close(found, expected)
    of = (0, 2) if trained else (0,)
    expected_gradients = gradients(expected, *(plain[i] for i in of))
    found_gradients = gradients(found, *(sharded[i] for i in of))
    for mine, theirs in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert head.times == (2 if trained else 1)  # a frozen head is not needed any more


@pytest.mark.parametrize("loss", ["log_probs", "forward"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_fp32_weights_in_bf16_autocast(trained: bool, loss: str) -> None:
    """As FSDP trains a bf16 model: products in bf16, in the backward pass too; gradients in the inputs' dtypes."""
    hidden = tensor(NUM_TOKENS, HIDDEN, seed=1, grad=True)
    weight = tensor(VOCABULARY, HIDDEN, seed=2, grad=trained)
    targets = torch.arange(NUM_TOKENS)

    def value(h: Tensor, w: Tensor) -> Tensor:
        if loss == "log_probs":
            return selected_log_probs(h, w, None, targets, chunk=3)
        return token_kl(h, tensor(NUM_TOKENS, HIDDEN, seed=4), w, None, estimator="forward", chunk=3)

    with torch.autocast("cpu", torch.bfloat16):
        found = value(hidden, weight)
    assert found.dtype == torch.float32
    of = [hidden, *([weight] if trained else [])]
    exact = [t.detach().clone().requires_grad_(t.requires_grad) for t in (hidden, weight)]
    expected = value(exact[0], exact[1])
    torch.testing.assert_close(found, expected, atol=5e-2, rtol=2e-2)
    assert not torch.equal(found, expected)  # or nothing was computed in bf16
    theirs = gradients(expected, *exact[: len(of)])
    for mine, other in zip(gradients(found, *of), theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, atol=5e-2, rtol=5e-2)
