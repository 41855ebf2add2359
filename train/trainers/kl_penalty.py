"""A trainer's reference, and the KL penalty against it: on which answers, and how much for each category."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from equipoise.data.schema import HELPFUL
from equipoise.train.answers import BenignAnswers
from equipoise.train.losses.kl import k3, sequence_mean, token_kl
from equipoise.train.pairs import model_inputs
from equipoise.train.recipe.stages import KLConfig
from equipoise.train.trainers.completion_head import CompletionOutput, base_causal_lm, lm_head, whole_head


class Reference:
    """What a trainer's policy is held against: its frozen copy `ref_model`, or the policy without its adapter."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer  # read when called: accelerate wraps the models later

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The reference inside: an adapter is switched off; a frozen copy or an untrained policy is one as it is."""
        policy = self._trainer.accelerator.unwrap_model(self._trainer.model)
        if self._trainer.ref_model is None and isinstance(policy, PeftModel):
            trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
            with policy.disable_adapter():
                # PEFT freezes what it switches off. In its first pass, which may be this one, FSDP looks at what is
                # trained for the dtype of gradients.
                for parameter in trained:
                    parameter.requires_grad_(True)
                yield
        else:
            yield

    def outputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> CompletionOutput:
        """The completion forward of the reference, without gradients; `model` is the policy that is trained."""
        ref_model = self._trainer.ref_model
        with torch.no_grad(), self.active():
            return (ref_model if ref_model is not None else model)(**inputs)

    def exact_kl(self, hidden: Tensor, ref_hidden: Tensor, estimator: str) -> Tensor:
        """`token_kl` of the policy's and the reference's hidden states (N, H), each through its own LM head: (N,)."""
        unwrap = self._trainer.accelerator.unwrap_model
        policy = base_causal_lm(unwrap(self._trainer.model))
        ref_model = self._trainer.ref_model
        reference = base_causal_lm(unwrap(ref_model)) if ref_model is not None else policy

        @contextlib.contextmanager
        def gathered() -> Iterator[None]:
            with whole_head(policy), whole_head(reference) if reference is not policy else nullcontext():
                yield

        with gathered():
            head = lm_head(policy)
            return token_kl(
                hidden,
                ref_hidden,
                head.weight,
                head.bias,
                estimator=estimator,
                ref_weight=lm_head(reference).weight if reference is not policy else None,
                scale=head.scale,
                softcap=head.softcap,
                gathered=gathered,
            )


class KLPenalty:
    """The penalty of one stage. A mean KL a token is taken of every answer, then a mean over answers."""

    def __init__(
        self,
        config: KLConfig,
        category_names: Sequence[str],
        reference: Reference,
        benign: BenignAnswers | None = None,
    ) -> None:
        """category_names: behind `category_index`; benign: the answers of `on: benign`."""
        self.config, self._reference, self._benign = config, reference, benign
        self.on_benign = config.active and config.on == "benign"
        assert (benign is not None) == self.on_benign
        kappa = [
            config.per_category.get(name, config.coef) if config.on == "chosen" or name == HELPFUL else 0.0
            for name in category_names
        ]
        self._kappa = torch.tensor(kappa) if config.active and not self.on_benign else None

    def kappa(self, category: Tensor) -> Tensor | None:
        """Each example's coefficient (B,), or None where no example of the stage is penalised."""
        return None if self._kappa is None else self._kappa.to(category.device)[category]

    def of_answers(
        self, model: nn.Module, batch: dict[str, Any], outputs: CompletionOutput, every: int = 1
    ) -> Tensor:
        """Mean KL a token of every `every`-th answer of a collated batch, (S / every,), >= 0 up to rounding."""
        counted = batch["completion_sequence"] % every == 0
        ref = self._reference.outputs(model, model_inputs(batch))
        if self.config.estimator == "k3":
            per_token = k3(outputs.log_probs[counted], ref.log_probs[counted])
        else:
            per_token = self._reference.exact_kl(
                outputs.hidden[counted], ref.hidden[counted], self.config.estimator
            )
        sequence = batch["completion_sequence"][counted] // every
        return sequence_mean(per_token, sequence, batch["lengths"].shape[0] // every)

    def of_benign(self, model: nn.Module, trainer: Trainer, *, share_rows: bool) -> Tensor:
        """Mean over the step's benign answers of their mean KL a token, scalar; each rank has answers of its own."""
        assert self._benign is not None
        accelerator = trainer.accelerator
        batch = self._benign.draw(
            trainer.state.global_step,
            accelerator.process_index,
            accelerator.num_processes,
            share_rows=share_rows,
        )
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        return self.of_answers(model, batch, model(**model_inputs(batch))).mean()
