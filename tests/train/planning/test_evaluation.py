"""What judging takes, against values worked out by hand: P 420, 2 layers, keys of 4, vocabulary 10, fp32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.eval.config import JudgeConfig
from equipoise.train.planning.engine import Engine
from equipoise.train.planning.evaluation import EMBEDDED_PARAMETERS, Judging, judge_bytes
from equipoise.train.planning.memory import Memory, ModelSize, Training
from equipoise.train.planning.stage_plans import StagePlan
from equipoise.train.recipe import EvaluationConfig, GateConfig, Recipe
from equipoise.train.recipe.rl import GRPOStageConfig
from equipoise.train.recipe.stages import PreferenceStageConfig

SMALL = ModelSize(420, 2, 4, 4, 4, 8, 10)
FULL = Training(SMALL, width=4, rank=None, checkpointing=False, frozen_copy=False)
ROW = StagePlan(lambda training, size: training.policy(100 * size, reference=False), steps="7")


def judging(gate: GateConfig | None = None, baseline: bool = True, **keys: Any) -> Judging:
    recipe = Recipe(
        name="test",
        stages={
            "helpful": PreferenceStageConfig(evaluate=False),
            "safe": PreferenceStageConfig(),
            "rl": GRPOStageConfig(rewards={"judge_verdict": 1.0}),
        },
        evaluation=EvaluationConfig(baseline=baseline, batch_size=3, max_new_tokens=5),
        gate=gate or GateConfig(),
    )
    sizes = {"judge": 1000.0, "longest_prompt": 6, "longest_scored": 9, "num_scored": 2, "on_gpu": True}
    return Judging(recipe, **(sizes | keys))


def test_answering_by_hand() -> None:
    """K = 4 a + 6 H + 4 I = 72; cache 2 w L k B T, next tokens' logits 3 * 4 B V; scored 2 x 9 tokens at once."""
    found = judging().behind(FULL)
    assert (found.evaluated, found.judge) == (4 * 420, 1000)
    assert found.cache == 2 * 4 * 2 * 4 * 3 * (6 + 5) + 3 * 4 * 3 * 10
    assert found.activations == 4 * 3 * 6 * 72
    assert found.total == 1680 + 1000 + 2472 + 5184


def test_scoring_by_hand() -> None:
    """Longer reference answers: their logits in the weights' dtype, and two fp32 copies of a row's."""
    found = judging(longest_scored=90).behind(FULL)
    assert found.cache == 0
    assert found.activations == 4 * 2 * 90 * 72
    assert found.logits == (4 * 2 * 90 + 8 * 90) * 10


def test_inside_a_stage_by_hand() -> None:
    """Weights and two moments beside the model that is judged; gradients are free between two steps."""
    keeper = judging(GateConfig(every=2))
    inside = keeper.inside("safe", ROW, FULL)
    assert (inside.weights, inside.states, inside.evaluated) == (1680, 2 * 1680, 1680)
    assert inside.total - keeper.behind(FULL).total == 3 * 1680
    assert keeper.times_inside(keeper.recipe.stages["safe"], ROW) == 3  # behind steps 2, 4 and 6
    assert keeper.times_inside(keeper.recipe.stages["helpful"], ROW) == 0
    sharded = replace(FULL, engine=Engine("fsdp2", 4))
    inside = keeper.inside("safe", ROW, sharded)
    assert (inside.weights, inside.states, inside.evaluated) == (
        420,
        2 * 420,
        1680,
    )  # the judged one is whole
    zero = keeper.inside("safe", ROW, replace(FULL, engine=Engine("zero2", 4)))
    assert zero.states == (4 + 12) * 420 / 4  # DeepSpeed keeps its gradients


@pytest.mark.parametrize(
    ("gate", "baseline", "held"),
    [
        (GateConfig(), True, {"helpful": 1000, "safe": 1000, "rl": 2000}),
        (GateConfig(), False, {"helpful": 0, "safe": 0, "rl": 2000}),
        (GateConfig(every=3), False, {"helpful": 0, "safe": 1000, "rl": 2000}),
        (GateConfig(where="subprocess"), True, {"helpful": 0, "safe": 0, "rl": 1000}),
    ],
)
def test_the_judge_stays_once_it_has_judged(gate: GateConfig, baseline: bool, held: dict[str, float]) -> None:
    """And a GRPO stage that is rewarded by a judge has one of its own."""
    keeper = judging(gate, baseline)
    assert {name: keeper.beside(name, ROW, Memory(weights=5)).judge for name in held} == held
    assert keeper.inside("rl", ROW, FULL).judge == 2000


def test_devices_of_its_own_are_not_in_the_plan() -> None:
    keeper = judging(GateConfig(every=2, where="vllm", devices="7"))
    assert keeper.behind(FULL) == Memory()
    assert keeper.times_inside(keeper.recipe.stages["safe"], ROW) == 0


def test_the_judges_weights(tiny_model_folder: Path) -> None:
    said: list[str] = []
    num = AutoModelForCausalLM.from_pretrained(tiny_model_folder).num_parameters()
    guard = {"model": str(tiny_model_folder), "dtype": "float32"}
    assert judge_bytes(JudgeConfig(name="llama_guard", **guard), True, said.append) == 4 * num
    both = JudgeConfig(
        name="ensemble", judges={"llama_guard": guard, "wildguard": guard | {"dtype": "bfloat16"}}
    )
    assert judge_bytes(both, True, said.append) == 6 * num
    assert judge_bytes(JudgeConfig(dtype="bfloat16"), False, said.append) == 2 * EMBEDDED_PARAMETERS
    assert judge_bytes(JudgeConfig(dtype="bfloat16"), True, said.append) == 0  # it stays on the CPU
    assert judge_bytes(JudgeConfig(name="llama_guard", engine="server", model="a"), True, said.append) == 0
    assert said == []
    assert (
        judge_bytes(JudgeConfig(name="llama_guard", model=str(tiny_model_folder / "none")), True, said.append)
        == 0
    )
    assert judge_bytes(JudgeConfig(name="llama_guard", engine="vllm", model="a"), True, said.append) == 0
    assert ["not in the plan" in line for line in said] == [True, True]


def test_lengths_are_those_of_the_data(make_data: Any, tiny_model_folder: Path) -> None:
    data = make_data()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    keeper = Judging.of(judging().recipe, data, tokenizer, True, lambda text: None)
    turns = [
        tokenizer.apply_chat_template(list(e.prompt), add_generation_prompt=True)["input_ids"]
        for e in data.harmful_prompts
    ]
    assert keeper.longest_prompt >= max(map(len, turns))
    assert keeper.num_scored == min(8, len(data.helpful_prompts))
    assert keeper.longest_scored > 0
