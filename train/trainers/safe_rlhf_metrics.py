"""The metrics of one step of Safe RLHF: exact over all ranks, in all and a category."""

from collections.abc import Collection, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from equipoise.train.trainers.experience import Experience
from equipoise.train.trainers.step_table import StepTable, mean_by_category

_MEANS = {
    "reward": "reward",
    "cost": "cost",
    "kl": "kl",
    "length": "length",
    "finished": "finished_rate",
    "actor_loss": "actor_loss",
    "reward_critic_loss": "reward_critic_loss",
    "cost_critic_loss": "cost_critic_loss",
}
"""Column -> metric."""
_COLUMNS = ("slot", "category", "valid", "empty", "clipped", *_MEANS)


def gathered(
    experiences: Sequence[Experience], ends: Collection[int], update_epochs: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Every answer of the step by column, (n,) fp64; nan where there is none of it. Collective."""
    table = StepTable(_COLUMNS)
    for experience in experiences:
        episodes = experience.batch.episodes
        known = {
            "slot": torch.tensor([e.slot for e in episodes]),
            "category": experience.categories,
            "valid": experience.valid,
            "kl": experience.log_ratio.sum(1),
            "length": torch.tensor([len(e.answer_ids) for e in episodes]),
            "finished": torch.tensor([e.finished for e in episodes]),
            "empty": torch.tensor([all(token in ends for token in e.answer_ids) for e in episodes]),
            **experience.scores,
            **{name: total / update_epochs for name, total in experience.totals.items()},
        }
        absent = torch.full((len(episodes),), torch.nan)
        table.keep(*(known.get(name, absent).to(accelerator.device) for name in _COLUMNS))
    return table.gather(accelerator)


def counts_of(table: dict[str, Tensor]) -> dict[str, int]:
    """Answers, those with a score that is not finite (or without a token), and those that say nothing."""
    return {
        "num_episodes": len(table["slot"]),
        "num_non_finite": int((table["valid"] == 0).sum()),
        "num_empty": int(table["empty"].sum()),
    }


def metrics_of(table: dict[str, Tensor], names: Sequence[str]) -> dict[str, float]:
    """Means over the valid answers, `<metric>` and `<metric>/<category>`, and the counts.

    kl is log pi - log pi_ref summed over an answer; clip_fraction the share of tokens that clipping left
    without a gradient.
    """
    valid = table["valid"].bool()
    usable = {name: column[valid] for name, column in table.items()}
    metrics: dict[str, float] = dict(counts_of(table))
    for column, name in _MEANS.items():
        if not bool(usable[column].isnan().all()):
            metrics[name] = float(usable[column].mean())
            metrics |= mean_by_category(name, usable[column], usable["category"], names)
    metrics["clip_fraction"] = float(usable["clipped"].sum() / usable["length"].sum())
    for i, category in enumerate(names):
        of = usable["category"] == i
        if bool(of.any()):
            metrics[f"num_episodes/{category}"] = int(of.sum())
            metrics[f"clip_fraction/{category}"] = float(
                usable["clipped"][of].sum() / usable["length"][of].sum()
            )
    return metrics
