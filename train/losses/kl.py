"""KL penalties against the reference: how a token's divergence becomes a term of the loss."""

import torch
from torch import Tensor

from equipoise.train.losses.log_probs import token_kl

__all__ = ["k3", "sequence_mean", "token_kl"]


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) from the tokens at hand: exp(r) - r - 1, r = log pi_ref - log pi.

    Both (N,); returns (N,), >= 0. Unbiased only where the tokens were sampled from pi; on given answers it is a
    penalty with the same zero and sign. Source: joschu.net/blog/kl-approx.html, "k3".
    """
    r = ref_log_probs.detach() - log_probs
    return torch.exp(r) - r - 1


def sequence_mean(per_token: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Mean over the tokens of each sequence: (N,) and the sequence index (N,) of every token -> (num_sequences,).

    A sequence without tokens gives 0.
    """
    total = per_token.new_zeros(num_sequences).index_add(0, sequence, per_token)
    count = torch.bincount(sequence, minlength=num_sequences).clamp(min=1)
    return total / count
