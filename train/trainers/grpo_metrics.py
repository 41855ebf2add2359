"""The metrics of one step of GRPO: exact over all ranks, in all and a category."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from equipoise.train.rewards.answers import Outcome
from equipoise.train.trainers.step_table import mean_by_category

OUTCOMES = (Outcome.CORRECT, Outcome.ABSTAINED, Outcome.WRONG)
COST = "cost"
"""The reward function whose values are costs; its weight is its category's multiplier."""

ANSWER_COLUMNS = (
    "slot",
    "category",
    "outcome",
    "num_tokens",
    "truncated",
    "empty",
    "not_finite",
    "flat",
    "total",
)
"""Known of an answer once it is sampled and rewarded."""
TOKEN_COLUMNS = ("num_trained", "kl_sum", "entropy_sum", "clipped_sum")
"""Summed over the tokens of an answer that are trained on, in the forward pass of a step."""


def metrics_of(
    table: Mapping[str, Tensor],
    category_names: Sequence[str],
    reward_names: Sequence[str],
    num_generations: int,
    *,
    kl: bool,
) -> dict[str, float]:
    """A step's metrics, overall and a category, from the columns (n,) of its answers on all ranks.

    Means are over answers with a value, `num_...` are counts, and what is a token's is a sum over tokens divided by
    their number.
    kl: whether the loss has a KL term.
    """
    category, tokens = table["category"], table["num_trained"]
    metrics: dict[str, float] = {}

    def mean(name: str, values: Tensor, of: Tensor | None = None) -> None:
        """Overall and a category, over the answers `of` (default: those with a value)."""
        of = values.isfinite() if of is None else of
        if bool(of.any()):
            metrics[f"train/{name}"] = float(values[of].mean())
            metrics.update(mean_by_category(f"train/{name}", values[of], category[of], category_names))

    def total(name: str, values: Tensor) -> None:
        metrics[f"train/{name}"] = float(values.sum())
        for i, category_name in enumerate(category_names):
            if bool((category == i).any()):
                metrics[f"train/{name}/{category_name}"] = float(values[category == i].sum())

    def a_token(name: str, values: Tensor) -> None:
        groups = [("", torch.ones_like(tokens, dtype=torch.bool))]
        groups += [(f"/{c}", category == i) for i, c in enumerate(category_names)]
        for suffix, of in groups:
            if bool(tokens[of].sum()):
                metrics[f"train/{name}{suffix}"] = float(values[of].sum() / tokens[of].sum())

    total("num_answers", torch.ones_like(tokens))
    mean("reward", table["total"])
    for name in reward_names:
        mean("cost" if name == COST else f"reward_{name}", table[name])
        total(f"num_unscored_{name}", table[name].isnan().double())
    checked = table["outcome"] >= 0
    for i, outcome in enumerate(OUTCOMES):
        mean(f"{outcome}_rate", (table["outcome"] == i).double(), checked)
    mean("num_tokens", table["num_tokens"])
    mean("truncated_rate", table["truncated"])
    total("num_empty", table["empty"])
    total("num_not_finite", table["not_finite"])
    total("num_flat_groups", table["flat"] / num_generations)
    if kl:
        a_token("kl", table["kl_sum"])
    a_token("entropy", table["entropy_sum"])
    a_token("clip_rate", table["clipped_sum"])
    return metrics
