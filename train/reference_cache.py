"""Reference log-probabilities on disk: computed once, reused by every run over beta, lambda and seed.

They depend on the reference's weights, the pairs' tokens and the dtype they were computed in, and on nothing else;
that is the file's name.
"""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from equipoise.eval.fingerprint import model_fingerprint
from equipoise.eval.models import default_cache_dir
from equipoise.train.recipe import ModelConfig


def reference_key(folder: str, model: ModelConfig) -> str:
    """Names the weights that `folder` (or hub id) is loaded to: its files, and how they are quantised.

    Of files and not of parameters, which may be in shards. Raises EquipoiseError as `model_fingerprint` does.
    """
    return f"{model_fingerprint(folder, model.revision)}-{model.quantization}".replace(":", "-")


def frozen_fingerprint(model: nn.Module) -> str:
    """Hash of every frozen weight, of its shard where this rank holds no more.

    Taken before and after training it shows that the reference did not change.
    """
    digest = hashlib.blake2b(digest_size=16)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # behind a pass it keeps some layers whole
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        held = (
            parameter.to_local()
            if isinstance(parameter, DTensor)
            else getattr(parameter, "ds_tensor", parameter)
        )
        digest.update(name.encode())
        # A copy: memory that numpy has seen cannot be resized any more, which is how FSDP frees it.
        copy = held.detach().to("cpu", copy=True).contiguous()
        digest.update(copy.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_file(model_key: str, data_key: str, dtype: str) -> Path:
    """Where the log-probabilities of these pairs under this reference live."""
    return default_cache_dir() / "reference_logps" / model_key / f"{data_key}-{dtype}.safetensors"


def load(path: Path, num_pairs: int) -> tuple[Tensor, Tensor] | None:
    """(chosen (n,), rejected (n,)) fp32, or None where there is no usable file."""
    try:
        tensors = load_file(path)
        chosen, rejected = tensors["chosen"], tensors["rejected"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None  # absent or damaged: computed anew
    if chosen.shape != (num_pairs,) or rejected.shape != (num_pairs,):
        return None
    return chosen, rejected


def save(path: Path, chosen: Tensor, rejected: Tensor) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"chosen": chosen.float().contiguous(), "rejected": rejected.float().contiguous()}, aside)
    aside.replace(path)
