"""The DPO family on sequence log-probabilities. Pure functions; every loss is per pair, (B,), before reduction.

Notation: h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]. `beta` is a float or (B,)
(a category multiplier gives every pair its own); `margin` is delta_c, (B,) or 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Sequence log-probabilities of a batch of pairs, summed over completion tokens, fp32, all (B,)."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    """Completion tokens, end-of-turn tokens included."""
    rejected_lengths: Tensor
    safety_offset: Tensor | float = 0.0
    """SafeDPO's (u_l - u_w) Delta, with u = 1 for an unsafe answer, in units of beta * h."""

    @property
    def chosen_log_ratio(self) -> Tensor:
        """log pi(y_w|x) - log pi_ref(y_w|x), (B,)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_log_ratio(self) -> Tensor:
        """log pi(y_l|x) - log pi_ref(y_l|x), (B,)."""
        return self.rejected - self.ref_rejected

    @property
    def h(self) -> Tensor:
        """The difference of log-ratios, (B,), nats."""
        return self.chosen_log_ratio - self.rejected_log_ratio

    def per_token(self) -> "PairLogps":
        """The same with every sum divided by its completion's tokens."""
        chosen, rejected = self.chosen_lengths.clamp(min=1), self.rejected_lengths.clamp(min=1)
        return PairLogps(
            self.chosen / chosen,
            self.rejected / rejected,
            self.ref_chosen / chosen,
            self.ref_rejected / rejected,
            self.chosen_lengths,
            self.rejected_lengths,
            self.safety_offset,
        )


Beta = float | Tensor


def sigmoid_loss(logps: PairLogps, beta: Beta, margin: Beta, label_smoothing: float) -> Tensor:
    """-log sigmoid(beta h - delta). DPO, Rafailov et al. 2305.18290, eq. 7; the margin is Cat-DPO's."""
    return -F.logsigmoid(beta * logps.h - margin)


def safedpo_loss(logps: PairLogps, beta: Beta, margin: Beta, label_smoothing: float) -> Tensor:
    """-log sigmoid(beta h - delta - (u_l - u_w) Delta), u = 1 for unsafe: safe has to beat unsafe by Delta; 0 is DPO.

    The pairs have to be in SafeDPO's order (`safety_order.py`), in which u_w = 0. SafeDPO, Kim et al. 2505.20065, the
    objective with the offset Delta; the paper publishes 10.
    """
    return -F.logsigmoid(beta * logps.h - margin - logps.safety_offset)


def robust_loss(logps: PairLogps, beta: Beta, margin: Beta, label_smoothing: float) -> Tensor:
    """Unbiased under label flips with probability eps. Chowdhury et al. 2403.00409, eq. 12."""
    z, eps = beta * logps.h - margin, label_smoothing
    return (-(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)


def hinge_loss(logps: PairLogps, beta: Beta, margin: Beta, label_smoothing: float) -> Tensor:
    """max(0, 1 + delta - beta h). SLiC, Zhao et al. 2305.10425, on the DPO log-ratios."""
    return torch.relu(1 - (beta * logps.h - margin))


def ipo_loss(logps: PairLogps, beta: Beta, margin: Beta, label_smoothing: float) -> Tensor:
    """(h / length - 1 / (2 beta))^2. IPO, Azar et al. 2310.12036, eq. 17, per token as its authors evaluate it."""
    return (logps.per_token().h - 1 / (2 * beta)) ** 2


def apo_zero_loss(logps: PairLogps, beta: Beta, margin: Beta, label_smoothing: float) -> Tensor:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l). APO-zero, D'Oosterlinck et al. 2408.06266, eq. 7."""
    return 1 - torch.sigmoid(beta * logps.chosen_log_ratio) + torch.sigmoid(beta * logps.rejected_log_ratio)


PREFERENCE_LOSSES: dict[str, Callable[[PairLogps, Beta, Beta, float], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "apo_zero": apo_zero_loss,
    "safedpo": safedpo_loss,
}

MARGIN_LOSSES = ("sigmoid", "hinge", "robust", "safedpo")
"""Losses of beta*h alone, where subtracting a category margin has a meaning."""


def preference_loss(
    name: str,
    logps: PairLogps,
    beta: Beta,
    *,
    margin: Beta = 0.0,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
) -> Tensor:
    """Loss of each pair, (B,), >= 0 but for `robust`; gradient descent raises h.

    length_normalised divides every log-probability by its completion's tokens first (TRL's `sigmoid_norm`); ipo
    always does. Raises KeyError for an unknown name (recipes are checked before).
    """
    if length_normalised and name != "ipo":
        logps = logps.per_token()
    return PREFERENCE_LOSSES[name](logps, beta, margin, label_smoothing)


def mixed_loss(
    weights: Mapping[str, float],
    logps: PairLogps,
    beta: Beta,
    *,
    margin: Beta = 0.0,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
) -> Tensor:
    """Sum over losses of weight times loss for each pair, (B,): TRL's `loss_type` list with its `loss_weights`.

    The margin reaches the losses that have one, label smoothing `robust`; see `preference_loss`.
    """
    total = torch.zeros_like(logps.chosen)
    for name, weight in weights.items():
        loss = preference_loss(
            name,
            logps,
            beta,
            margin=margin,
            label_smoothing=label_smoothing,
            length_normalised=length_normalised,
        )
        total = total + weight * loss
    return total


def sft_loss(logps: PairLogps, num_tokens: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the chosen answers over `num_tokens`, scalar; None: over their own, TRL's `sft` term.

    num_tokens: those of all the batches that a step adds up, so that it is a mean a token whatever they are cut into.
    """
    tokens = logps.chosen_lengths.sum() if num_tokens is None else num_tokens
    return -logps.chosen.sum() / tokens.clamp(min=1)
