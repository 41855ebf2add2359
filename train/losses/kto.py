"""KTO on single answers. Pure functions; the loss is per example, (B,), before reduction.

Notation: r = log pi(y|x) - log pi_ref(y|x), summed over the answer's tokens, nats; z_ref is the reference point, an
estimate of KL(pi || pi_ref). Ethayarajh et al. 2402.01306, section 4.1.
"""

import torch
from torch import Tensor


def reference_point(mismatched_sum: Tensor, num: Tensor) -> Tensor:
    """z_ref = max(0, 1/n sum log pi(y'|x) - log pi_ref(y'|x)), y' an answer to another prompt; scalar, no gradient.

    mismatched_sum, num: sum and number of the mismatched log-ratios of all ranks' microbatch, scalars. The paper's
    estimate of the KL divergence, biased but cheap; below 0 no KL can be, hence the clamp.
    """
    return (mismatched_sum.detach() / num).clamp(min=0)


def advantage(log_ratio: Tensor, desirable: Tensor, z_ref: Tensor) -> Tensor:
    """How far each answer is on its right side of the reference point, (B,), nats: r - z_ref, or z_ref - r.

    desirable (B,) bool: the answer should be more probable than the reference point, else less.
    """
    return torch.where(desirable, log_ratio - z_ref, z_ref - log_ratio)


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    z_ref: Tensor,
    beta: float | Tensor,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """lambda_y - v(x, y), (B,), in [0, lambda_y]; 2402.01306, eq. 7 (as TRL counts).

    v = lambda_D sigmoid(beta (r - z_ref)) for a desirable answer, lambda_U sigmoid(beta (z_ref - r)) for another.
    log_ratio (B,); desirable (B,) bool; beta a number or (B,). Gradient descent raises r of a desirable answer and
    lowers that of an undesirable one, least for those far from the reference point on either side.
    """
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-beta * advantage(log_ratio, desirable, z_ref))


def balancing_weight(num_desirable: int, num_undesirable: int, desirable_weight: float) -> float:
    """lambda_U with lambda_D n_D = lambda_U n_U, so that both sides count the same; lambda_D where one is absent.

    The lower end of the range of 2402.01306, eq. 8, and what SACPO's published code trains with.
    """
    if not num_desirable or not num_undesirable:
        return desirable_weight
    return desirable_weight * num_desirable / num_undesirable
