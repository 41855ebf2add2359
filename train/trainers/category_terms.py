"""The category terms of one stage: which are on, what each pair gets, and when they move."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.data.schema import HELPFUL
from equipoise.train.losses import category as terms
from equipoise.train.losses.category import CategoryState
from equipoise.train.recipe.stages import CategoryConfig

TIE = 1e-3
"""Nats: a smaller |h| is a tie. Before the first step h is 0 up to rounding, which says nothing of the policy."""


class CategoryTerms:
    """Margin, weight and multiplier of every harm category; `helpful` pairs stay neutral."""

    def __init__(
        self,
        config: CategoryConfig,
        category_names: Sequence[str],
        draws: Sequence[str],
        sizes: Sequence[float] | None = None,
    ) -> None:
        """category_names: all of the stage, in the order of `category_index`; draws: one category a training row.

        sizes: how much each row counts in the loss (SFT: its answer's tokens); None: 1.
        """
        self.config = config
        harm = [name for name in category_names if name != HELPFUL]
        self.state = CategoryState.from_pairs(list(draws), harm, sizes)
        self._slot = self.state.index(list(category_names))
        """(number of names,): position in the state, -1 for a neutral category."""
        num = len(self.state.categories)
        self._errors = torch.zeros(num, dtype=torch.float64)
        self._counts = torch.zeros(num, dtype=torch.float64)
        for name, value in config.multiplier.initial.items():
            if name in self.state.categories:  # not so where few steps never draw it
                self.state.log_multiplier[self.state.categories.index(name)] = math.log(value)
        self._margin_target = self._targets(config.margin.target, config.margin.targets)
        self._multiplier_target = self._targets(config.multiplier.target, config.multiplier.targets)
        if config.weight.mode == "inverse_frequency":
            terms.set_inverse_frequency(self.state, config.weight.temperature)

    def _targets(self, target: float, targets: Mapping[str, float]) -> Tensor:
        """The unsafe rate that each category is to stay below, (C,)."""
        rates = [targets.get(name, target) for name in self.state.categories]
        return torch.tensor(rates, dtype=torch.float64)

    def per_pair(
        self, category: Tensor, beta: float
    ) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """(beta, margin, weight) of each pair, (B,) or the plain number where the term is off."""
        config = self.config
        slot = self._slot.to(category.device)[category]
        pair_beta: Tensor | float = beta
        margin: Tensor | float = 0.0
        weight: Tensor | float = 1.0
        if config.multiplier.enabled:
            pair_beta = beta / terms.per_pair(self.state.log_multiplier.exp(), slot, 1.0)
        if config.margin.enabled:
            margin = terms.per_pair(self.state.margin, slot, 0.0)
        if config.weight.mode != "none":
            weight = terms.per_pair(self.state.weight, slot, 1.0)
        return pair_beta, margin, weight

    def observe(self, table: Mapping[str, Tensor]) -> None:
        """Take in one step's pairs (all ranks): group DRO moves at once, errors are summed for the next update."""
        num = len(self.state.categories)
        slot = self._slot[table["category"].long()]
        harm = slot >= 0
        slots = slot[harm]
        seen = torch.zeros(num, dtype=torch.float64).index_add(
            0, slots, torch.ones(len(slots), dtype=torch.float64)
        )
        h = table["h"][harm]
        wrong = (h < -TIE).double() + 0.5 * (h.abs() <= TIE).double()  # a tie is half an error
        self._errors = self._errors.index_add(0, slots, wrong)
        self._counts = self._counts + seen
        self.observe_losses(table["category"], table["loss"], torch.ones_like(table["loss"]))

    def observe_losses(self, category: Tensor, loss: Tensor, size: Tensor) -> None:
        """Group DRO moves with a step's losses (n,) of all ranks, each a sum over `size` (n,) tokens, or 1."""
        num = len(self.state.categories)
        if self.config.weight.mode != "group_dro" or not num:
            return
        slot = self._slot[category.long()]
        harm = slot >= 0
        zeros = torch.zeros(num, dtype=torch.float64)
        loss_sum, count = (zeros.index_add(0, slot[harm], values[harm]) for values in (loss, size))
        terms.update_group_dro(self.state, loss_sum, count, eta=self.config.weight.eta)

    def update_from_errors(self) -> None:
        """Between evaluations: fold the window's preference errors into u_c, then move margins and multipliers."""
        if not float(self._counts.sum()):
            return
        terms.update_error(
            self.state, self._errors, self._counts, ema=self.config.ema, shrinkage=self.config.shrinkage
        )
        self._errors.zero_()
        self._counts.zero_()
        self._move()

    def update_from_evaluation(self, unsafe: Mapping[str, tuple[int, int]]) -> None:
        """After an evaluation: u_c from category -> (unsafe, judged), then move margins and multipliers."""
        terms.set_error_from_evaluation(self.state, unsafe, shrinkage=self.config.shrinkage)
        self._move()

    def _move(self) -> None:
        margin, multiplier, error = self.config.margin, self.config.multiplier, self.state.error
        if margin.enabled:
            # A category nothing is known of stands at its target, so it does not move.
            target = self._margin_target
            known = torch.where(torch.isnan(error), target, error)
            terms.update_margins(self.state, known, eta=margin.eta, target=target, maximum=margin.max)
        if multiplier.enabled:
            target = self._multiplier_target
            known = torch.where(torch.isnan(error), target, error)
            terms.update_multipliers(
                self.state, known, eta=multiplier.eta, target=target, maximum=multiplier.max_log
            )

    def metrics(self) -> dict[str, float]:
        """The state of the terms that are on, `category/margin/S1` and so on."""
        config, metrics = self.config, {}
        for i, name in enumerate(self.state.categories):
            if config.margin.enabled:
                metrics[f"category/margin/{name}"] = float(self.state.margin[i])
            if config.weight.mode != "none":
                metrics[f"category/weight/{name}"] = float(self.state.weight[i])
            if config.multiplier.enabled:
                metrics[f"category/multiplier/{name}"] = float(self.state.log_multiplier[i].exp())
            if not torch.isnan(self.state.error[i]) and (config.margin.enabled or config.multiplier.enabled):
                metrics[f"category/error/{name}"] = float(self.state.error[i])
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """For JSON beside the checkpoint, the current window included."""
        return {
            **self.state.state_dict(),
            "window_errors": self._errors.tolist(),
            "window_counts": self._counts.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; raises ValueError when it was saved for other categories."""
        self.state.load_state_dict(state)
        self._errors = torch.tensor(state["window_errors"], dtype=torch.float64)
        self._counts = torch.tensor(state["window_counts"], dtype=torch.float64)
