"""Log-probabilities and KL of selected tokens through a frozen LM head, without ever holding (N, V) logits.

A frozen head lets the gradient with respect to the hidden states be worked out in the forward pass, one chunk
of tokens at a time: two matrix products a chunk instead of three, and a peak of `chunk * V` floats whatever the
batch. A head that is trained itself takes autograd with recomputation instead.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256
"""Tokens a chunk: 256 x 49,152 fp32 logits are 48 MiB."""


def selected_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Log-probability of each target token, in fp32 whatever the model's dtype.

    hidden (N, H) are the states that predict the targets, weight (V, H) and bias (V,) the LM head, targets (N,)
    int64. logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap). Returns (N,), fp32, <= 0.
    """
    if _needs_autograd_through_head(weight, bias):
        parts = [
            checkpoint(_log_probs, h, weight, bias, t, scale, softcap, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.cat(parts) if parts else _no_tokens(hidden)
    return _FrozenHeadLogProbs.apply(hidden, weight, bias, targets, scale, softcap, chunk)


def token_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    estimator: str,
    ref_weight: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """KL between policy and reference at each position, exact over the vocabulary, in fp32.

    hidden and ref_hidden (N, H). `forward` is KL(pi || pi_ref) = sum_v pi (log pi - log pi_ref); `reverse` is
    KL(pi_ref || pi). The reference never receives a gradient. Returns (N,), fp32, >= 0 up to rounding.
    """
    ref_weight = weight if ref_weight is None else ref_weight
    ref_hidden = ref_hidden.detach()
    if _needs_autograd_through_head(weight, bias):
        parts = [
            checkpoint(_kl, h, r, weight, bias, ref_weight, scale, softcap, estimator, use_reentrant=False)
            for h, r in zip(hidden.split(chunk), ref_hidden.split(chunk), strict=True)
        ]
        return torch.cat(parts) if parts else _no_tokens(hidden)
    return _FrozenHeadKL.apply(hidden, ref_hidden, weight, bias, ref_weight, scale, softcap, estimator, chunk)


@torch.no_grad()
def token_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Entropy -sum_v pi log pi of the next token at each position, nats: hidden (N, H) -> (N,) fp32, no gradient."""
    parts = []
    for h in hidden.split(chunk):
        log_p = _logits(h, weight, bias, scale, softcap).log_softmax(-1)
        parts.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(parts) if parts else _no_tokens(hidden)


def _no_tokens(hidden: Tensor) -> Tensor:
    """An empty result that still hangs on the graph, so that a rank without tokens can call backward."""
    return hidden.sum(-1).float()


def _needs_autograd_through_head(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """(n, V) in fp32; the product itself runs in the weights' dtype, as the model's own head does."""
    z = F.linear(hidden.to(weight.dtype), weight, bias).float()
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float | None
) -> Tensor:
    z = _logits(hidden, weight, bias, scale, softcap)
    return z.gather(-1, targets[:, None]).squeeze(-1) - z.logsumexp(-1)


def _kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_weight: Tensor,
    scale: float,
    softcap: float | None,
    estimator: str,
) -> Tensor:
    log_p = _logits(hidden, weight, bias, scale, softcap).log_softmax(-1)
    with torch.no_grad():
        log_q = _logits(ref_hidden, ref_weight, bias, scale, softcap).log_softmax(-1)
    if estimator == "forward":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _per_token_gradient(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], hidden: Tensor, wanted: bool, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Run `function(slice) -> (values (n,), d values / d hidden (n, H))` chunk by chunk."""
    num_tokens = hidden.shape[0]
    values = hidden.new_empty(num_tokens, dtype=torch.float32)
    gradient = torch.empty_like(hidden) if wanted else None
    for start in range(0, num_tokens, chunk):
        part = torch.arange(start, min(start + chunk, num_tokens), device=hidden.device)
        value, grad = function(part)
        values[part] = value
        if gradient is not None:
            gradient[part] = grad.to(gradient.dtype)
    return values, gradient


def _through_head(
    grad_logits: Tensor, z: Tensor, weight: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """d/d hidden (n, H) from d/d logits (n, V)."""
    if softcap is not None:
        grad_logits = grad_logits * (1 - (z / softcap) ** 2)
    return F.linear(grad_logits.to(weight.dtype), weight.T).float() * scale


class _FrozenHeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]

        def part(index: Tensor) -> tuple[Tensor, Tensor]:
            z = _logits(hidden[index], weight, bias, scale, softcap)
            target = targets[index]
            log_z = z.logsumexp(-1)
            value = z.gather(-1, target[:, None]).squeeze(-1) - log_z
            if not wanted:
                return value, value
            # d log p_t / d z_v = 1[v = t] - p_v
            grad = (
                torch.exp(z - log_z[:, None]).neg_()
                if softcap is not None
                else z.sub_(log_z[:, None]).exp_().neg_()
            )
            grad[torch.arange(len(target), device=grad.device), target] += 1.0
            return value, _through_head(grad, z, weight, scale, softcap)

        values, ctx.gradient = _per_token_gradient(part, hidden, wanted, chunk)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden = ctx.gradient * grads[0][:, None].to(ctx.gradient.dtype)
        return grad_hidden, None, None, None, None, None, None


class _FrozenHeadKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        ref_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_weight: Tensor,
        scale: float,
        softcap: float | None,
        estimator: str,
        chunk: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]

        def part(index: Tensor) -> tuple[Tensor, Tensor]:
            z = _logits(hidden[index], weight, bias, scale, softcap)
            log_p = z.log_softmax(-1)
            log_q = _logits(ref_hidden[index], ref_weight, bias, scale, softcap).log_softmax(-1)
            if estimator == "forward":
                value = (log_p.exp() * (log_p - log_q)).sum(-1)
                # d KL(p||q) / d z_v = p_v (log p_v - log q_v - KL)
                grad = log_p.exp() * (log_p - log_q - value[:, None]) if wanted else value
            else:
                value = (log_q.exp() * (log_q - log_p)).sum(-1)
                # d KL(q||p) / d z_v = p_v - q_v
                grad = log_p.exp() - log_q.exp() if wanted else value
            return value, _through_head(grad, z, weight, scale, softcap) if wanted else value

        values, ctx.gradient = _per_token_gradient(part, hidden, wanted, chunk)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden = ctx.gradient * grads[0][:, None].to(ctx.gradient.dtype)
        return grad_hidden, None, None, None, None, None, None, None, None
