"""Load and save a policy: the model that one stage hands to the next, as a folder that `from_pretrained` loads."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from equipoise.eval.models import load_model
from equipoise.train.recipe import ModelConfig


def load_policy(
    config: ModelConfig, folder: Path | str | None, notify: Callable[[str], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's model, or the one an earlier stage left in `folder`, in the recipe's dtype, without an adapter."""
    return load_model(
        str(folder) if folder is not None else config.id,
        dtype=config.dtype,  # type: ignore[arg-type]
        revision=config.revision,  # of a hub id; a folder has none, and `load_model` leaves it out
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        notify=notify,
    )


def uses_frozen_copy(config: ModelConfig) -> bool:
    """Whether the reference is a second model (full fine-tuning) instead of the policy without its adapter."""
    return config.reference == "frozen_copy" or (config.reference == "auto" and not config.lora.enabled)


def peft_config(config: ModelConfig) -> PeftLoraConfig | None:
    """PEFT's configuration of the adapter, or None for full fine-tuning."""
    if not config.lora.enabled:
        return None
    return PeftLoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder aside, then rename it into place: nobody ever sees half of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write(aside)
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def merged(model: Any) -> PreTrainedModel:
    """The model with its adapter folded into the weights (computed in fp32, rounded once to the weights' dtype)."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a complete model folder (safetensors, tokenizer, chat template), aside and renamed."""

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)

    save_folder(folder, write)


def save_adapter(model: Any, base: str, folder: Path) -> None:
    """Save an unmerged adapter as PEFT loads it, with the model folder (or hub id) it was trained on; aside, renamed.

    A model without an adapter has none to save.
    """
    if not isinstance(model, PeftModel):
        return
    base_folder = Path(base).expanduser()
    model.active_peft_config.base_model_name_or_path = (
        str(base_folder.resolve()) if base_folder.is_dir() else base
    )
    # The embeddings are never trained with it; asking PEFT to find that out may ask a hub.
    save_folder(folder, lambda aside: model.save_pretrained(aside, save_embedding_layers=False))


def default_device() -> torch.device:
    """The accelerator of this rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
