"""Per-category terms of a preference loss: margins, weights and multipliers, and how they move.

Each category c carries three numbers, all neutral at the start, so that training begins as plain DPO and stays
plain DPO while every category is as good as its target:

    margin      delta_c   -log sigmoid(beta h - delta_c);  delta_c <- clip(delta_c + eta (u_c - tau), 0, max)
    weight      w_c       loss of a pair times w_c
    multiplier  nu_c      beta_c = beta / exp(nu_c);       nu_c <- clip(nu_c + eta (u_c - tau), -max, max)

u_c is the unsafe rate of c in the last evaluation, shrunk toward the overall rate; between evaluations, a running
average of in-batch preference errors (pairs with h < 0; a tie is half a one). Pairs of a category that is not in
the list (`helpful`) keep the neutral values. Margin: the idea is Cat-DPO's (2604.17299), whose exact update is not
public here; group DRO: Sagawa et al. 1911.08731, algorithm 1; the multiplier is SACPO's lambda (2404.11049), one a
category.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class CategoryState:
    """The state of the category terms; float64 on CPU, identical on all ranks.

    `counts` are the training pairs (in SFT: the answer tokens) of each category: what weights are taken against.
    """

    categories: tuple[str, ...]
    counts: Tensor
    margin: Tensor = field(init=False)
    """delta_c (C,), in units of beta * h."""
    weight: Tensor = field(init=False)
    """w_c (C,); their mean over the training pairs is 1."""
    log_multiplier: Tensor = field(init=False)
    """nu_c = log lambda_c (C,)."""
    error: Tensor = field(init=False)
    """u_c (C,) in [0, 1]; nan: nothing known yet."""

    def __post_init__(self) -> None:
        num = len(self.categories)
        self.counts = self.counts.double()
        self.margin = torch.zeros(num, dtype=torch.float64)
        self.weight = torch.ones(num, dtype=torch.float64)
        self.log_multiplier = torch.zeros(num, dtype=torch.float64)
        self.error = torch.full((num,), float("nan"), dtype=torch.float64)

    @classmethod
    def from_pairs(
        cls, pair_categories: Sequence[str], categories: Sequence[str], sizes: Sequence[float] | None = None
    ) -> "CategoryState":
        """State over `categories`, counted in the training pairs; categories without a pair are left out.

        sizes: what each pair counts; None: 1.
        """
        counts = dict.fromkeys(categories, 0.0)
        for category, size in zip(pair_categories, sizes or [1.0] * len(pair_categories), strict=True):
            if category in counts:
                counts[category] += size
        present = tuple(c for c in categories if counts[c])
        return cls(present, torch.tensor([counts[c] for c in present]))

    def index(self, pair_categories: Sequence[str]) -> Tensor:
        """Index of each pair's category, (B,) int64; -1 for one that carries no term."""
        position = {c: i for i, c in enumerate(self.categories)}
        return torch.tensor([position.get(c, -1) for c in pair_categories], dtype=torch.int64)

    def state_dict(self) -> dict[str, object]:
        """Plain lists, for JSON beside the checkpoint."""
        return {
            "categories": list(self.categories),
            "counts": self.counts.tolist(),
            "margin": self.margin.tolist(),
            "weight": self.weight.tolist(),
            "log_multiplier": self.log_multiplier.tolist(),
            "error": [None if torch.isnan(e) else float(e) for e in self.error],
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore; raises ValueError when it was saved for other categories."""
        if tuple(state["categories"]) != self.categories:  # type: ignore[arg-type]
            raise ValueError(
                f"category state was saved for {state['categories']}, this run has {list(self.categories)}"
            )
        for name in ("counts", "margin", "weight", "log_multiplier"):
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64))
        error = [float("nan") if e is None else e for e in state["error"]]  # type: ignore[attr-defined]
        self.error = torch.tensor(error, dtype=torch.float64)


def per_pair(values: Tensor, index: Tensor, neutral: float) -> Tensor:
    """Each pair's value of its category, (B,) fp32; `neutral` where the index is -1."""
    values = torch.cat([values, values.new_tensor([neutral])])
    return values.to(index.device)[index].float()  # index -1 is the last entry


def shrink(rate: Tensor, num: Tensor, overall: float, strength: float) -> Tensor:
    """Rates (C,) of `num` samples (C,) mixed with `strength` pseudo-samples of the overall rate; nan counts as none.

    The posterior mean of a binomial rate under Beta(strength * overall, strength * (1 - overall)).
    """
    known = torch.where(torch.isnan(rate), torch.zeros_like(rate), rate)
    num = torch.where(torch.isnan(rate), torch.zeros_like(num), num)
    return (known * num + overall * strength) / (num + strength)


def update_margins(
    state: CategoryState, error: Tensor, *, eta: float, target: float | Tensor, maximum: float
) -> None:
    """delta_c <- clip(delta_c + eta (u_c - tau), 0, max). A category worse than its target has to win by more."""
    state.margin = (state.margin + eta * (error - target)).clamp(0.0, maximum)


def update_multipliers(
    state: CategoryState, error: Tensor, *, eta: float, target: float | Tensor, maximum: float
) -> None:
    """nu_c <- clip(nu_c + eta (u_c - tau), -max, max): dual ascent on log lambda_c; lambda_c > 1 lowers beta_c."""
    state.log_multiplier = (state.log_multiplier + eta * (error - target)).clamp(-maximum, maximum)


def update_group_dro(state: CategoryState, loss_sum: Tensor, loss_count: Tensor, *, eta: float) -> None:
    """q_c <- q_c exp(eta * mean loss of c), normalised; w_c = q_c / p_c. Sagawa et al. 1911.08731, algorithm 1.

    loss_sum, loss_count (C,): over the global batch (all ranks, no duplicates); a category without a pair in it
    keeps its q. q starts at the frequencies p instead of uniform, so that step 0 is plain DPO; the expectation of
    w_c * loss over pairs is then sum_c q_c * loss_c, the paper's objective.
    """
    mean = torch.where(loss_count > 0, loss_sum / loss_count.clamp(min=1), torch.zeros_like(loss_sum))
    frequency = state.counts / state.counts.sum()
    # Subtracting the largest exponent changes nothing after normalisation and cannot overflow.
    exponent = eta * mean
    q = frequency * state.weight * torch.exp(exponent - exponent.max())
    state.weight = q / q.sum() / frequency


def set_inverse_frequency(state: CategoryState, temperature: float) -> None:
    """w_c ~ n_c ** -temperature with mean 1 over the pairs; 0: all 1; 1: equal total weight."""
    raw = state.counts ** (-temperature)
    state.weight = raw * state.counts.sum() / (raw * state.counts).sum()


def update_error(
    state: CategoryState, error_sum: Tensor, count: Tensor, *, ema: float, shrinkage: float
) -> None:
    """Fold in-batch preference errors into u_c: u_c <- ema * u_c + (1 - ema) * shrunk rate of the window.

    error_sum, count (C,): pairs with h < 0 and pairs seen since the last update, over all ranks. A category unseen
    in the window keeps its u_c.
    """
    total = float(count.sum())
    if total == 0:
        return
    overall = float(error_sum.sum()) / total
    rate = shrink(error_sum / count.clamp(min=1), count, overall, shrinkage)
    mixed = torch.where(torch.isnan(state.error), rate, ema * state.error + (1 - ema) * rate)
    state.error = torch.where(count > 0, mixed, state.error)


def set_error_from_evaluation(
    state: CategoryState, unsafe: Mapping[str, tuple[int, int]], *, shrinkage: float
) -> None:
    """u_c from an evaluation: category -> (unsafe, judged), shrunk toward the overall rate of the categories given."""
    num = torch.tensor([float(unsafe.get(c, (0, 0))[1]) for c in state.categories], dtype=torch.float64)
    bad = torch.tensor([float(unsafe.get(c, (0, 0))[0]) for c in state.categories], dtype=torch.float64)
    total = sum(n for _, n in unsafe.values())
    if total == 0:
        return
    overall = sum(k for k, _ in unsafe.values()) / total
    state.error = shrink(bad / num.clamp(min=1), num, overall, shrinkage)
