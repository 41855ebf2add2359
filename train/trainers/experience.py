"""What is measured of sampled answers while the policy is the one that sampled them, and the advantages made of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equipoise.train.losses import ppo
from equipoise.train.recipe.rl import SafeRLHFStageConfig
from equipoise.train.trainers.rollout import RolloutBatch
from equipoise.train.trainers.safe_rlhf_models import SafeRLHFModels

Score = Callable[[RolloutBatch], Tensor]
"""Rewards or costs (B,) of answers."""


@dataclass
class Experience:
    """A microbatch of answers; tensors (B,) or, a token, (B, L)."""

    batch: RolloutBatch
    scores: dict[str, Tensor]
    """`reward` and, where there is one, `cost`, (B,); 0 for an answer that is not valid."""
    valid: Tensor
    """(B,): all scores are finite, and there is a token to learn."""
    mask: Tensor
    """(B, L): the tokens of valid answers."""
    log_probs: Tensor
    """Of the policy that sampled, (B, L)."""
    ref_log_probs: Tensor
    values: dict[str, Tensor]
    """`reward` and `cost` -> what the critics said, (B, L); empty without critics."""
    advantages: Tensor = field(init=False)
    """Of both streams, combined, (B, L)."""
    returns: dict[str, Tensor] = field(default_factory=dict)
    """What the critics learn, (B, L)."""
    totals: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the epochs of the update, (B,), for the metrics."""

    @property
    def categories(self) -> Tensor:
        """Index of every answer's category, (B,), on the CPU."""
        return torch.tensor([episode.category for episode in self.batch.episodes])

    @property
    def log_ratio(self) -> Tensor:
        """log pi_old - log pi_ref of every token, (B, L), 0 where the mask is."""
        return (self.log_probs - self.ref_log_probs) * self.mask

    def add(self, name: str, values: Tensor) -> None:
        """Add (B,) values to a total."""
        values = values.detach().double()
        self.totals[name] = self.totals[name] + values if name in self.totals else values


def measure(
    models: SafeRLHFModels, batch: RolloutBatch, scores: Mapping[str, Score], missing_end_penalty: float
) -> Experience:
    """Score the answers, and take log-probabilities and values; to be called without gradients."""
    found = {kind: score(batch).float() for kind, score in scores.items()}
    values = {kind: batch.by_answer(models.values(kind, batch)) for kind in models.critics}
    ref_log_probs = batch.by_answer(models.reference_log_probs(batch))
    models.acting()
    log_probs = batch.by_answer(models.log_probs(batch))
    valid = batch.mask.any(1)
    for score in found.values():
        valid = valid & torch.isfinite(score)
    cut_off = torch.tensor([not episode.finished for episode in batch.episodes], device=valid.device)
    found["reward"] = found["reward"] - missing_end_penalty * cut_off
    return Experience(
        batch=batch,
        scores={kind: torch.where(valid, score, torch.zeros_like(score)) for kind, score in found.items()},
        valid=valid,
        mask=batch.mask & valid[:, None],
        log_probs=log_probs,
        ref_log_probs=ref_log_probs,
        values=values,
    )


def set_advantages(experiences: Sequence[Experience], stage: SafeRLHFStageConfig, multipliers: Tensor) -> int:
    """Set advantages and returns of a rank's answers; returns how many groups of answers to a prompt say nothing.

    multipliers (C,): lambda of every category; 0 everywhere where there is no cost. Answers to one prompt stand behind
    one another. With gae there are no groups.
    """
    streams = {kind: _stream(kind, experiences, stage) for kind in experiences[0].scores}
    for i, experience in enumerate(experiences):
        experience.advantages = streams["reward"][i]
        if "cost" in streams:
            multiplier = multipliers[experience.categories].to(experience.mask.device)
            experience.advantages = ppo.combined_advantages(
                streams["reward"][i], streams["cost"][i], multiplier
            )
    if stage.advantage == "gae":
        return 0
    valid = torch.cat([e.valid for e in experiences])
    flat = [ppo.flat_groups(_scores(kind, experiences), valid, stage.num_generations) for kind in streams]
    return int(torch.stack(flat).all(0).sum())


def _stream(kind: str, experiences: Sequence[Experience], stage: SafeRLHFStageConfig) -> list[Tensor]:
    """Advantages (B, L) of the reward or of the cost, a tensor a microbatch."""
    half_kl = stage.kl / 2 if kind == "reward" else -stage.kl / 2
    if stage.advantage == "gae":
        return [_gae(kind, experience, stage, half_kl) for experience in experiences]
    scores = _scores(kind, experiences).clamp(-stage.clip_score, stage.clip_score)
    valid = torch.cat([e.valid for e in experiences])
    if stage.advantage == "rloo":
        scores = scores - half_kl * torch.cat([e.log_ratio.sum(1) for e in experiences])
        advantages = ppo.rloo_advantages(scores, valid, stage.num_generations)
    else:  # grpo: the pull to the reference is a term of the loss, or the group's spread would be divided out of it
        advantages = ppo.grpo_advantages(scores, valid, stage.num_generations)
    parts = advantages.split([len(e.valid) for e in experiences])
    return [part[:, None] * e.mask for part, e in zip(parts, experiences, strict=True)]


def _gae(kind: str, experience: Experience, stage: SafeRLHFStageConfig, half_kl: float) -> Tensor:
    rewards = ppo.token_rewards(
        experience.scores[kind],
        experience.log_ratio,
        experience.mask,
        kl_coef=half_kl,
        clip=stage.clip_score,
    )
    advantages, experience.returns[kind] = ppo.gae(
        rewards, experience.values[kind], experience.mask, gamma=stage.gamma, lam=stage.gae_lambda
    )
    return advantages


def _scores(kind: str, experiences: Sequence[Experience]) -> Tensor:
    return torch.cat([e.scores[kind] for e in experiences])
