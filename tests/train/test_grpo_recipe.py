from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_module

from equipoise.data.sources import SafetyData
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.data_checks import check_data
from equipoise.train.recipe.loading import load_recipe


def loaded(*overrides: str) -> Recipe:
    with initialize_config_module("equipoise.recipes", version_base="1.3"):
        return load_recipe(compose("config", ["recipe=rlvf", *overrides]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.answer.num_generations=5", "num_generations: found 5, expected a divisor of the 64 answers"),
        ("+stages.answer.num_iterations=3", "save_every: found 4, expected a multiple of num_iterations=3"),
        ("stages.answer.num_generations=1", "num_generations: found 1, expected at least 2"),
        ("stages.answer.mixture.arithmetic=0", "mixture: every share is 0"),
        ("+stages.answer.mixture.math=1", "mixture.math: unknown key"),
        ("+stages.answer.mixture.file=1", "path: has to be given with mixture.file > 0"),
        ("+stages.answer.path=nowhere.jsonl", "path: found 'nowhere.jsonl', but mixture.file is 0"),
        ("+stages.answer.arithmetic.shares.division_1=1", "arithmetic.shares.division_1: unknown category"),
        ("+stages.answer.rewards.cost=1", "rewards.cost: its weight is its multiplier"),
        ("+stages.answer.rewards.numeric=1", "rewards.numeric: unknown key; did you mean 'numeric_answer'"),
        ("stages.answer.rewards.calibrated_abstention=0", "rewards: every weight is 0"),
        (
            "+stages.answer.rewards.answer_format=1",
            "format_pattern: has to be given with rewards.answer_format",
        ),
        ("+stages.answer.format_pattern=x", "format_pattern: found 'x', but rewards has no answer_format"),
        ("+stages.answer.length_limit=4", "length_limit: found 4, but rewards has no response_length"),
        ("stages.answer.threshold=1", "threshold: found 1.0, expected a confidence in"),
        ("stages.answer.max_completion_length=160", "max_completion_length: found 160, expected less than"),
        ("stages.answer.loss_type=ppo", "loss_type: found 'ppo'"),
        (
            "+stages.answer.cost.model=warm_up",
            "cost.model: found 'warm_up', a stage of kind sft, not cost_model",
        ),
        ("+stages.answer.cost.model=answer", "cost.model: found 'answer', a stage that does not come before"),
        ("+stages.answer.cost.model=nowhere", "cost.model: found 'nowhere', expected an earlier cost_model"),
        (
            "+stages.answer.cost.multiplier.thresholds={S1: 0}",
            "cost.multiplier.thresholds: needs per_category",
        ),
        ("+stages.answer.vllm.enabled=true", "vllm.enabled: found True, but vllm is not installed"),
        ("+stages.answer.weight.mode=dro", "weight.mode: found 'dro', possible"),
    ],
)
def test_what_cannot_work_is_said(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"stages.answer.{message}"):
        loaded(override)


def test_a_warm_up_is_on_the_tasks_of_a_grpo_stage() -> None:
    with pytest.raises(
        RecipeError, match=r"tasks_of: found 'warm_up', expected a stage of kind grpo \(answer\)"
    ):
        loaded("stages.warm_up.tasks_of=warm_up")
    with pytest.raises(RecipeError, match=r"warm_up.abstention_rate: found 2.0, expected a share"):
        loaded("stages.warm_up.abstention_rate=2")


def test_tasks_that_nothing_rewards_are_said_before_a_model_is_loaded(
    make_data: Callable[..., SafetyData],
) -> None:
    recipe = loaded("+stages.answer.mixture.safety=1")
    with pytest.raises(RecipeError, match=r"stages.answer: 24 of \d+ tasks have no reward at all"):
        check_data(recipe, make_data())
