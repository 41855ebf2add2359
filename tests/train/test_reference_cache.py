from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from equipoise.train.reference_cache import cache_file, load, save, weights_fingerprint


def test_what_is_saved_is_loaded(cache: Path) -> None:
    path = cache_file("model", "data", "float32")
    assert cache in path.parents
    chosen, rejected = torch.tensor([-1.5, -2.5, 0.0]), torch.tensor([-3.0, -4.0, 1e-7])
    save(path, chosen, rejected)
    loaded = load(path, 3)
    assert loaded is not None
    assert torch.equal(loaded[0], chosen)
    assert torch.equal(loaded[1], rejected)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing was left aside


def test_what_cannot_be_used_is_computed_anew(cache: Path) -> None:
    path = cache_file("model", "data", "float32")
    assert load(path, 3) is None
    save(path, torch.zeros(3), torch.zeros(3))
    assert load(path, 4) is None  # of other pairs
    path.write_bytes(path.read_bytes()[:20])
    assert load(path, 3) is None  # torn
    path.write_bytes(b"")
    assert load(path, 3) is None


def test_model_data_and_dtype_name_the_file(cache: Path) -> None:
    paths = {
        cache_file(model, data, dtype)
        for model in ("a", "b")
        for data in ("c", "d")
        for dtype in ("float32", "bfloat16")
    }
    assert len(paths) == 8


def test_an_adapter_leaves_the_fingerprint_alone(tiny_model: LlamaForCausalLM) -> None:
    plain = weights_fingerprint(tiny_model)
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert weights_fingerprint(model) == plain
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    assert weights_fingerprint(model) == plain


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_the_least_change_of_a_weight_changes_it(name: str, tiny_model: LlamaForCausalLM) -> None:
    plain = weights_fingerprint(tiny_model)
    with torch.no_grad():
        weight = tiny_model.get_parameter(name)
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))
    assert weights_fingerprint(tiny_model) != plain


def test_bf16_weights_have_a_fingerprint_of_their_own(tiny_model: LlamaForCausalLM) -> None:
    assert weights_fingerprint(tiny_model) != weights_fingerprint(tiny_model.bfloat16())
