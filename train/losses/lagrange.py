"""The Lagrange multipliers of a cost constraint E[C] <= d: one for all answers, or one a category.

    log lambda_c <- min(log lambda_c + eta * lambda_c * (mean cost of the window - d_c), log max)

Gradient ascent in log lambda_c on lambda_c (E[C] - d_c): 2310.12773, eq. 12 and appendix B. One multiplier over all
categories is the published algorithm; one a category, with its own threshold and window, is this project's. A
multiplier that starts at 0 stays there: PPO without a constraint.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ALL = "all"
"""What the one multiplier of the published algorithm is called where categories have names."""


@dataclass
class Multipliers:
    """State of the multipliers; float64 on CPU, the same on all ranks."""

    thresholds: Mapping[str, float]
    """d_c by category; the one key `ALL`: one multiplier over all categories."""
    initial: float
    """lambda at the start, >= 0."""
    maximum: float
    window: int
    """Answers, over all ranks, whose mean cost is compared with the threshold."""
    names: tuple[str, ...] = field(init=False)
    log_multiplier: Tensor = field(init=False)
    """log lambda_c (C,); -inf where lambda_c is 0."""
    costs: list[deque[float]] = field(init=False)
    """The windows, newest last."""

    def __post_init__(self) -> None:
        self.names = tuple(self.thresholds)
        self.log_multiplier = torch.full((len(self.names),), self.initial, dtype=torch.float64).log()
        self.costs = [deque(maxlen=self.window) for _ in self.names]

    def index(self, categories: Sequence[str]) -> Tensor:
        """Position of each category's multiplier, (len(categories),) int64; -1: it is under no constraint."""
        if self.names == (ALL,):
            return torch.zeros(len(categories), dtype=torch.int64)
        place = {name: i for i, name in enumerate(self.names)}
        return torch.tensor([place.get(category, -1) for category in categories], dtype=torch.int64)

    def of(self, index: Tensor) -> Tensor:
        """lambda (B,) fp32 at positions `index` (B,); 0 where it is -1."""
        values = torch.cat([self.log_multiplier.exp(), torch.zeros(1, dtype=torch.float64)])
        return values.to(index.device)[index].float()

    def observe(self, costs: Tensor, index: Tensor) -> list[bool]:
        """Take the costs (n,) of new answers, of all ranks, into the windows; returns which windows got any."""
        seen = [False] * len(self.names)
        for cost, i in zip(costs.tolist(), index.tolist(), strict=True):
            if i >= 0:
                self.costs[i].append(cost)
                seen[i] = True
        return seen

    def mean_costs(self) -> list[float | None]:
        """Mean cost of every window; None where nothing was seen yet."""
        return [sum(window) / len(window) if window else None for window in self.costs]

    def update(self, seen: Sequence[bool], *, eta: float) -> None:
        """One step of every multiplier whose category was `seen`: a window that did not move says nothing new."""
        upper = torch.tensor(self.maximum, dtype=torch.float64).log()
        for i, mean in enumerate(self.mean_costs()):
            if mean is not None and seen[i]:
                log = self.log_multiplier[i]
                step = eta * log.exp() * (mean - self.thresholds[self.names[i]])
                self.log_multiplier[i] = torch.minimum(log + step, upper)

    def metrics(self) -> dict[str, float]:
        """`lambda` and `episode_cost` (the window's mean), with `/<category>` where there is one a category."""
        metrics = {}
        for name, log, mean in zip(self.names, self.log_multiplier, self.mean_costs(), strict=True):
            suffix = "" if name == ALL else f"/{name}"
            metrics[f"lambda{suffix}"] = float(log.exp())
            if mean is not None:
                metrics[f"episode_cost{suffix}"] = mean
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON beside a checkpoint; exact."""
        return {
            "names": list(self.names),
            "multiplier_log": [None if torch.isneginf(log) else float(log) for log in self.log_multiplier],
            "costs": [list(window) for window in self.costs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; raises ValueError when it was saved for other categories."""
        if tuple(state["names"]) != self.names:
            raise ValueError(
                f"the multipliers were saved for {state['names']}, this run has {list(self.names)}"
            )
        logs = [-torch.inf if log is None else log for log in state["multiplier_log"]]
        self.log_multiplier = torch.tensor(logs, dtype=torch.float64)
        self.costs = [deque(window, maxlen=self.window) for window in state["costs"]]
