"""Values and combinations of a GRPO stage that cannot work, found before any model is loaded."""

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

from equipoise.data.tasks import ARITHMETIC
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.checks import Problems, at_least, positive, share_of_one
from equipoise.train.recipe.rl import ArithmeticConfig, CostConfig, GRPOStageConfig, VLLMConfig
from equipoise.train.recipe.stages import CostModelStageConfig, SFTStageConfig, StageConfig

TASK_SUBSETS = ("arithmetic", "file", "safety", "helpful")
REWARDS = (
    "calibrated_abstention",
    "numeric_answer",
    "exact_answer",
    "answer_format",
    "response_length",
    "judge_verdict",
)
LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")


def check_grpo_stage(
    name: str, stage: GRPOStageConfig, earlier: Mapping[str, StageConfig], recipe: Recipe, problems: Problems
) -> None:
    """Note what cannot work in the stage `name`; `earlier`: the stages before it."""
    path = f"stages.{name}"
    _check_tasks(path, stage, problems)
    _check_rewards(path, stage, problems)
    _check_cost(f"{path}.cost", stage.cost, earlier, recipe, problems)
    problems.one_of(f"{path}.weight.mode", stage.weight.mode, ("none", "group_dro", "inverse_frequency"))
    positive(f"{path}.weight.eta", stage.weight.eta, problems)
    at_least(0, f"{path}.weight.temperature", stage.weight.temperature, problems)
    at_least(0, f"{path}.beta", stage.beta, problems)
    at_least(2, f"{path}.num_generations", stage.num_generations, problems)
    at_least(1, f"{path}.num_iterations", stage.num_iterations, problems)
    problems.expect(
        stage.save_every % max(stage.num_iterations, 1) == 0,
        f"{path}.save_every",
        stage.save_every,
        f"a multiple of num_iterations={stage.num_iterations}: a checkpoint holds no answers, so none is saved between "
        "the steps on the same ones",
    )
    positive(f"{path}.temperature", stage.temperature, problems)
    problems.expect(0 < stage.top_p <= 1, f"{path}.top_p", stage.top_p, "a share in (0, 1]")
    at_least(1, f"{path}.max_completion_length", stage.max_completion_length, problems)
    problems.expect(
        stage.max_completion_length < recipe.data.max_length,
        f"{path}.max_completion_length",
        stage.max_completion_length,
        f"less than data.max_length={recipe.data.max_length}, which has to hold the question too",
    )
    positive(f"{path}.epsilon", stage.epsilon, problems)
    if stage.epsilon_high is not None:
        positive(f"{path}.epsilon_high", stage.epsilon_high, problems)
    problems.one_of(f"{path}.loss_type", stage.loss_type, LOSS_TYPES)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    answers = stage.per_device_batch_size * stage.gradient_accumulation_steps * num_processes
    problems.expect(
        stage.num_generations < 2 or answers % stage.num_generations == 0,
        f"{path}.num_generations",
        stage.num_generations,
        f"a divisor of the {answers} answers of a step (per_device_batch_size={stage.per_device_batch_size} * "
        f"gradient_accumulation_steps={stage.gradient_accumulation_steps} * {num_processes} processes)",
    )
    check_vllm(f"{path}.vllm", stage.vllm, problems)


def check_warm_up(path: str, stage: SFTStageConfig, recipe: Recipe, problems: Problems) -> None:
    """Note an SFT stage on the tasks of what is no GRPO stage."""
    share_of_one(f"{path}.abstention_rate", stage.abstention_rate, problems)
    possible = [name for name, other in recipe.stages.items() if isinstance(other, GRPOStageConfig)]
    if stage.tasks_of is not None and stage.tasks_of not in possible:
        expected = f"a stage of kind grpo ({', '.join(possible) or 'this recipe has none'})"
        problems.expect(False, f"{path}.tasks_of", stage.tasks_of, expected)


def _check_tasks(path: str, stage: GRPOStageConfig, problems: Problems) -> None:
    for subset, share in stage.mixture.items():
        if subset in TASK_SUBSETS:
            at_least(0, f"{path}.mixture.{subset}", share, problems)
        else:
            problems.unknown(f"{path}.mixture.{subset}", subset, TASK_SUBSETS)
    if not any(share > 0 for share in stage.mixture.values()):
        problems.add(
            f"{path}.mixture", f"every share is 0; at least one of {', '.join(TASK_SUBSETS)} must be above 0"
        )
    from_file = stage.mixture.get("file", 0) > 0
    if from_file and stage.path is None:
        problems.add(f"{path}.path", "has to be given with mixture.file > 0: the file of the tasks")
    elif from_file and stage.path is not None and not Path(stage.path).expanduser().is_file():
        problems.add(f"{path}.path", f"found {stage.path!r}, which is no file")
    elif not from_file and stage.path is not None:
        problems.add(f"{path}.path", f"found {stage.path!r}, but mixture.file is 0, so nothing reads it")
    fraction = stage.held_out_fraction
    problems.expect(0 <= fraction < 1, f"{path}.held_out_fraction", fraction, "a share in [0, 1)")
    _check_arithmetic(f"{path}.arithmetic", stage.arithmetic, problems)


def _check_arithmetic(path: str, config: ArithmeticConfig, problems: Problems) -> None:
    for category, share in config.shares.items():
        if ARITHMETIC.fullmatch(category):
            at_least(0, f"{path}.shares.{category}", share, problems)
        else:
            expected = "addition_N or multiplication_N with N digits, 1 to 6, or unanswerable"
            problems.add(f"{path}.shares.{category}", f"unknown category; expected {expected}")
    problems.expect(
        any(share > 0 for share in config.shares.values()), f"{path}.shares", config.shares, "a share above 0"
    )
    at_least(1, f"{path}.num_training", config.num_training, problems)
    at_least(0, f"{path}.num_held_out", config.num_held_out, problems)


def _check_rewards(path: str, stage: GRPOStageConfig, problems: Problems) -> None:
    for name, weight in stage.rewards.items():
        if name in REWARDS:
            at_least(0, f"{path}.rewards.{name}", weight, problems)
        elif name == "cost":
            problems.add(
                f"{path}.rewards.cost", f"its weight is its multiplier: set {path}.cost.model instead"
            )
        else:
            problems.unknown(f"{path}.rewards.{name}", name, REWARDS)
    if not any(weight > 0 for weight in stage.rewards.values()):
        problems.add(f"{path}.rewards", f"every weight is 0; at least one of {', '.join(REWARDS)}")
    share_of_one(f"{path}.threshold", stage.threshold, problems)
    problems.expect(stage.threshold < 1, f"{path}.threshold", stage.threshold, "a confidence in [0, 1)")
    _check_read(path, "format_pattern", stage.format_pattern, "answer_format", stage, problems)
    _check_read(path, "length_limit", stage.length_limit, "response_length", stage, problems)
    if stage.format_pattern is not None:
        try:
            re.compile(stage.format_pattern)
        except re.error as error:
            problems.add(f"{path}.format_pattern", f"is no regular expression: {error}")
    if stage.length_limit is not None:
        problems.expect(
            0 <= stage.length_limit < stage.max_completion_length,
            f"{path}.length_limit",
            stage.length_limit,
            f"tokens, below max_completion_length={stage.max_completion_length}",
        )


def _check_read(
    path: str, key: str, value: object, reward: str, stage: GRPOStageConfig, problems: Problems
) -> None:
    """A reward's setting is given where the reward is asked for, and only there."""
    if reward in stage.rewards and value is None:
        problems.add(f"{path}.{key}", f"has to be given with rewards.{reward}")
    elif reward not in stage.rewards and value is not None:
        problems.add(f"{path}.{key}", f"found {value!r}, but rewards has no {reward}, so nothing reads it")


def _check_cost(
    path: str, cost: CostConfig, earlier: Mapping[str, StageConfig], recipe: Recipe, problems: Problems
) -> None:
    if cost.model is not None:
        stage = earlier.get(cost.model)
        if stage is not None and not isinstance(stage, CostModelStageConfig):
            problems.add(
                f"{path}.model", f"found {cost.model!r}, a stage of kind {stage.kind}, not cost_model"
            )
        elif stage is None and cost.model in recipe.stages:
            problems.add(f"{path}.model", f"found {cost.model!r}, a stage that does not come before this one")
        elif stage is None and not Path(cost.model).expanduser().is_dir():
            problems.add(
                f"{path}.model",
                f"found {cost.model!r}, expected an earlier cost_model stage or a scorer folder",
            )
    multiplier = cost.multiplier
    at_least(1, f"{path}.batch_size", cost.batch_size, problems)
    at_least(0, f"{path}.multiplier.initial", multiplier.initial, problems)
    at_least(0, f"{path}.multiplier.eta", multiplier.eta, problems)
    positive(f"{path}.multiplier.max", multiplier.max, problems)
    at_least(1, f"{path}.multiplier.window", multiplier.window, problems)
    at_least(0, f"{path}.multiplier.delay", multiplier.delay, problems)
    if multiplier.thresholds and not multiplier.per_category:
        problems.add(
            f"{path}.multiplier.thresholds", "needs per_category=true: one multiplier has one threshold"
        )


def check_vllm(path: str, vllm: VLLMConfig, problems: Problems) -> None:
    """Note a vLLM server that could not be talked to."""
    positive(f"{path}.timeout", vllm.timeout, problems)
    if vllm.enabled and importlib.util.find_spec("vllm") is None:
        problems.add(
            f"{path}.enabled",
            "found True, but vllm is not installed beside the trainer, which needs its client; pip install vllm",
        )
