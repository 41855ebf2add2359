"""Give a causal language model a forward that scores completion tokens only.

`model(..., completion_index=i, completion_targets=t)` runs the backbone, gathers the hidden states at `i` and puts
those alone through the LM head. Called any other way the model is as before, so `generate` is untouched. It has
to live in `forward` because DDP, FSDP and DeepSpeed hook there.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from equipoise.train.losses.log_probs import selected_log_probs


@dataclass
class CompletionOutput(ModelOutput):
    """What the completion forward returns."""

    log_probs: Tensor = None  # type: ignore[assignment]  # ModelOutput wants defaults
    """(N,) fp32: log-probability of each completion token."""
    hidden: Tensor = None  # type: ignore[assignment]
    """(N, H): the states behind them, for KL terms."""


@dataclass(frozen=True)
class LMHead:
    """The LM head as tensors: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def at(self, temperature: float) -> "LMHead":
        """The head whose softmax is that of logits / temperature; ValueError where a soft cap stands between."""
        if temperature == 1.0:
            return self
        if self.softcap is not None:
            raise ValueError("logits with a soft cap have no scale that is a temperature")
        return replace(self, scale=self.scale / temperature)


def base_causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model under an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lm_head(model: PreTrainedModel) -> LMHead:
    """The output head of a causal LM, with the logit scale and soft cap of the families that have one."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if isinstance(weight, DTensor):  # FSDP2 shards the head; the products need it whole
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / config.logits_scaling  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return LMHead(weight, bias, 1.0 if scale is None else float(scale), softcap)


def whole_head(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Inside, the output head that ZeRO-3 shards is whole (`lm_head` gathers FSDP's); for what reads it by itself."""
    head = model.get_output_embeddings()
    parameters = [p for p in (head.weight, getattr(head, "bias", None)) if p is not None]
    # Before DeepSpeed has prepared a model its parameters are whole, and TRL's context would ask for their shards.
    if not all(hasattr(parameter, "ds_status") for parameter in parameters):
        return contextlib.nullcontext()
    return maybe_gather_lm_head_ctx(*parameters)


def add_completion_head(model: PreTrainedModel | PeftModel) -> None:
    """Patch `model` in place (once); see the module's docstring for the call."""
    base = base_causal_lm(model)
    if getattr(base, "_has_completion_head", False):
        return
    original = base.forward

    @functools.wraps(type(base).forward)  # `generate` validates its arguments against this signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        completion_index: Tensor | None = None,
        completion_targets: Tensor | None = None,
        completion_temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """completion_index (N,): positions in the flattened (B * T) whose state predicts completion_targets (N,)."""
        if completion_index is None or completion_targets is None:
            return original(*args, **kwargs)
        kwargs["use_cache"] = False
        kwargs.pop("labels", None)
        states = self.base_model(*args, **kwargs).last_hidden_state
        hidden = states.reshape(-1, states.shape[-1])[completion_index]
        with whole_head(self):
            head = lm_head(self).at(completion_temperature)
            log_probs = selected_log_probs(
                hidden,
                head.weight,
                head.bias,
                completion_targets,
                scale=head.scale,
                softcap=head.softcap,
                gathered=functools.partial(whole_head, self),
            )
        return CompletionOutput(log_probs=log_probs, hidden=hidden)

    base.forward = types.MethodType(forward, base)
    base._has_completion_head = True


@contextlib.contextmanager
def completion_head(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, `model` has the completion forward; behind it, the forward that it had."""
    base = base_causal_lm(model)
    before = {
        name: base.__dict__[name] for name in ("forward", "_has_completion_head") if name in base.__dict__
    }
    add_completion_head(model)
    try:
        yield
    finally:
        del base.forward, base._has_completion_head
        vars(base).update(before)
