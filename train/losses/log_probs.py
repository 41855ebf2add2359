"""Log-probabilities and KL of selected tokens through an LM head, without ever holding (N, V) logits.

Logits are made for a chunk of tokens at a time, so the peak is `chunk * V` floats whatever the batch. A frozen head
lets the gradient with respect to the hidden states be worked out in the forward pass: two matrix products a chunk. A
head that is trained has its logits made once more in the backward pass, and its weights gathered once more where an
engine keeps them in shards.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 256
"""Tokens a chunk: 256 x 49,152 fp32 logits are 48 MiB."""

Gathered = Callable[[], AbstractContextManager[Any]]
"""Inside, the head's weights are whole (ZeRO-3 frees them behind every use)."""
PerToken = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor]]
"""(tokens, their logits (n, V) fp32, whether a gradient is wanted) -> (values (n,), d values / d logits (n, V) or
anything); may overwrite the logits."""


def selected_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
    gathered: Gathered = nullcontext,
) -> Tensor:
    """Log-probability of each target token, in fp32 whatever the model's dtype.

    hidden (N, H) are the states that predict the targets, weight (V, H) and bias (V,) the LM head, targets (N,)
    int64. logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap). gathered: for the backward pass; the
    call itself wants a whole head. Returns (N,), fp32, <= 0.
    """

    def log_probs(tokens: slice, z: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        target = targets[tokens]
        log_z = z.logsumexp(-1)
        value = z.gather(-1, target[:, None]).squeeze(-1) - log_z
        if not wanted:
            return value, value
        grad = z.sub_(log_z[:, None]).exp_().neg_()  # d log p_t / d z_v = 1[v = t] - p_v
        grad[torch.arange(len(target), device=grad.device), target] += 1.0
        return value, grad

    return _ThroughHead.apply(hidden, weight, bias, log_probs, scale, softcap, chunk, gathered)


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
    gathered: Gathered = nullcontext,
) -> Tensor:
    """KL between policy and reference at each position, exact over the vocabulary, in fp32.

    hidden and ref_hidden (N, H). `forward` is KL(pi || pi_ref) = sum_v pi (log pi - log pi_ref); `reverse` is
    KL(pi_ref || pi). The reference never receives a gradient. gathered: of both heads, for the backward pass. Returns
    (N,), fp32, >= 0 up to rounding.
    """
    head = weight if ref_weight is None else ref_weight

    def kl(tokens: slice, z: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        log_p = z.log_softmax(-1)
        log_q = _logits(ref_hidden[tokens], head, bias, scale, softcap).log_softmax(-1)
        if estimator == "forward":
            value = (log_p.exp() * (log_p - log_q)).sum(-1)
            # d KL(p||q) / d z_v = p_v (log p_v - log q_v - KL)
            return value, log_p.exp() * (log_p - log_q - value[:, None]) if wanted else value
        value = (log_q.exp() * (log_q - log_p)).sum(-1)
        return value, log_p.exp() - log_q.exp() if wanted else value  # d KL(q||p) / d z_v = p_v - q_v

    return _ThroughHead.apply(hidden, weight, bias, kl, scale, softcap, chunk, gathered)


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
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.float32)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """(n, V) in fp32; the product itself runs in the weights' dtype, as the model's own head does."""
    z = F.linear(hidden.to(weight.dtype), weight, bias).float()
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


class _ThroughHead(torch.autograd.Function):
    """Values of tokens that follow from their logits, `chunk` tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: PerToken,
        scale: float,
        softcap: float | None,
        chunk: int,
        gathered: Gathered,
    ) -> Tensor:
        ctx.trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        in_forward = ctx.needs_input_grad[0] and not ctx.trained
        values = hidden.new_empty(len(hidden), dtype=torch.float32)
        ctx.gradient = torch.empty_like(hidden) if in_forward else None
        for tokens in _chunks(len(hidden), chunk):
            z = _logits(hidden[tokens], weight, bias, scale, softcap)
            before = z.clone() if in_forward and softcap is not None else z
            values[tokens], grad = function(tokens, z, in_forward)
            if in_forward:
                grad = _through(grad, before, scale, softcap, weight.dtype) @ weight
                ctx.gradient[tokens] = grad.to(hidden.dtype)
        if ctx.trained:
            ctx.save_for_backward(hidden)
            # The parameters themselves: an engine may free their memory until then.
            ctx.head, ctx.settings = (weight, bias), (function, scale, softcap, chunk, gathered)
            kind = hidden.device.type
            ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trained:
            return (ctx.gradient * grad_values[:, None].to(ctx.gradient.dtype), *(None,) * 7)
        (hidden,), (weight, bias) = ctx.saved_tensors, ctx.head
        function, scale, softcap, chunk, gathered = ctx.settings
        grad_hidden = torch.empty_like(hidden)
        with gathered(), torch.autocast(*ctx.autocast):  # the same logits as in the forward pass
            grad_weight = torch.zeros_like(weight)
            grad_bias = torch.zeros_like(bias) if bias is not None else None
            for tokens in _chunks(len(hidden), chunk):
                z = _logits(hidden[tokens], weight, bias, scale, softcap)
                before = z.clone() if softcap is not None else z
                _, grad = function(tokens, z, True)
                grad = _through(grad * grad_values[tokens, None], before, scale, softcap, weight.dtype)
                grad_hidden[tokens] = (grad @ weight).to(hidden.dtype)
                grad_weight.addmm_(grad.T, hidden[tokens].to(weight.dtype))
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        return (grad_hidden, grad_weight, grad_bias, *(None,) * 5)


def _chunks(num_tokens: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, num_tokens, chunk)]


def _through(grad: Tensor, z: Tensor, scale: float, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """d/d (hidden @ weight.T + bias) (n, V) in the weights' dtype, from d/d logits (n, V) at the logits z."""
    if softcap is not None:
        grad = grad * (1 - (z / softcap) ** 2)
    return (grad * scale if scale != 1.0 else grad).to(dtype)
