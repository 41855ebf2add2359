"""Several rewards a sampled answer, each compared within its group: from (n, K) rewards to (n,) advantages."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.train.losses.ppo import combined_advantages, flat_groups, grpo_advantages

EPSILON = 1e-4
"""Under the batch's standard deviation, as TRL has it."""


@dataclass(frozen=True)
class GroupAdvantages:
    """What is learned from, and which answers say nothing."""

    advantages: Tensor
    """(n,) fp32."""
    flat: Tensor
    """(n,) bool: the answer's group is alike in every reward (or has no two that count), so it teaches nothing."""


def group_advantages(
    rewards: Tensor,
    weights: Tensor,
    num_generations: int,
    cost: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> GroupAdvantages:
    """Every reward normalised within its group by itself, then added by weight, then scaled over the batch.

        a_k = (r_k - mean) / std over the group          s = sum_k w_k a_k
        with a cost: s <- (s - lambda a_C) / (1 + lambda)        A = (s - mean) / (std + eps) over the batch

    rewards (n, K), weights (K,), cost (n,) or None, multiplier (n,) >= 0: each answer's lambda; nan means that a reward
    does not apply to an answer, or could not be had: it neither counts in the group's mean nor moves the answer. Groups
    are `num_generations` rows behind one another. Equal rewards give exactly 0, not the rounding of their mean.
    lambda stands outside the normalisation, which would take a factor out again. Source: GDPO 2601.05242, its
    group-wise and then batch-wise normalisation (TRL: `multi_objective_aggregation="normalize_then_sum"`); the cost as
    in Safe RLHF 2310.12773, appendix B.
    """
    columns = list(rewards.unbind(1))
    parts = [normalised(column, num_generations) for column in columns]
    total = torch.zeros_like(rewards[:, 0]) if parts else torch.zeros_like(cost)  # type: ignore[arg-type]
    for weight, part in zip(weights, parts, strict=True):
        total = total + weight * part
    if cost is not None:
        assert multiplier is not None
        columns.append(cost)
        total = combined_advantages(
            total[:, None], normalised(cost, num_generations)[:, None], multiplier.to(total)
        )[:, 0]
    flat = torch.stack([flat_groups(c, c.isfinite(), num_generations) for c in columns]).all(0)
    advantages = (total - total.mean()) / (total.std() + EPSILON)
    flat = flat.repeat_interleave(num_generations)
    return GroupAdvantages(torch.where(flat, torch.zeros_like(advantages), advantages), flat)


def normalised(values: Tensor, num_generations: int) -> Tensor:
    """(x - mean) / std within each group, (n,) fp32; 0 where the value is nan, alone, or the same as all others."""
    return grpo_advantages(values, values.isfinite(), num_generations)
