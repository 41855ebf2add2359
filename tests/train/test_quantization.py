"""QLoRA: trained on 4-bit weights, saved and judged on the originals. Runs truly on a CPU, with bitsandbytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from equipoise.data.schema import HELPFUL
from equipoise.train import training
from equipoise.train.model import adapters_in_fp32, load_policy, load_trainable, save_merged
from equipoise.train.recipe import LoraConfig, ModelConfig
from equipoise.train.recipe.stages import CostModelStageConfig, KLConfig, KTOStageConfig, SFTStageConfig
from equipoise.train.stages.kto import run_kto
from equipoise.train.stages.scorer import run_cost_model
from equipoise.train.stages.sft import run_sft

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="the extra equipoise[quantization] is not installed"
)

NF4 = {"quantization": "nf4"}


def test_the_linear_layers_take_four_bits(tiny_model_folder: Path) -> None:
    model, _ = load_trainable(ModelConfig(id=str(tiny_model_folder), dtype="float32", **NF4), None)
    quantised = {name for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(quantised) == 2 * 7  # of two layers; not the embeddings, not the head
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.uint8
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 32 * 64 // 2
    assert model.lm_head.weight.dtype is torch.float32
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)


def test_what_is_judged_is_never_quantised(tiny_model_folder: Path) -> None:
    model, _ = load_policy(ModelConfig(id=str(tiny_model_folder), dtype="float32", **NF4), None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_stage_trains_on_four_bits_and_leaves_the_original_weights(
    train_stage: Any, make_stage: Any, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: set[torch.dtype] = set()
    train = training.train

    def spy(trainer: Any, *args: Any, **kwargs: Any) -> None:
        train(trainer, *args, **kwargs)
        dtypes.update(p.dtype for p in trainer.model.parameters() if p.requires_grad)
        assert getattr(trainer.model.get_base_model(), "is_loaded_in_4bit", False)

    monkeypatch.setattr("equipoise.train.stages.log_ratios.train", spy)
    stage = make_stage(kl=KLConfig(coef=0.1))
    trained = train_stage(stage, model=NF4)
    assert dtypes == {torch.float32}  # TRL would have trained in bf16
    assert trained.series("train/loss")[-1] < trained.series("train/loss")[0] - 0.03
    assert trained.series("train/kl")[0] == pytest.approx(0, abs=1e-6)  # the reference is the quantised base

    before, after = load_file(tiny_model_folder / "model.safetensors"), trained.weights
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    # What ships is the original weight plus the adapter's product: their difference has the adapter's rank.
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    whole: Any = PeftModel.from_pretrained(base, trained.folder / "adapter").merge_and_unload()
    for name, tensor in whole.state_dict().items():
        if name in after:
            torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((after[name] - before[name]).abs().max()) > 1e-4
    assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 16
    assert "quantization_config" not in (Path(trained.result.model_folder) / "config.json").read_text()


def test_the_quantised_reference_has_log_probabilities_of_its_own(train_stage: Any, make_stage: Any) -> None:
    """Cached under another name than those of the full weights, and found again."""
    train_stage(make_stage(num_steps=1), run="full")
    first = train_stage(make_stage(num_steps=1), run="first", model=NF4)
    again = train_stage(make_stage(num_steps=1), run="again", model=NF4)
    assert (first.result.facts["reference_cache_hit"], again.result.facts["reference_cache_hit"]) == (
        False,
        True,
    )
    assert first.series("train/loss") == again.series("train/loss") == [pytest.approx(0.693147, abs=1e-5)]


def test_a_policy_in_training_is_saved_as_it_ships(tiny_model_folder: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    from equipoise.train.model import peft_config

    config = ModelConfig(id=str(tiny_model_folder), dtype="float32", **NF4)
    model, tokenizer = load_trainable(config, None)
    adapter = peft_config(config)
    assert adapter is not None
    policy: Any = get_peft_model(model, adapter)
    adapters_in_fp32(policy)
    save_merged(policy, tokenizer, config, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")  # the adapter adds nothing yet
    before = load_file(tiny_model_folder / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert policy.get_base_model().model.layers[0].mlp.up_proj.weight.dtype is torch.uint8  # as it was


@pytest.mark.parametrize(
    ("stage", "runner"),
    [
        (SFTStageConfig(mixture={"safety": 0.5, HELPFUL: 0.5}), run_sft),
        (KTOStageConfig(split_pairs=True), run_kto),
        (CostModelStageConfig(held_out_fraction=0.0), run_cost_model),
    ],
    ids=["sft", "kto", "cost_model"],
)
def test_other_trainers(stage: Any, runner: Any, train_stage: Any) -> None:
    stage.num_steps, stage.learning_rate, stage.evaluate = 6, 5e-3, False
    stage.lr_scheduler, stage.warmup = "constant", 0.0
    trained = train_stage(stage, runner=runner, model=NF4)
    losses = trained.series("train/loss")
    assert losses[-1] < losses[0]


def test_full_fine_tuning_needs_whole_weights(check_model: Any) -> None:
    """See tests/train/recipe for the other checks of keys."""
    assert "4-bit weights cannot be trained" in check_model(lora=LoraConfig(enabled=False), **NF4)
    assert "model.reference=auto" in check_model(reference="frozen_copy", **NF4)
    assert "possible: none, nf4" in check_model(quantization="int3")


@pytest.fixture
def check_model() -> Any:
    """`check_model(**keys)`: what is wrong with a recipe's model."""
    from equipoise.train.recipe.checks import Problems, _check_model

    def check(**keys: Any) -> str:
        problems = Problems(raw={})
        _check_model(ModelConfig(**keys), problems)
        return str(problems.found)

    return check
