"""Load and save a policy: the model that one stage hands to the next, as a folder that `from_pretrained` loads."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from equipoise.data.files import full_disk_named
from equipoise.eval.generation.batches import base_of
from equipoise.eval.models import load_model, native_dtype
from equipoise.train.ranks import from_first
from equipoise.train.recipe import ModelConfig
from equipoise.train.sharding import allocate, read_in_shards, unsharded, whole_tensors


def load_policy(
    config: ModelConfig, folder: Path | str | None, notify: Callable[[str], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's model, or the one an earlier stage left in `folder`, in the recipe's dtype, without an adapter.

    Whole, on this rank's CPU, whatever engine trains: to be judged, asked or saved. Never quantised.
    """
    with unsharded():
        return _load(config, folder, notify)


def load_trainable(
    config: ModelConfig,
    folder: Path | str | None,
    notify: Callable[[str], None] | None = None,
    engine: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_policy`, to be trained: in shards where the engine makes them, quantised by `model.quantization`.

    engine: as `read_in_shards` takes it; where it is given, what a rank has not read stays on the device `meta`.
    Collective.
    """
    with read_in_shards(config.dtype, engine) as device_map:
        model, tokenizer = _load(config, folder, notify, quantization_config(config), device_map)
    if engine is None:  # accelerate tells the optimizer's parameters apart by their addresses
        allocate(model, "cpu", torch.float32 if not config.lora.enabled else None)
    return model, tokenizer


def load_frozen(config: ModelConfig, folder: Path | str, engine: str | None = None) -> PreTrainedModel:
    """A second model from the same folder, to be the reference of one that is trained whole; as `load_trainable`."""
    with read_in_shards(config.dtype, engine) as device_map:
        model, _ = _load(config, folder, device_map=device_map)
    return model.requires_grad_(False)


def _load(
    config: ModelConfig,
    folder: Path | str | None,
    notify: Callable[[str], None] | None = None,
    quantization: BitsAndBytesConfig | None = None,
    device_map: dict[str, str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(
        str(folder) if folder is not None else config.id,
        dtype=config.dtype,  # type: ignore[arg-type]
        revision=config.revision,  # of a hub id; a folder has none, and `load_model` leaves it out
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        notify=notify,
        quantization=quantization,
        device_map=device_map,
    )


def quantization_config(config: ModelConfig) -> BitsAndBytesConfig | None:
    """QLoRA (2305.14314): NF4 with double quantisation, computed in the recipe's dtype; None: not quantised.

    PEFT's `prepare_model_for_kbit_training` is left out: it casts embeddings, head and norms to fp32, whose memory buys
    nothing, as norms compute in fp32 whatever they are stored in. TRL dropped it likewise (trl#4335, trl#4457).
    """
    if config.quantization == "none":
        return None
    dtype = native_dtype() if config.dtype == "native" else config.dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
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
    """Write a folder aside, then rename it into place: nobody ever sees half of one. Raises DiskFullError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with full_disk_named(folder):
            write(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # half of one is of no use, and takes room
        raise
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def adapters_in_fp32(model: Any) -> None:
    """What is trained on quantised weights, in fp32 as on others; called before there is an optimizer.

    TRL casts it to bf16, where AdamW's steps of less than 1/256 of a weight are lost.
    """
    if isinstance(model, PeftModel) and getattr(base_of(model), "is_loaded_in_4bit", False):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def merged(model: Any) -> PreTrainedModel:
    """The model with its adapter folded into the weights (computed in fp32, rounded once to the weights' dtype)."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def save_merged(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    folder: Path,
) -> None:
    """Save a policy in training as it ships: all of its weights, the active adapter folded in. Collective.

    model: unwrapped; whole, or sharded by ZeRO-3 or FSDP 2. It stays as it is. Of a policy with an adapter only that is
    gathered, on the first rank's CPU: the weights under it are those of the folder that it was loaded from.
    """
    adapter = model.active_adapter if isinstance(model, PeftModel) else None
    trained = whole_tensors(
        (name, parameter)
        for name, parameter in model.named_parameters()
        if adapter is None or ("lora_" in name and f".{adapter}." in name)
    )

    def write() -> None:
        policy, _ = load_policy(config, base_of(model).name_or_path)
        # A new adapter draws its first weights, on this rank alone: training's random numbers must not move.
        with unsharded(), torch.random.fork_rng(devices=[]):
            whole: Any = policy
            if isinstance(model, PeftModel):
                whole = PeftModel(policy, model.peft_config[model.active_adapter], model.active_adapter)
            strangers = whole.load_state_dict(trained, strict=False).unexpected_keys
            assert not strangers, f"weights that the policy on disk has not: {strangers[:3]}"
            save_policy(merged(whole), tokenizer, folder)

    from_first(write)


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a complete model folder (safetensors, tokenizer, chat template), aside and renamed."""

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)

    save_folder(folder, write)


def save_adapter(model: Any, base: str, folder: Path) -> None:
    """Save an unmerged adapter as PEFT loads it, with the model folder (or hub id) it was trained on; aside, renamed.

    A model without an adapter has none to save. Collective, as `save_merged` is.
    """
    if not isinstance(model, PeftModel):
        return
    base_folder = Path(base).expanduser()
    model.active_peft_config.base_model_name_or_path = (
        str(base_folder.resolve()) if base_folder.is_dir() else base
    )
    kept = ((name, p) for name, p in model.named_parameters() if p.requires_grad or "lora_" in name)
    trained = whole_tensors(kept)
    # The embeddings are never trained with it; asking PEFT to find that out may ask a hub.
    options = {"state_dict": trained, "save_embedding_layers": False}
    from_first(lambda: save_folder(folder, lambda aside: model.save_pretrained(aside, **options)))


def default_device() -> torch.device:
    """The accelerator of this rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
