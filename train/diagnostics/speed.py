"""How fast a stage trains: examples and tokens a second, and the share of the machine's matrix products that it uses.

FLOPs are those of the model, 2 N a token and pass (Kaplan et al. 2001.08361, section 2.1): forward and backward are 6 N
where all weights are trained and 4 N under an adapter, whose frozen weights have no gradient; a forward pass without a
gradient (a reference, sampling) is 2 N. N are the decoder's weights without embeddings; the LM head, which sees
completion tokens alone, attention's (T, T) products, the adapter itself and what checkpointing recomputes are left out,
so the share is a lower bound. Over the measured peak it is PaLM's model FLOPs utilisation (2204.02311, appendix B).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from equipoise.train.planning.machine import measured_flops


class PassCounter:
    """Counts tokens and FLOPs of every forward pass through some decoders, by hooks on them; this rank's."""

    def __init__(self, decoders: Iterable[PreTrainedModel]) -> None:
        self.tokens = 0
        """Of passes with a gradient, padding included."""
        self.flops = 0
        self._hooks = [
            decoder.register_forward_pre_hook(self._hook(decoder), with_kwargs=True) for decoder in decoders
        ]

    def take(self) -> tuple[int, int]:
        """(tokens, FLOPs) since the last call."""
        taken = self.tokens, self.flops
        self.tokens = self.flops = 0
        return taken

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, decoder: PreTrainedModel) -> Any:
        num, backward = passed_parameters(decoder)

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is None:  # embeddings were given
                return
            passes = 1 + backward if torch.is_grad_enabled() else 1
            self.flops += 2 * num * passes * ids.numel()
            self.tokens += ids.numel() if torch.is_grad_enabled() else 0

        return count


def passed_parameters(decoder: PreTrainedModel) -> tuple[int, int]:
    """(N: weights that a token is multiplied with, passes backward: 2 where they are trained, 1 where they are not)."""
    embeddings = decoder.get_input_embeddings()
    own = {id(parameter) for parameter in embeddings.parameters()}
    num, trained = 0, False
    for name, parameter in decoder.named_parameters():
        if id(parameter) in own or "lora_" in name:
            continue
        trained |= parameter.requires_grad
        num += _numel(parameter)
    return num, 2 if trained else 1


def _numel(parameter: nn.Parameter) -> int:
    """Of the whole weight: ZeRO-3 leaves an empty one, and NF4 packs two into a byte."""
    num = int(getattr(parameter, "ds_numel", parameter.numel()))
    return 2 * num if type(parameter).__name__ == "Params4bit" else num


def peak_flops(dtype: str) -> float:
    """FLOP/s of a large matrix product on this rank's device, in the dtype that the recipe trains in."""
    return measured_flops(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
