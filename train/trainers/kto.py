"""KTO on the preference trainer: a row is `[prompt | answer | another prompt's answer]`.

In the batches of `pairs.PairCollator` the chosen answer is the example's own and the rejected one the mismatched one
(`mismatched.with_mismatched`). One forward pass serves both; the reference's log-probabilities of both are cached as
the preference trainer caches them. The mismatched answers' log-ratios make the reference point of the forward pass,
over all ranks and without a gradient: with few examples a forward pass it is a noisy one, so raise
per_device_batch_size rather than gradient_accumulation_steps.
"""

from typing import Any

import torch
from torch import Tensor

from equipoise.train.losses.kto import advantage, balancing_weight, kto_loss, reference_point
from equipoise.train.losses.preference import PairLogps
from equipoise.train.recipe.stages import KTOStageConfig
from equipoise.train.trainers.preference import PreferenceTrainer


class KTOTrainer(PreferenceTrainer):
    """See the module. Rows carry `desirable` (bool) as well."""

    examples = "examples"
    columns = (
        "slot",
        "category",
        "loss",
        "h",  # how far on its right side of the reference point, nats
        "desirable",
        "desirable_log_ratio",
        "undesirable_log_ratio",
        "z_ref",
        "kl",
    )
    log_ratios = ("desirable_log_ratio", "undesirable_log_ratio")

    def __init__(self, **kwargs: Any) -> None:
        stage, desirable = kwargs["stage"], kwargs["dataset"]["desirable"]
        assert isinstance(stage, KTOStageConfig)
        num = sum(desirable)
        balancing = balancing_weight(num, len(desirable) - num, stage.desirable_weight)
        given = stage.undesirable_weight
        self.desirable_weight = stage.desirable_weight
        self.undesirable_weight = balancing if given is None else given
        self._z_ref = torch.zeros(())
        """The reference point of the forward pass at hand."""
        super().__init__(**kwargs)

    def _log_ratio_loss(self, inputs: dict[str, Any], logps: PairLogps) -> tuple[Tensor, Tensor]:
        """(each example's loss (B,), their term of the microbatch's loss, scalar)."""
        self._z_ref = self._reference_point(logps.rejected_log_ratio)
        beta, _, weight = self.terms.per_pair(inputs["category_index"], self.stage.beta / self.stage.lam)
        per_example = kto_loss(
            logps.chosen_log_ratio,
            inputs["desirable"],
            self._z_ref,
            beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        return per_example, (weight * per_example).mean()

    def _reference_point(self, mismatched: Tensor) -> Tensor:
        """z_ref of this forward pass, the same on all ranks; every rank calls it, whatever its examples are."""
        totals = torch.stack([mismatched.detach().sum(), mismatched.new_tensor(len(mismatched))])
        totals = self.accelerator.reduce(totals, reduction="sum")
        return reference_point(totals[0], totals[1])

    def _kappa(self, inputs: dict[str, Any]) -> Tensor | None:
        """The KL penalty is on desirable answers, as it is on chosen ones in a preference stage."""
        kappa = super()._kappa(inputs)
        return None if kappa is None else kappa * inputs["desirable"]

    def _values(
        self, inputs: dict[str, Any], loss: Tensor, logps: PairLogps, kl: Tensor
    ) -> tuple[Tensor, ...]:
        desirable, log_ratio = inputs["desirable"], logps.chosen_log_ratio.detach()
        nan = torch.full_like(log_ratio, float("nan"))
        return (
            inputs["slot"],
            inputs["category_index"],
            loss,
            advantage(log_ratio, desirable, self._z_ref),
            desirable,
            torch.where(desirable, log_ratio, nan),
            torch.where(desirable, nan, log_ratio),
            self._z_ref.expand_as(loss),
            torch.where(desirable, kl, nan),
        )

    def _metrics_of(self, table: dict[str, Tensor]) -> dict[str, float]:
        metrics = super()._metrics_of(table)
        desirable = table["desirable"] > 0
        metrics["train/num_desirable"] = int(desirable.sum())
        metrics["train/z_ref"] = float(table["z_ref"].mean())
        for column in self.log_ratios:
            if not bool(table[column].isnan().all()):
                metrics[f"train/{column}"] = float(table[column].nanmean())
        return metrics
