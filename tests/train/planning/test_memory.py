import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.train.model import quantization_config
from equipoise.train.planning.memory import Memory, ModelSize, Training
from equipoise.train.recipe import LoraConfig as RecipeLora
from equipoise.train.recipe import ModelConfig
from equipoise.train.trainers.completion_head import add_completion_head

LLAMA_8B = ModelSize(8_030_261_248, 32, 4096, 4096, 1024, 14336, 128256)


def llama(num_layers: int = 2, **keys: Any) -> LlamaConfig:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    return LlamaConfig(num_hidden_layers=num_layers, num_key_value_heads=2, **(sizes | keys))


def setup(size: ModelSize, lora: bool = True, dtype: str = "bfloat16", **keys: Any) -> Training:
    return Training.of(ModelConfig(dtype=dtype, lora=RecipeLora(enabled=lora, r=16), **keys), size)


def kept_bytes(
    num_layers: int,
    dtype: torch.dtype,
    rank: int | None,
    checkpointing: bool,
    four_bits_in: Path | None = None,
) -> int:
    """Bytes that autograd keeps of a forward pass over 2 x 32 tokens, parameters not counted."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(llama(num_layers)).to(dtype)
    if four_bits_in is not None:
        model.save_pretrained(four_bits_in / str(num_layers))
        config = quantization_config(ModelConfig(dtype=str(dtype).removeprefix("torch."), quantization="nf4"))
        model = LlamaForCausalLM.from_pretrained(
            four_bits_in / str(num_layers), quantization_config=config, dtype=dtype
        )
    if rank is not None:
        config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        model.enable_input_require_grads()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    add_completion_head(model)
    model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16) if dtype is torch.bfloat16 else contextlib.nullcontext()
    mask = torch.full((32, 32), torch.finfo(dtype).min, dtype=dtype).triu(1).expand(2, 1, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        model(
            input_ids=torch.randint(0, 96, (2, 32)),
            attention_mask=mask,
            position_ids=torch.arange(32).expand(2, -1),
            completion_index=torch.arange(4),
            completion_targets=torch.zeros(4, dtype=torch.long),
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [8, None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_layer_keeps(dtype: str, rank: int | None, checkpointing: bool) -> None:
    width = 2 if dtype == "bfloat16" else 4
    counted = kept_bytes(3, getattr(torch, dtype), rank, checkpointing)
    counted -= kept_bytes(1, getattr(torch, dtype), rank, checkpointing)
    training = Training(ModelSize.of(llama(3), 0), width, rank, checkpointing, frozen_copy=False)
    a_layer = training.size.hidden_size if checkpointing else training.kept_a_layer()
    copies = (
        0
        if checkpointing or rank is None or width == 4
        else 2 * training.size.adapter_parameters(rank) * 2 / 3
    )
    assert counted == pytest.approx(
        2 * 64 * width * a_layer + copies, rel=0.03
    )  # two of three layers, 64 tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_layer_keeps_over_four_bits(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra equipoise[quantization] is not installed")
    width = 2 if dtype == "bfloat16" else 4
    counted = kept_bytes(3, getattr(torch, dtype), 8, False, tmp_path)
    counted -= kept_bytes(1, getattr(torch, dtype), 8, False, tmp_path)
    training = Training(ModelSize.of(llama(3), 0), width, 8, False, frozen_copy=False, quantised=True)
    copies = 0 if width == 4 else 2 * training.size.adapter_parameters(8) * 2 / 3
    assert counted == pytest.approx(2 * 64 * width * training.kept_a_layer() + copies, rel=0.03)


def test_adapters_are_counted_as_peft_makes_them() -> None:
    model = LlamaForCausalLM(llama(3, head_dim=32, attention_bias=False))
    size = ModelSize.of(model.config, sum(p.numel() for p in model.parameters()))
    assert (size.attention_size, size.key_size) == (128, 64)
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert size.adapter_parameters(5) == trained


def test_eight_billion_by_hand() -> None:
    """Llama 3.1 8B in bf16, LoRA of rank 16, gradient checkpointing, 8,192 tokens."""
    training = setup(LLAMA_8B, gradient_checkpointing=True)
    memory = training.policy(8192, reference=True)
    adapter = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert adapter == 41_943_040  # what PEFT prints for this model
    assert memory.weights == 2 * 8_030_261_248
    assert memory.states == 16 * adapter + 2 * adapter
    kept = 4 * 4096 + 10 * 4096 + 4 * 14336 + 7 * 16
    assert memory.activations == 2 * 8192 * (32 * 4096 + 2 * kept)
    assert memory.logits == (2 * 4 + 2) * 256 * 128256
    assert memory.total == memory.weights + memory.states + memory.activations + memory.logits
    assert training.cache(1, 1) == 2 * 2 * 32 * 1024 + 12 * 128256  # and a row of logits


def test_one_backbone_or_five_models() -> None:
    training = setup(LLAMA_8B, gradient_checkpointing=True)
    keys: dict[str, Any] = {
        "num_tokens": 4096,
        "num_answers": 16,
        "length": 640,
        "critics": True,
        "vllm": False,
    }
    shared, separate = training.safe_rlhf(shared=True, **keys), training.safe_rlhf(shared=False, **keys)
    assert separate.weights == 5 * shared.weights == 5 * training.weights
    adapter = LLAMA_8B.adapter_parameters(16)
    assert shared.states == separate.states == 3 * 18 * adapter + 2 * 6 * adapter
    assert shared.total < 80e9 < separate.total
    without_critics = training.safe_rlhf(shared=True, **{**keys, "critics": False})
    assert without_critics.states == 18 * adapter + 2 * 6 * adapter


def test_sampling_and_learning_are_not_at_the_same_time() -> None:
    training = setup(LLAMA_8B)
    short = training.sampled(num_tokens=8, num_answers=64, length=4096, scorers=0, vllm=False)
    assert (short.cache, short.activations) == (training.cache(64, 4096), 0)
    long = training.sampled(num_tokens=8192, num_answers=1, length=16, scorers=1, vllm=False)
    assert (long.cache, long.activations) == (0, training.activations(8192))
    assert long.weights == 2 * training.weights
    assert training.sampled(8, 64, 4096, scorers=0, vllm=True).cache == 0


def test_full_fine_tuning_holds_a_reference_and_its_moments() -> None:
    training = setup(LLAMA_8B, lora=False)
    assert training.policy(1, reference=True).weights == 2 * training.weights
    assert training.policy(1, reference=False).weights == training.weights
    assert training.policy(1, reference=False).states == 3 * training.weights
    assert training.scorer(1).logits == 0
    assert Memory().total == 0
