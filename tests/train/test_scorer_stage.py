import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, modeling_utils

from equipoise.data.schema import HELPFUL, PreferencePair
from equipoise.data.sources import SafetyData
from equipoise.data.templates import encode_turns
from equipoise.eval.scorer import load_scorer
from equipoise.eval.scorer_card import read_card
from equipoise.train.recipe import LoraConfig
from equipoise.train.recipe.stages import CostModelStageConfig, RewardModelStageConfig, WeightConfig
from equipoise.train.scorer_pairs import split_by_prompt
from equipoise.train.stages.scorer import run_cost_model, run_reward_model

FULL = {"lora": LoraConfig(enabled=False)}


SHORT: dict[str, Any] = {
    "num_steps": 4,
    "learning_rate": 1e-2,
    "lr_scheduler": "constant",
    "warmup": 0.0,
    "per_device_batch_size": 4,
    "held_out_fraction": 0.25,
}
"""Four steps of four pairs at a constant learning rate."""


def reward_stage(**options: Any) -> RewardModelStageConfig:
    return RewardModelStageConfig(**(SHORT | {"mixture": {"helpful": 0.5, "safety": 0.5}} | options))


def cost_stage(**options: Any) -> CostModelStageConfig:
    return CostModelStageConfig(**(SHORT | options))


def end_scores(folder: str, pairs: list[PreferencePair]) -> list[tuple[float, float]]:
    """(chosen, rejected) of each pair by a saved scorer, each answer in a row of its own, ended by the end token."""
    scorer, tokenizer = load_scorer(folder, "float32"), AutoTokenizer.from_pretrained(folder)

    def score(pair: PreferencePair, text: str) -> float:
        ids = encode_turns(tokenizer, [*pair.prompt, {"role": "assistant", "content": text}], prompt=False)
        ids = ids[
            : len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        ]  # the template writes a line break behind it
        row = torch.tensor([ids])
        return float(scorer(row, torch.ones_like(row)).end_scores[0])

    return [(score(pair, pair.chosen), score(pair, pair.rejected)) for pair in pairs]


# ---- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{}, FULL], ids=["lora", "full"])
def test_a_reward_model_learns_which_answer_is_preferred(
    model: dict[str, Any], train_stage: Any, make_data: Callable[..., SafetyData], tiny_model_folder: Path
) -> None:
    trained = train_stage(reward_stage(num_steps=24), runner=run_reward_model, model=model)
    result = trained.result
    assert result.model_folder == str(tiny_model_folder)  # the policy is left alone
    assert trained.metrics[0]["train/loss"] == pytest.approx(math.log(2))
    assert trained.series("train/loss")[-1] < 0.3
    assert trained.series("train/accuracy")[-1] == 1.0
    data = make_data()
    scores = end_scores(result.scorer_folder, data.safety_pairs + data.helpful_pairs)
    assert sum(chosen > rejected for chosen, rejected in scores) / len(scores) > 0.9
    card = read_card(result.scorer_folder)
    assert card.kind == "reward"
    assert card.backbone == (None if model else str(tiny_model_folder))


def test_a_cost_model_learns_what_is_unsafe(train_stage: Any, make_data: Callable[..., SafetyData]) -> None:
    trained = train_stage(cost_stage(num_steps=30), runner=run_cost_model)
    assert trained.metrics[0]["train/loss"] == pytest.approx(3 * math.log(2))
    scores = end_scores(trained.result.scorer_folder, make_data().safety_pairs)
    assert sum(chosen < 0 < rejected for chosen, rejected in scores) / len(scores) > 0.9
    last = trained.metrics[-1]
    assert last["held_out/sign_accuracy"] > 0.9
    assert last["held_out/accuracy"] > 0.9
    assert read_card(trained.result.scorer_folder).kind == "cost"


def test_the_first_losses_are_the_formulas(train_stage: Any, make_data: Callable[..., SafetyData]) -> None:
    """After one step at a known head the logged scores give the logged loss."""
    trained = train_stage(reward_stage(num_steps=3, per_device_batch_size=1), runner=run_reward_model)
    for line in [m for m in trained.metrics if "train/loss" in m]:
        chosen, rejected = line["train/chosen_score"], line["train/rejected_score"]
        expected = math.log1p(math.exp(rejected - chosen)) + 0.001 * (chosen**2 + rejected**2)
        assert line["train/loss"] == pytest.approx(expected, rel=1e-5)
    trained = train_stage(cost_stage(num_steps=3, per_device_batch_size=1), run="cost", runner=run_cost_model)
    for line in [m for m in trained.metrics if "train/loss" in m]:
        safer, unsafer = line["train/chosen_score"], line["train/rejected_score"]
        expected = sum(math.log1p(math.exp(-z)) for z in (unsafer - safer, unsafer, -safer))
        assert line["train/loss"] == pytest.approx(expected + 0.001 * (safer**2 + unsafer**2), rel=1e-5)


def test_one_row_or_two_rows_a_pair_give_the_same(train_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = train_stage(reward_stage(), run="shared", runner=run_reward_model)
    monkeypatch.setattr("equipoise.train.training.can_share_prompt", lambda *_: False)
    apart = train_stage(reward_stage(), run="apart", runner=run_reward_model)
    assert shared.result.facts["one_row_a_pair"] is True
    assert apart.result.facts["one_row_a_pair"] is False
    assert "a row of its own" in apart.said[0]
    assert apart.series("train/loss") == pytest.approx(shared.series("train/loss"), rel=1e-4)


def test_gradient_accumulation_changes_nothing(train_stage: Any) -> None:
    whole = train_stage(reward_stage(), run="whole", runner=run_reward_model)
    stage = reward_stage(per_device_batch_size=1, gradient_accumulation_steps=4)
    pieces = train_stage(stage, run="pieces", runner=run_reward_model)
    assert pieces.series("train/loss") == pytest.approx(whole.series("train/loss"), rel=1e-4)
    assert pieces.series("train/accuracy") == whole.series("train/accuracy")


# ---- which pairs ----------------------------------------------------------------------------------------------------


def test_labels_decide_which_answer_is_the_more_harmful(
    train_stage: Any, make_data: Callable[..., SafetyData]
) -> None:
    data = make_data()
    turned = [
        replace(p, chosen=p.rejected, rejected=p.chosen, chosen_safe=False, rejected_safe=True)
        for p in data.safety_pairs[:4]
    ]
    data.safety_pairs[:4] = turned
    data.safety_pairs[4] = replace(data.safety_pairs[4], rejected_safe=None)
    plain = train_stage(cost_stage(), run="plain", runner=run_cost_model)
    trained = train_stage(cost_stage(), run="turned", runner=run_cost_model, data=data)
    assert trained.result.facts["num_swapped"] == 4
    assert trained.result.facts["num_unlabelled"] == 1
    num = {
        run.folder.parts[-3]: run.result.facts["num_pairs"] + run.result.facts["num_held_out"]
        for run in (plain, trained)
    }
    assert num == {"plain": 24, "turned": 23}


def test_answers_to_helpful_prompts_are_safe_and_have_no_order(train_stage: Any) -> None:
    stage = cost_stage(mixture={"safety": 0.5, "helpful": 0.5}, num_steps=12, per_device_batch_size=8)
    trained = train_stage(stage, runner=run_cost_model)
    last = [m for m in trained.metrics if "train/loss" in m][-1]
    assert last["train/num_pairs/helpful"] == 4
    assert f"train/accuracy/{HELPFUL}" not in last  # neither answer is the more harmful one
    assert last[f"train/sign_accuracy/{HELPFUL}"] >= 0.5
    rates = trained.result.facts["held_out"]
    assert set(rates[HELPFUL]) == {"sign_accuracy"}
    assert rates[HELPFUL]["sign_accuracy"]["num"] == 4  # two pairs, four answers
    assert rates["all"]["accuracy"]["num"] == 6


def test_held_out_pairs_are_not_trained_on(train_stage: Any) -> None:
    stage = reward_stage(mixture={"safety": 1.0}, num_steps=None, num_epochs=1.0, eval_every=2)
    trained = train_stage(stage, runner=run_reward_model)
    facts = trained.result.facts
    assert (facts["num_pairs"], facts["num_held_out"], facts["num_draws"]) == (18, 6, 20)
    rates = facts["held_out"]
    assert {name: value["accuracy"]["num"] for name, value in rates.items()} == {
        "all": 6,
        "S1": 2,
        "S2": 2,
        "S10": 2,
    }
    value = rates["all"]["accuracy"]
    assert 0 <= value["low"] < value["rate"] <= value["high"] <= 1
    assert [m["step"] for m in trained.metrics if "held_out/loss" in m] == [2, 4, 5]
    assert any("held-out pairs: accuracy" in line for line in trained.said)


def test_a_category_may_be_held_out_altogether(
    train_stage: Any, make_data: Callable[..., SafetyData]
) -> None:
    """Its only prompt is one that another category holds out."""
    data = make_data()
    _, held_out = split_by_prompt(data.safety_pairs, 0.25, seed=0)
    shared = next(pair for pair in held_out if pair.category == "S1")
    data.safety_pairs.append(replace(shared, id="twin", category="S13"))
    trained = train_stage(reward_stage(mixture={"safety": 1.0}), runner=run_reward_model, data=data)
    assert trained.result.facts["held_out"]["S13"]["accuracy"]["num"] == 1
    assert not any("train/loss/S13" in m for m in trained.metrics)


def test_nothing_held_out(train_stage: Any) -> None:
    trained = train_stage(reward_stage(held_out_fraction=0.0), runner=run_reward_model)
    assert trained.result.facts["num_held_out"] == 0
    assert "held_out" not in trained.result.facts
    assert not any("held_out/loss" in m for m in trained.metrics)


def test_category_weights_move_the_loss(train_stage: Any, make_data: Callable[..., SafetyData]) -> None:
    data = make_data()
    data.safety_pairs[:] = [p for p in data.safety_pairs if p.category == "S1"] + [
        p for p in data.safety_pairs if p.category == "S2"
    ][:2]
    stage = reward_stage(mixture={"safety": 1.0}, weight=WeightConfig(mode="inverse_frequency"))
    trained = train_stage(stage, runner=run_reward_model, data=data)
    first = trained.metrics[0]
    assert first["category/weight/S2"] > 1 > first["category/weight/S1"] > 0


# ---- what is left behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "runner"),
    [(reward_stage(mixture={"safety": 1.0}), run_reward_model), (cost_stage(), run_cost_model)],
    ids=["reward", "cost"],
)
def test_normalised_scores(
    stage: Any, runner: Any, train_stage: Any, make_data: Callable[..., SafetyData]
) -> None:
    stage = replace(stage, held_out_fraction=0.0, normalise=True)
    trained = train_stage(stage, runner=runner)
    scores = torch.tensor(end_scores(trained.result.scorer_folder, make_data().safety_pairs))
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-3)
    facts = trained.result.facts
    if stage.kind == "reward_model":
        assert float(scores.mean()) == pytest.approx(0.0, abs=1e-3)
        assert facts["score_mean"] != 0.0
    else:  # 0 stays where safe and unsafe meet
        assert facts["score_mean"] == 0.0
        assert abs(float(scores.mean())) > 1e-2
    assert facts["score_std"] != 1.0


def tensors(folder: str) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in Path(folder).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(
    "model", [{}, FULL, {"lora": LoraConfig(dropout=0.2)}], ids=["lora", "full", "dropout"]
)
def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(
    model: dict[str, Any], train_stage: Any, tmp_path: Path
) -> None:
    stage = cost_stage(
        num_steps=5, save_every=2, eval_every=2, weight=WeightConfig(mode="group_dro", eta=1.0)
    )
    whole = train_stage(stage, run="whole", runner=run_cost_model, model=model)
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, run="interrupted", runner=run_cost_model, model=model, interrupt_at=5)
    checkpoint = tmp_path / "interrupted" / "stages" / "safe" / "checkpoints" / "checkpoint-4"
    names = set(load_file(checkpoint / "model.safetensors"))
    assert "score_head.weight" in names
    assert model or all(
        "lora_" in name or name.startswith("score_head") for name in names
    )  # no frozen weight
    resumed = train_stage(stage, run="interrupted", runner=run_cost_model, model=model)
    assert resumed.started_at == 4
    assert resumed.metrics == [m for m in whole.metrics if m["step"] > 4]
    expected = tensors(whole.result.scorer_folder)
    found = tensors(resumed.result.scorer_folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_policys_weights_are_not_touched(train_stage: Any, tiny_model_folder: Path) -> None:
    before = (tiny_model_folder / "model.safetensors").read_bytes()
    trained = train_stage(reward_stage(), runner=run_reward_model, model=FULL)
    assert (tiny_model_folder / "model.safetensors").read_bytes() == before
    assert not (trained.folder / "model").exists()
    config = json.loads((Path(trained.result.scorer_folder) / "config.json").read_text())
    assert config["score_type"] == "reward"


def test_gradient_checkpointing_changes_nothing(train_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_stage(reward_stage(num_steps=2), run="plain", runner=run_reward_model)
    recomputed = []
    checkpoint = modeling_utils.checkpoint
    monkeypatch.setattr(
        modeling_utils, "checkpoint", lambda *a, **k: recomputed.append(1) or checkpoint(*a, **k)
    )
    model = {"gradient_checkpointing": True}
    saving = train_stage(reward_stage(num_steps=2), run="saving", runner=run_reward_model, model=model)
    assert len(recomputed) == 2 * 2  # steps times layers
    assert saving.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-5)
