"""Models under engines that shard them (ZeRO-3, FSDP 2): read in shards, gathered whole.

Read whole by every process, a model of 70B takes 140 GB of the machine's memory a GPU. So what is to be trained, and
its frozen copy, arrive as transformers lets them: under ZeRO-3 the first rank reads and every layer is cut as it comes;
under FSDP 2 (`fsdp_cpu_ram_efficient_loading`) one rank of each machine reads, the others hold tensors that nobody has
written to, and accelerate sends each its shards.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, fsdp2_prepare_model, patch_environment
from accelerate.utils.environment import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.integrations import deepspeed as deepspeed_integration
from trl.models import prepare_deepspeed

from equipoise.train.planning.engine import Engine

EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""Environment variable of `accelerate launch`: `fsdp_cpu_ram_efficient_loading` of its file."""


@contextmanager
def read_in_shards(dtype: str, engine: str | None = None) -> Iterator[dict[str, str] | None]:
    """Inside, `from_pretrained(..., device_map=...)`, with what this gives, reads a model as the engine shards it.

    engine: `zero3`, `fsdp2`, or another, under which models are read whole; None: the launch's. Collective: every rank
    has to read the same models in the same order.
    """
    engine = engine or Engine.launched().name
    with unsharded():  # puts back what there was
        if engine == "zero3":
            plugin = DeepSpeedPlugin(zero3_init_flag=True)
            # What DeepSpeed makes the parameters in.
            plugin.deepspeed_config["bf16"] = {"enabled": dtype == "bfloat16"}
            plugin.set_deepspeed_weakref()  # transformers keeps a weak reference: `plugin` lives as long as this
            yield None
        elif engine == "fsdp2" and parse_flag_from_env(EFFICIENT, default=True):
            # transformers then makes the buffers that are in no file, which nobody sends.
            with patch_environment(accelerate_use_fsdp="true", **{EFFICIENT: "true"}):
                yield {"": "meta"} if PartialState().local_process_index else None
        else:
            yield None


def allocate(model: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Memory on `device` for the tensors that have none, whatever is in it; tied ones stay tied.

    dtype: of the parameters, None: their own. On a CPU no page of it is resident until it is written to, which
    accelerate does where it makes fp32 of what is trained: give that dtype then.
    """
    made: dict[int, Any] = {}
    for part in model.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta and not isinstance(tensor, DTensor):
                    empty: Tensor
                    if isinstance(tensor, nn.Parameter):
                        empty = torch.empty_like(tensor, device=device, dtype=dtype)
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    else:
                        empty = torch.empty_like(tensor, device=device)
                    tensors[name] = made.setdefault(id(tensor), empty)


def keep_fp32_outputs(accelerator: Accelerator) -> None:
    """FSDP 2 hands on what the model gives; accelerate's policy for bf16 would round log-probabilities and scores.

    To be called before a model is prepared.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether parameters of the model are spread over the ranks (FSDP 2, ZeRO-3): all then have to call it alike."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def whole_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of parameters on the first rank's CPU, whole whatever engine shards them; {} on the others. Collective.

    One after the other, so that no device ever holds more than one of them whole.
    """
    main = PartialState().is_main_process
    whole = {}
    for name, parameter in named:
        with torch.no_grad(), _gathered(parameter) as tensor:
            if main:
                whole[name] = tensor.detach().to("cpu", copy=True)
    return whole


@contextmanager
def _gathered(parameter: Tensor) -> Iterator[Tensor]:
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter


@contextmanager
def unsharded() -> Iterator[None]:
    """Inside, `from_pretrained` loads whole models and `generate` waits for no other rank.

    While an engine trains in this process transformers does neither: with ZeRO-3 it shards whatever is loaded, with
    FSDP's `cpu_ram_efficient_loading` only the first rank reads weights.
    """
    # The configuration itself has no public reader, but for the reference that transformers keeps of it.
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", None)
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed_integration.set_hf_deepspeed_config(config)
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp


@contextmanager
def own_reference(module: ModuleType, reference: nn.Module | None) -> Iterator[None]:
    """Inside, trainers of TRL's `module` take `reference` where they would load one, and shard it as it was read.

    TRL's are read by a rank for itself. DPOTrainer takes one under FSDP even where `precompute_ref_log_probs` needs
    none, and hashes all weights for a cache that is not used here.
    """
    replaced: dict[str, Callable[..., Any]] = {
        "create_model_from_path": lambda *args, **kwargs: reference,
        "hash_module": lambda model: None,
        "prepare_fsdp": lambda model, accelerator: fsdp2_prepare_model(accelerator, model),
    }
    before = {name: getattr(module, name) for name in replaced if hasattr(module, name)}
    for name in before:
        setattr(module, name, replaced[name])
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def prepared_reference(trainer: Trainer, reference: nn.Module | None) -> Any:
    """The frozen copy on this rank's device, as the launch's engine shards it; None stays None. Collective."""
    if reference is None:
        return None
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(reference, accelerator)
    if trainer.is_fsdp_enabled:  # TRL's `prepare_fsdp` takes it that every rank has read the weights
        return fsdp2_prepare_model(accelerator, reference)
    return accelerator.prepare_model(reference, evaluation_mode=True)
