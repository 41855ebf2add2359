import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equipoise.data.errors import DataError
from equipoise.eval.models import load_model
from equipoise.eval.scorer_card import ScorerError
from equipoise.train.recipe import LoraConfig, ModelConfig, Recipe, RecipeError
from equipoise.train.recipe.checks import Problems
from equipoise.train.recipe.data_checks import check_data
from equipoise.train.recipe.rl import MultiplierUpdateConfig, RolloutConfig, SafeRLHFStageConfig
from equipoise.train.recipe.safe_rlhf_checks import constrained, policy_origin
from equipoise.train.recipe.stage_checks import check_stages
from equipoise.train.recipe.stages import (
    CostModelStageConfig,
    PreferenceStageConfig,
    RewardModelStageConfig,
    StageConfig,
)
from equipoise.train.stages.safe_rlhf import check_given_scorers, check_launch, run_safe_rlhf
from equipoise.train.training import STATE_FILE, TrainingError


@pytest.fixture
def make(scorers: dict[str, str]) -> Callable[..., SafeRLHFStageConfig]:
    """A stage of four steps of four short answers."""

    def make(**keys: Any) -> SafeRLHFStageConfig:
        defaults: dict[str, Any] = {
            "num_steps": 4,
            "per_device_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "critic_learning_rate": 1e-2,
            "rollout": RolloutConfig(max_new_tokens=5, batch_size=8),
            "reward_model": scorers["reward"],
            "cost_model": scorers["cost"],
            "evaluate": False,
        }
        return SafeRLHFStageConfig(**(defaults | keys))

    return make


Make = Callable[..., SafeRLHFStageConfig]


# ---- from folder to folder ------------------------------------------------------------------------------------------


def test_a_stage_trains_and_says_what_it_did(make: Make, train_stage: Any, tiny_model_folder: Path) -> None:
    stage = make(
        save_every=2,
        multiplier=MultiplierUpdateConfig(per_category=True, thresholds={"S1": -1.0, "helpful": 0.0}),
    )
    trained = train_stage(stage, runner=run_safe_rlhf)
    assert [m["step"] for m in trained.metrics] == [1, 2, 3, 4]
    for metrics in trained.metrics:
        assert metrics["train/num_episodes"] == 4
        assert {f"train/lambda/{c}" for c in ("S1", "S2", "S10", "helpful")} <= metrics.keys()
        for name in ("reward", "cost", "kl", "length", "finished_rate", "clip_fraction", "actor_loss"):
            assert f"train/{name}" in metrics
            assert f"train/{name}/helpful" in metrics
        assert metrics["train/ptx_loss"] > 0
    model, _ = load_model(trained.result.model_folder, dtype="float32")
    before, _ = load_model(str(tiny_model_folder), dtype="float32")
    changed = [
        n for n, p in model.named_parameters() if not torch.equal(p, dict(before.named_parameters())[n])
    ]
    assert changed
    assert all("proj" in name for name in changed)
    facts = trained.result.facts
    assert facts["num_episodes"] == 16
    assert facts["num_prompts"] == 32
    assert set(facts["phase_seconds"]) == {"rollout", "scoring", "update"}
    json.loads(trained.result.to_json())


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        pytest.param({}, {}, id="shared"),
        pytest.param(
            {"layout": "separate", "ptx_coef": 0.0},
            {"lora": LoraConfig(dropout=0.2)},
            id="separate with dropout",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"layout": "separate", "advantage": "rloo", "num_generations": 2, "ptx_coef": 0.0},
            {"lora": LoraConfig(enabled=False)},
            id="full fine-tuning",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(
    keys: dict[str, Any], model: dict[str, Any], make: Make, train_stage: Any
) -> None:
    stage = make(**keys, save_every=1, num_steps=3, lr_scheduler="cosine", update_epochs=2)
    whole = train_stage(stage, run="whole", runner=run_safe_rlhf, model=model)
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, run="interrupted", runner=run_safe_rlhf, model=model, interrupt_at=3)
    torch.rand(17)  # what came before in the process does not matter
    resumed = train_stage(stage, run="interrupted", runner=run_safe_rlhf, model=model)
    assert resumed.started_at == 2
    assert resumed.metrics == whole.metrics[2:]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
    left = sorted(path.name for path in (resumed.folder / "checkpoints").iterdir())
    assert left == ["checkpoint-2", "checkpoint-3"]
    state, other = (
        json.loads((run.folder / "checkpoints" / "checkpoint-3" / STATE_FILE).read_text())
        for run in (resumed, whole)
    )
    assert state == other


def test_a_checkpoint_of_other_categories_is_refused(make: Make, train_stage: Any, make_data: Any) -> None:
    stage = make(save_every=1, ptx_coef=0.0, multiplier=MultiplierUpdateConfig(per_category=True))
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, runner=run_safe_rlhf, interrupt_at=2)
    data = make_data()
    data.safety_pairs[:] = [pair for pair in data.safety_pairs if pair.category != "S2"]
    with pytest.raises(TrainingError, match="remove the folder to start the stage anew"):
        train_stage(stage, runner=run_safe_rlhf, data=data)


def test_prompts_that_leave_no_room_are_left_out_and_counted(
    make: Make, train_stage: Any, make_data: Any
) -> None:
    data = make_data()
    data.safety_pairs[0] = replace(
        data.safety_pairs[0], prompt=({"role": "user", "content": "please " * 100},)
    )
    trained = train_stage(make(num_steps=1, ptx_coef=0.0), runner=run_safe_rlhf, data=data)
    assert trained.result.facts["num_too_long"] == 1
    assert "1 of 32 prompts are longer than 507 tokens" in trained.said[0]
    assert "train/ptx_loss" not in trained.metrics[0]
    with pytest.raises(DataError, match="no prompt leaves room"):
        train_stage(make(rollout=RolloutConfig(max_new_tokens=510)), runner=run_safe_rlhf, data=data)


def test_the_stage_is_gated_on_its_way(make: Make, train_stage: Any, tmp_path: Path) -> None:
    calls = []
    stage = make(evaluate=True, num_steps=5, ptx_coef=0.0, gradient_accumulation_steps=1)

    def gate(name: str, step: int, save: Callable[[Path], None]) -> None:
        save(tmp_path / f"step-{step}")
        calls.append((name, step))

    from equipoise.train.stages import safe_rlhf

    original = safe_rlhf._gate

    def every_two(name: str, *args: Any) -> None:
        args[-1].recipe.gate.every = 2
        original(name, *args)

    safe_rlhf._gate = every_two
    try:
        train_stage(stage, runner=run_safe_rlhf, gate_inside=gate)
    finally:
        safe_rlhf._gate = original
    assert calls == [("safe", 2), ("safe", 4)]
    first, second = (load_file(tmp_path / f"step-{step}" / "model.safetensors") for step in (2, 4))
    changed = {name for name, weight in first.items() if not torch.equal(weight, second[name])}
    assert any(name.endswith("q_proj.weight") for name in changed)  # the policy's adapter, folded in
    assert not any("lora" in name for name in first)


# ---- bad input ------------------------------------------------------------------------------------------------------


def problems_of(stages: dict[str, StageConfig], **recipe: Any) -> dict[str, str]:
    made = Recipe(name="made", stages=stages, **recipe)
    problems = Problems(raw={})
    check_stages(made, problems)
    return problems.found


def chain(**keys: Any) -> dict[str, StageConfig]:
    return {
        "reward": RewardModelStageConfig(),
        "cost": CostModelStageConfig(),
        "rl": SafeRLHFStageConfig(**keys),
    }


def test_a_chain_of_its_own_scorers_is_fine() -> None:
    assert problems_of(chain()) == {}
    assert problems_of(chain(reward_model="reward", cost_model="cost")) == {}


@pytest.mark.parametrize("missing", ["reward", "cost"])
def test_a_scorer_that_is_missing_or_comes_later(missing: str) -> None:
    stages = chain()
    scorer = stages.pop(missing)
    assert (
        f"needs a {missing} model: put a stage of kind {missing}_model before it"
        in (problems_of(stages)[f"stages.rl.{missing}_model"])
    )
    stages["rl"] = SafeRLHFStageConfig(**{f"{missing}_model": "late"})
    stages["late"] = scorer
    assert "a stage that comes later" in problems_of(stages)[f"stages.rl.{missing}_model"]


def test_a_scorer_of_the_other_kind(scorers: dict[str, str]) -> None:
    found = problems_of(chain(reward_model="cost", cost_model=scorers["reward"]))
    assert "found 'cost', a cost_model stage; possible: reward" in found["stages.rl.reward_model"]
    assert "is a reward model, expected a cost model" in found["stages.rl.cost_model"]
    assert "expected" in problems_of(chain(cost_model="no/such/folder"))["stages.rl.cost_model"]


def test_one_backbone_for_all_where_it_is_shared() -> None:
    stages = {
        "reward": RewardModelStageConfig(),
        "safe": PreferenceStageConfig(),
        "cost": CostModelStageConfig(),
        "rl": SafeRLHFStageConfig(),
    }
    found = problems_of(stages)
    assert (
        "'reward' is trained on the policy of 'base', and the stage starts from that of 'safe'"
        in (found["stages.rl.reward_model"])
    )
    assert "stages.rl.cost_model" not in found
    assert problems_of(stages | {"rl": SafeRLHFStageConfig(layout="separate")}) == {}
    assert problems_of(stages | {"reward": RewardModelStageConfig(start_from="base")}) != {}
    moved = {name: stages[name] for name in ("safe", "reward", "cost", "rl")}
    assert problems_of(moved) == {}
    assert policy_origin(Recipe(name="made", stages=moved), "rl") == "safe"


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        ({"layout": "both"}, "layout", "possible: shared, separate"),
        ({"advantage": "a2c"}, "advantage", "possible: gae, rloo, grpo"),
        ({"advantage": "rloo"}, "num_generations", "expected 2 or more"),
        ({"num_generations": 3}, "num_generations", "does not divide the 8 answers"),
        ({"clip_ratio": 0.0}, "clip_ratio", "above 0"),
        ({"update_epochs": 0}, "update_epochs", "at least 1"),
        ({"mixture": {"safety": 0.0}}, "mixture", "every share is 0"),
        ({"multiplier": MultiplierUpdateConfig(initial=6.0)}, "multiplier.initial", "from 0 to"),
        (
            {"multiplier": MultiplierUpdateConfig(thresholds={"S1": 0.0})},
            "multiplier.thresholds",
            "one multiplier for all",
        ),
        (
            {"multiplier": MultiplierUpdateConfig(per_category=True, thresholds={"S99": 0.0})},
            "multiplier.thresholds.S99",
            "unknown key",
        ),
        ({"rollout": RolloutConfig(max_new_tokens=512)}, "rollout.max_new_tokens", "no room for a prompt"),
    ],
)
def test_values_that_cannot_work(keys: dict[str, Any], key: str, reason: str) -> None:
    assert reason in problems_of(chain(**keys))[f"stages.rl.{key}"]


def test_shared_needs_adapters() -> None:
    found = problems_of(chain(), model=ModelConfig(lora=LoraConfig(enabled=False)))
    assert "no adapters to share a backbone" in found["stages.rl.layout"]
    found = problems_of(chain(), model=ModelConfig(reference="frozen_copy"))
    assert "the reference is the bare backbone" in found["model.reference"]


def test_whole_models_cannot_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    full = ModelConfig(dtype="float32", lora=LoraConfig(enabled=False))
    check_launch(Recipe(name="made", stages=chain(layout="separate"), model=full))
    monkeypatch.setattr("equipoise.train.stages.safe_rlhf.shards_parameters", lambda accelerator: True)
    check_launch(Recipe(name="made", stages=chain(), model=ModelConfig(dtype="float32")))
    with pytest.raises(
        RecipeError, match=r"stages\.rl: found model\.lora\.enabled=false .* shards parameters"
    ):
        check_launch(Recipe(name="made", stages=chain(layout="separate"), model=full))


def test_what_the_data_cannot_serve(make_data: Any) -> None:
    data = make_data()
    stages = chain(multiplier=MultiplierUpdateConfig(per_category=True, thresholds={"S7": 0.0}))
    with pytest.raises(
        RecipeError, match=r"thresholds\.S7: nothing that this stage trains on has this category"
    ):
        check_data(Recipe(name="made", stages=stages), data)
    only_helpful = chain(mixture={"helpful": 1.0}, multiplier=MultiplierUpdateConfig(per_category=True))
    with pytest.raises(RecipeError, match="no prompt that this stage trains on has a harm category"):
        check_data(Recipe(name="made", stages=only_helpful), data)
    stages = {"rl": SafeRLHFStageConfig(mixture={"safety": 1.0})}
    with pytest.raises(RecipeError, match="no helpful pairs, whose chosen answers"):
        check_data(Recipe(name="made", stages=stages), replace(data, helpful_pairs=[]))


def test_helpful_prompts_are_constrained_only_by_name() -> None:
    names = ("S1", "S2", "helpful")
    config = MultiplierUpdateConfig(per_category=True, threshold=0.5, thresholds={"S2": -1.0})
    assert constrained(config, names) == {"S1": 0.5, "S2": -1.0}
    config.thresholds["helpful"] = 0.0
    assert list(constrained(config, names)) == ["S1", "S2", "helpful"]


def test_scorers_given_by_folder_are_compared_before_anything_is_trained(
    make: Make, tiny_model_folder: Path, tmp_path: Path
) -> None:
    stages: dict[str, Any] = {"rl": make()}
    model = ModelConfig(id=str(tiny_model_folder), dtype="float32")
    check_given_scorers(Recipe(name="made", stages=stages, model=model), str(tiny_model_folder))
    loaded, tokenizer = load_model(str(tiny_model_folder), dtype="float32")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "bot")
    loaded.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ScorerError, match=r"stages\.rl\.reward_model.*another tokenizer.*chat template"):
        check_given_scorers(Recipe(name="made", stages=stages, model=model), str(tmp_path / "other"))
