import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig

from equipoise.data.errors import DataError
from equipoise.data.sources import SafetyData
from equipoise.eval.config import JudgeConfig
from equipoise.train import run as run_module
from equipoise.train.planning.dry_run import PlanError, plan, planned_engine
from equipoise.train.planning.engine import Engine
from equipoise.train.recipe import GateConfig, LoraConfig, ModelConfig, PlanConfig, Recipe, RecipeError
from equipoise.train.recipe.stages import TokenBiasStageConfig
from equipoise.train.run import run


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, make_stage: Any) -> Recipe:
    return Recipe(
        name="test",
        output_dir=str(tmp_path / "outputs"),
        dry_run=True,
        stages={"safe": make_stage(evaluate=True), "token_bias": TokenBiasStageConfig(num_prompts=4)},
        model=ModelConfig(id=str(tiny_model_folder), dtype="float32"),
    )


def told(recipe: Recipe, data: SafetyData, capsys: pytest.CaptureFixture[str]) -> str:
    """Everything that a plan says and prints."""
    said: list[str] = []
    plan(recipe, data, recipe.model.id, said.append, lambda *call: None)
    return "\n".join([*said, capsys.readouterr().out])


def test_a_dry_run_writes_nothing(
    recipe: Recipe,
    tmp_path: Path,
    make_data: Callable[..., SafetyData],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "load_data", lambda *_: make_data())
    assert run(recipe) == 0
    assert list(tmp_path.iterdir()) == []
    assert "nothing was trained, nothing was written" in " ".join(capsys.readouterr().out.split())


def test_the_plan(
    recipe: Recipe,
    make_data: Callable[..., SafetyData],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = told(recipe, make_data(), capsys)
    assert "safe: pairs by category: S1 8, S2 8, S10 8, helpful 8" in text
    assert "token_bias" in text
    assert "3 states" in text  # base, after safe, after the token bias
    assert "0 M parameters" in text


def test_pairs_that_are_too_long_are_told(
    recipe: Recipe, make_data: Callable[..., SafetyData], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.data.max_length = 70
    assert "pairs are longer than data.max_length=70 tokens and left out" in told(recipe, make_data(), capsys)
    recipe.data.max_length = 10
    with pytest.raises(DataError, match=r"none of 32 pairs fits into data\.max_length=10"):
        told(recipe, make_data(), capsys)


def test_a_share_of_nothing_is_found(
    recipe: Recipe, make_data: Callable[..., SafetyData], capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data()
    data.helpful_pairs.clear()
    with pytest.raises(
        RecipeError, match=r"mixture: helpful has a share of 0\.25, but the data has no helpful pairs"
    ):
        told(recipe, data, capsys)


def test_full_fine_tuning_is_planned_too(
    recipe: Recipe, make_data: Callable[..., SafetyData], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.model.lora = LoraConfig(enabled=False)
    assert "GiB" in told(recipe, make_data(), capsys)


# ---- for another machine, and what cannot fit -----------------------------------------------------------------------


@pytest.fixture
def llama_7b(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A folder with the configuration of a Llama 2 of 7B and a tokenizer, and no weights."""
    folder = tmp_path / "llama_7b"
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


def seven_b(recipe: Recipe, folder: Path, **plan: Any) -> Recipe:
    recipe.stages.pop("token_bias", None)
    recipe.model = ModelConfig(id=str(folder), dtype="bfloat16", lora=LoraConfig(enabled=False))
    recipe.plan = PlanConfig(**plan)
    return recipe


def test_a_7b_is_planned_on_a_laptop_from_its_configuration_alone(
    recipe: Recipe, llama_7b: Path, make_data: Any, capsys: Any
) -> None:
    """Full fine-tuning on one GPU: 4 w P = 50 GiB and activations."""
    text = told(seven_b(recipe, llama_7b, gpu="h100"), make_data(), capsys)
    assert "6738 M parameters" in text
    assert "single, on H100 at 989,000 GFLOP/s (as its data sheet says)" in text
    assert "about 55.2 GiB" in text  # 50.2 of weights, gradients and moments
    recipe.plan = PlanConfig(gpu="h100", num_processes=8, engine="fsdp2")
    assert "fsdp2 over 8 devices" in told(recipe, make_data(), capsys)


def test_what_cannot_fit_is_refused_with_what_would(
    recipe: Recipe, llama_7b: Path, make_data: Any, capsys: Any
) -> None:
    with pytest.raises(PlanError) as refused:
        told(seven_b(recipe, llama_7b, gpu="h100", memory_gib=24), make_data(), capsys)
    message = str(refused.value)
    assert "H100 has 24.0 GiB a device, of which a plan may fill 90%: 21.6 GiB" in message
    assert re.search(r"safe: 5\d\.\d GiB \(weights 12\.6, states 37\.7", message)
    ways = message.split("the cheapest first:\n")[1].splitlines()
    assert ways[0].startswith("  model.lora.enabled=true")  # one GPU before two
    assert any("model.quantization=nf4" in way for way in ways)
    assert any(
        "zero3_offload.yaml --num_processes 1" in way and "GiB of the machine's memory" in way for way in ways
    )
    assert any("fsdp2.yaml --num_processes 4" in way or "zero3.yaml --num_processes" in way for way in ways)
    assert ways.pop().startswith("Over n times the devices")
    assert len(ways) >= 4
    for way in ways:
        assert float(re.search(r": (\d+\.\d) GiB a device", way)[1]) <= 21.6  # type: ignore[index]


def test_a_plan_that_cannot_fit_ends_with_exit_code_2(
    recipe: Recipe, make_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from equipoise.train import cli

    monkeypatch.setattr(run_module, "load_data", lambda *_: make_data())
    arguments = [
        "recipe=dpo",
        "dry_run=true",
        f"model.id={recipe.model.id}",
        "model.dtype=float32",
        "plan.memory_gib=0.0001",
        f"output_dir={tmp_path}",
    ]
    assert cli.main(arguments) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert "The recipe does not fit" in error
    assert "Judging loads the state's model whole onto every device" in error


def test_judging_inside_a_stage_stands_beside_the_training(
    recipe: Recipe, llama_7b: Path, make_data: Any, capsys: Any
) -> None:
    """12.6 GiB judged beside 12.6 GiB and an adapter: too much for 0.9 * 24 GiB, though each alone fits."""
    planned = seven_b(recipe, llama_7b, gpu="h100", memory_gib=24)
    planned.model.lora = LoraConfig()
    assert "evaluation in safe" not in told(planned, make_data(), capsys)
    planned.gate = GateConfig(every=2)
    with pytest.raises(PlanError) as refused:
        told(planned, make_data(), capsys)
    message = str(refused.value)
    assert re.search(
        r"evaluation in safe: 2\d\.\d GiB \(weights 12\.6, states 0\.\d, evaluated 12\.6, ", message
    )
    assert "safe: 1" not in message.replace("in safe: ", "")
    assert "whole onto every device" in message
    assert "  gate.every=0: states are judged behind their stage only\n" in message
    assert "  gate.where=subprocess (or vllm) gate.devices=...: judged on a device of its own\n" in message
    assert "evaluation.batch_size=" not in message  # no batch is small enough
    ways = message.split("judging as it is, the cheapest first:\n")[1].splitlines()
    assert ways[0].startswith("  model.quantization=nf4")  # 3.6 GiB beside 12.6

    planned.gate = GateConfig(every=2, where="subprocess")
    with pytest.raises(PlanError, match=r"evaluation in safe: (?s:.*) whole onto the first rank's device"):
        told(planned, make_data(), capsys)
    planned.gate.devices = "7"
    assert "elsewhere" in told(planned, make_data(), capsys)


def test_the_judge_stays_beside_the_training(
    recipe: Recipe, llama_7b: Path, make_data: Any, capsys: Any
) -> None:
    """It has judged the base: 12.6 GiB of another 7B, unless a process of its own judges."""
    planned = seven_b(recipe, llama_7b, gpu="h100", memory_gib=24)
    planned.model.lora = LoraConfig()
    planned.judge = JudgeConfig(name="llama_guard", model=str(llama_7b), dtype="bfloat16")
    with pytest.raises(
        PlanError, match=r"  safe: 3\d\.\d GiB \(weights 12\.6, states 0\.\d, judge 12\.6"
    ) as refused:
        told(planned, make_data(), capsys)
    assert re.search(r"  evaluation: 2\d\.\d GiB \(evaluated 12\.6, judge 12\.6", str(refused.value))
    assert "  judge.engine=server judge.url=...: the judge on a machine of its own\n" in str(refused.value)
    planned.gate = GateConfig(where="subprocess", devices="7")
    told(planned, make_data(), capsys)


def test_smaller_batches_are_judged_where_those_fit(
    recipe: Recipe, llama_7b: Path, make_data: Any, capsys: Any
) -> None:
    planned = seven_b(recipe, llama_7b, gpu="h100", memory_gib=24)
    planned.model.lora = LoraConfig()
    planned.evaluation.batch_size = 64
    planned.evaluation.max_new_tokens = 512
    with pytest.raises(
        PlanError, match=r"  evaluation: (?s:.*)  evaluation\.batch_size=(\d+): (\d+\.\d) GiB"
    ) as refused:
        told(planned, make_data(), capsys)
    found = re.search(r"evaluation\.batch_size=(\d+)", str(refused.value))
    assert found
    planned.evaluation.batch_size = int(found[1])
    told(planned, make_data(), capsys)
    planned.evaluation.batch_size *= 2
    with pytest.raises(PlanError):
        told(planned, make_data(), capsys)


def test_the_engine_that_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned_engine(PlanConfig()) == Engine("single", 1)
    assert planned_engine(PlanConfig(num_processes=4)) == Engine("ddp", 4)
    assert planned_engine(PlanConfig(engine="zero3", num_processes=4, offload="all")) == Engine(
        "zero3", 4, "all"
    )
    monkeypatch.setattr(Engine, "launched", classmethod(lambda cls: cls("zero2", 2, "optimizer")))
    assert planned_engine(PlanConfig()) == Engine("zero2", 2, "optimizer")
    assert planned_engine(PlanConfig(num_processes=64)) == Engine("zero2", 64, "optimizer")
