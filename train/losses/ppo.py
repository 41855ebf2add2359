"""PPO on two streams, reward and cost. Pure functions on answers (B, T), padded on the right under a mask.

Notation: T_b the tokens of answer b; log ratio_t = log pi_old(y_t|x, y_<t) - log pi_ref(y_t|x, y_<t); lambda the
multiplier of the answer's category. Losses are per answer, (B,), the mean over its tokens; the caller averages answers
over all ranks. Source: Safe RLHF, Dai et al. 2310.12773, and PKU's safe-rlhf (ppo_lag), whose reductions these are.
"""

import torch
from torch import Tensor

TINY = 1e-6
"""Scores of a group that differ by less are equal: the group says nothing, and its spread is not divided by."""


def answer_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each answer: values, mask (B, T) -> (B,); 0 for an answer without tokens."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def token_rewards(score: Tensor, log_ratio: Tensor, mask: Tensor, *, kl_coef: float, clip: float) -> Tensor:
    """A score at the end of each answer as a reward a token, (B, T), pulled to the reference on the way.

    r_t = clip(-kl_coef * log ratio_t + 1[t = T_b] * score, +-clip). score (B,), log_ratio and mask (B, T). A cost
    takes -kl_coef: what is far from the reference costs. 2310.12773, appendix B: either stream carries half of the
    penalty, kl_coef = kl / 2, so that A_R - lambda * A_C over 1 + lambda contains kl / 2 whatever lambda is.
    """
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1
    rewards = -kl_coef * log_ratio + torch.where(last, score[:, None], torch.zeros_like(log_ratio))
    return (rewards * mask).clamp(-clip, clip)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T), without gradient; 0 under the padding.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, R_t = A_t + V_t, with V = A = 0 behind
    the last token. V_t is the value of the state that token t was sampled in. Schulman et al. 1506.02438, eq. 16.
    """
    mask = mask.to(values.dtype)
    rewards, values = (rewards * mask).detach(), (values * mask).detach()
    advantages = torch.zeros_like(values)
    ahead = values.new_zeros(values.shape[0])
    next_value = ahead
    for t in range(values.shape[1] - 1, -1, -1):
        ahead = (rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * ahead) * mask[:, t]
        advantages[:, t], next_value = ahead, values[:, t]
    return advantages, advantages + values


def rloo_advantages(scores: Tensor, valid: Tensor, num_generations: int) -> Tensor:
    """score_i - mean of the other answers to the same prompt, (B,). REINFORCE leave-one-out, 2402.14740, eq. 7.

    scores, valid (B,), `num_generations` answers a prompt behind one another; an answer that is not valid is left
    out and gets 0, as does one without a valid other.
    """
    groups, ok = scores.view(-1, num_generations), valid.view(-1, num_generations)
    groups = torch.where(ok, groups, torch.zeros_like(groups))
    num_others = ok.sum(1, keepdim=True) - 1
    others = (groups.sum(1, keepdim=True) - groups) / num_others.clamp(min=1)
    return torch.where(ok & (num_others > 0), groups - others, torch.zeros_like(groups)).flatten()


def grpo_advantages(scores: Tensor, valid: Tensor, num_generations: int) -> Tensor:
    """(score_i - mean) / std over the answers to the same prompt, (B,). GRPO, 2402.03300, section 4.1.2.

    Shapes as in `rloo_advantages`; the standard deviation is the sample's (n - 1). A group whose valid scores are all
    equal, or that has fewer than two, gets 0.
    """
    groups, ok = scores.view(-1, num_generations), valid.view(-1, num_generations)
    groups = torch.where(ok, groups, torch.zeros_like(groups))
    num = ok.sum(1, keepdim=True)
    centred = torch.where(
        ok, groups - groups.sum(1, keepdim=True) / num.clamp(min=1), torch.zeros_like(groups)
    )
    std = (centred.square().sum(1, keepdim=True) / (num - 1).clamp(min=1)).sqrt()
    return torch.where(std > TINY, centred / std.clamp(min=TINY), torch.zeros_like(centred)).flatten()


def flat_groups(scores: Tensor, valid: Tensor, num_generations: int) -> Tensor:
    """Which groups say nothing, (B / num_generations,) bool: fewer than two valid answers, or all scores equal."""
    groups, ok = scores.view(-1, num_generations), valid.view(-1, num_generations)
    highest = groups.masked_fill(~ok, -torch.inf).amax(1)
    lowest = groups.masked_fill(~ok, torch.inf).amin(1)
    return (ok.sum(1) < 2) | (highest - lowest <= TINY)


def combined_advantages(reward: Tensor, cost: Tensor, multiplier: Tensor) -> Tensor:
    """(A_R - lambda A_C) / (1 + lambda), (B, T), from advantages (B, T) and each answer's lambda (B,) >= 0.

    2310.12773, appendix B. Dividing keeps the step's length while lambda grows; with lambda = 0 it is A_R, bit by bit.
    """
    multiplier = multiplier[:, None]
    return (reward - multiplier * cost) / (1 + multiplier)


def clipped_actor_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """(loss (B,), clipped tokens (B,)). Descent raises the probability of tokens with a positive advantage.

    -min(rho A, clip(rho, 1 +- clip) A), rho = pi / pi_old, averaged over the answer's tokens. PPO, 1707.06347, eq. 7.
    A token counts as clipped where the clipped side is the smaller one, that is where it has no gradient.
    """
    ratio = (log_probs - old_log_probs).exp()
    free, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -answer_mean(torch.minimum(free, held), mask)
    return loss, ((held < free) & mask.bool()).sum(1)


def clipped_critic_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> Tensor:
    """Half the mean over tokens of max((V - R)^2, (clip(V, V_old +- clip) - R)^2), (B,).

    Values, returns and mask (B, T). As in PPO's reference code (openai/baselines, ppo2) and PKU's.
    """
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * answer_mean(torch.maximum((values - returns).square(), (held - returns).square()), mask)
