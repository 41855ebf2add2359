import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers.integrations import deepspeed

from equipoise.train import model
from equipoise.train.model import load_policy, merged, peft_config, save_merged
from equipoise.train.recipe import LoraConfig, ModelConfig
from equipoise.train.sharding import unsharded


@pytest.mark.parametrize("folder", [None, "somebody/model"])
def test_a_hub_model_is_loaded_at_its_revision_whoever_names_it(
    folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load_model(model_id: str, **options: Any) -> tuple[None, None]:
        asked.update(model_id=model_id, **options)
        return None, None

    monkeypatch.setattr(model, "load_model", load_model)
    model.load_policy(ModelConfig(id="somebody/model", revision="v1.0"), folder)
    assert (asked["model_id"], asked["revision"]) == ("somebody/model", "v1.0")


@pytest.mark.parametrize("lora", [True, False])
def test_a_policy_in_training_is_saved_merged_and_stays_as_it_is(
    lora: bool, tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = ModelConfig(id=str(tiny_model_folder), dtype="float32", lora=LoraConfig(enabled=lora))
    policy, tokenizer = load_policy(config, tiny_model_folder)
    adapter = peft_config(config)
    training = policy if adapter is None else get_peft_model(policy, adapter)
    torch.manual_seed(1)
    for parameter in training.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    before = {name: parameter.clone() for name, parameter in training.named_parameters()}
    random_state = torch.get_rng_state()
    save_merged(training, tokenizer, config, tmp_path / "step-2")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(parameter, before[name]) for name, parameter in training.named_parameters())
    merged(copy.deepcopy(training)).save_pretrained(tmp_path / "expected")
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("step-2", "expected"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in expected.items())
    assert (tmp_path / "step-2" / "chat_template.jinja").exists()


def test_what_an_engine_says_of_loading_is_put_aside_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero3:
        def is_zero3(self) -> bool:
            return True

    config = Zero3()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    deepspeed.set_hf_deepspeed_config(config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with unsharded():
        assert not deepspeed.is_deepspeed_zero3_enabled()
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert deepspeed.is_deepspeed_zero3_enabled()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
