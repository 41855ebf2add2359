"""GRPO on rewards that can be checked: policy folder in, policy folder out, held-out tasks scored on either side."""

import functools
import gc
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig

from equipoise.data.errors import DataError
from equipoise.data.files import write_aside
from equipoise.data.schema import HELPFUL
from equipoise.data.tasks import Task
from equipoise.data.templates import encode_turns
from equipoise.eval.generation.engine import GenerationSettings, end_tokens
from equipoise.eval.scorer import load_scorer
from equipoise.train.losses.lagrange import ALL, Multipliers
from equipoise.train.model import default_device, load_frozen, load_policy, load_trainable, peft_config
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.rl import GRPOStageConfig
from equipoise.train.recipe.stages import CategoryConfig
from equipoise.train.rewards.judged import Cost, JudgeVerdict
from equipoise.train.rewards.verifiable import (
    answer_format,
    calibrated_abstention,
    exact_answer,
    numeric_answer,
    response_length,
)
from equipoise.train.scorer import check_scorer
from equipoise.train.sharding import unsharded
from equipoise.train.stage_tasks import StageTasks, judged_categories, stage_tasks
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.task_scores import TaskScores, score_tasks
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.grpo import RewardFunction, VerifiableTrainer
from equipoise.train.trainers.grpo_metrics import COST
from equipoise.train.training import (
    TrainingError,
    examples_per_step,
    save_trained,
    shares_prompts,
    train,
    training_arguments,
)

BEFORE_FILE = "tasks_before.json"
"""Scores of the policy that the stage started from: a resumed stage does not ask again."""


def run_grpo(name: str, stage: GRPOStageConfig, policy: str, context: StageContext) -> StageResult:
    """Train one stage from the model folder `policy`; resumes from its last complete checkpoint."""
    started = time.perf_counter()
    recipe = context.recipe
    num_prompts = prompts_per_step(stage)
    set_seed(recipe.seed)  # a stage starts alike whether or not the one before ran in this process
    tasks = stage_tasks(stage, context.data, recipe.seed)
    before = _before(name, stage, policy, tasks.held_out, context)
    model, tokenizer = load_trainable(recipe.model, policy, context.say)
    drawn, num_steps, too_long = draw_tasks(tasks, stage, tokenizer, recipe, num_prompts)
    if too_long:
        context.say(
            f"{name}: {len(too_long)} tasks leave no room for {stage.max_completion_length} tokens of answer in "
            f"data.max_length={recipe.data.max_length} and are left out (first: {', '.join(too_long[:3])})"
        )
    facts: dict[str, object] = {
        "num_steps": num_steps,
        "num_tasks": sum(map(len, tasks.training.values())),
        "num_held_out": len(tasks.held_out),
        "num_too_long": len(too_long),
        "num_draws": len(drawn),
    }
    names = sorted({task.category for task in drawn})
    terms = CategoryTerms(CategoryConfig(weight=stage.weight), names, [task.category for task in drawn])
    trainer = _trainer(name, stage, policy, model, tokenizer, drawn, names, terms, num_steps, context)
    train(trainer, name, stage, context, trainer.load_state_dict)
    model_folder = save_trained(trainer, policy, recipe.model, context.stage_dir(name))
    if trainer.multipliers is not None:
        facts["multipliers"] = trainer.multipliers.metrics()
    del trainer, model  # or two models would be in memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if before is not None:
        shipped, _ = load_policy(recipe.model, model_folder)  # as it is saved: merged, in the weights' dtype
        after = _ask(name, stage, shipped.to(default_device()), tokenizer, tasks.held_out, context, "after")
        context.log(after.metrics(), num_steps, name)
        facts |= {"tasks_before": before.facts(), "tasks_after": after.facts()}
    return StageResult(model_folder, time.perf_counter() - started, facts)


def prompts_per_step(stage: GRPOStageConfig, num_processes: int | None = None) -> int:
    """Prompts of one optimizer step, over all ranks (None: of this launch).

    Raises TrainingError where groups would be torn apart.
    """
    answers = examples_per_step(stage, num_processes)
    if answers % stage.num_generations:
        raise TrainingError(
            f"a step has {answers} answers (per_device_batch_size={stage.per_device_batch_size} * "
            f"gradient_accumulation_steps={stage.gradient_accumulation_steps} * "
            f"{answers // examples_per_step(stage, 1)} processes), which num_generations={stage.num_generations} does "
            "not divide; change one of them"
        )
    return answers // stage.num_generations


def draw_tasks(
    tasks: StageTasks,
    stage: GRPOStageConfig,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    num_prompts: int,
) -> tuple[list[Task], int, list[str]]:
    """(one task a draw, optimizer steps, ids of tasks too long to be answered); the last batch is full.

    Raises DataError when none fits.
    """
    room = recipe.data.max_length - stage.max_completion_length
    fits: dict[str, list[Task]] = {}
    too_long: list[str] = []
    for subset, of_subset in tasks.training.items():
        short = [t for t in of_subset if len(encode_turns(tokenizer, t.prompt, prompt=True)) <= room]
        kept = {task.id for task in short}
        too_long += [task.id for task in of_subset if task.id not in kept]
        fits[subset] = short
        if not short:
            raise DataError(
                f"none of {len(of_subset)} tasks of {subset} leaves room for {stage.max_completion_length} tokens of "
                f"answer in data.max_length={recipe.data.max_length}; raise it, or lower max_completion_length"
            )
    fitting = StageTasks(fits, tasks.held_out)
    if stage.num_steps is not None:
        num_steps = stage.num_steps
    else:
        once = len(fitting.draw(stage.mixture, None, recipe.seed))
        num_steps = math.ceil(once * stage.num_epochs / num_prompts) * stage.num_iterations
    num_draws = math.ceil(num_steps / stage.num_iterations) * num_prompts
    return fitting.draw(stage.mixture, num_draws, recipe.seed), num_steps, too_long


def reward_functions(
    stage: GRPOStageConfig,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    context: StageContext,
) -> dict[str, RewardFunction]:
    """The stage's rewards by name, settings bound, judge and cost model loaded."""
    possible: dict[str, RewardFunction] = {
        "calibrated_abstention": functools.partial(calibrated_abstention, stage.threshold),
        "numeric_answer": numeric_answer,
        "exact_answer": exact_answer,
        "answer_format": functools.partial(answer_format, stage.format_pattern or ""),
        "response_length": functools.partial(
            response_length, stage.length_limit or 0, stage.max_completion_length
        ),
    }
    rewards: dict[str, RewardFunction] = {}
    for name in stage.rewards:
        if name == "judge_verdict":
            assert context.load_judge is not None
            rewards[name] = JudgeVerdict(context.load_judge(), judged_categories())
        else:
            rewards[name] = possible[name]
    if stage.cost.model is not None:
        finished = context.finished.get(stage.cost.model)
        folder = finished.scorer_folder if finished is not None else stage.cost.model
        check_scorer(str(folder), "cost", tokenizer, "cost.model")
        model = context.recipe.model
        with unsharded():  # every rank scores its own answers
            scorer = load_scorer(
                str(folder),
                model.dtype,  # type: ignore[arg-type]
                default_device(),
                attn_implementation=model.attn_implementation,
                trust_remote_code=model.trust_remote_code,
            )
        rewards[COST] = Cost(scorer, tokenizer, stage.cost.batch_size, ends)
    return rewards


def multipliers_of(stage: GRPOStageConfig, categories: Sequence[str]) -> Multipliers | None:
    """The multipliers of the cost, or None where there is no cost model; `helpful` has one only if it is named."""
    if stage.cost.model is None:
        return None
    config = stage.cost.multiplier
    thresholds = {ALL: config.threshold}
    if config.per_category:
        constrained = [c for c in categories if c != HELPFUL or c in config.thresholds]
        thresholds = {c: config.thresholds.get(c, config.threshold) for c in constrained}
    return Multipliers(thresholds, config.initial, config.max, config.window)


def _trainer(
    name: str,
    stage: GRPOStageConfig,
    policy: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drawn: Sequence[Task],
    names: list[str],
    terms: CategoryTerms,
    num_steps: int,
    context: StageContext,
) -> VerifiableTrainer:
    recipe = context.recipe
    rows = [
        {
            "prompt": list(task.prompt),
            "answer": task.answer,
            "unanswerable": task.unanswerable,
            "category": task.category,
            "category_index": names.index(task.category),
        }
        for task in drawn
    ]
    try:
        return VerifiableTrainer(
            model=model,
            ref_model=load_frozen(recipe.model, policy)
            if stage.beta and not recipe.model.lora.enabled
            else None,
            args=_arguments(stage, recipe, context.stage_dir(name) / "checkpoints", num_steps),
            dataset=Dataset.from_list(rows),
            category_names=names,
            rewards=reward_functions(stage, tokenizer, sorted(end_tokens(model, tokenizer)), context),
            stage=stage,
            terms=terms,
            multipliers=multipliers_of(stage, names),
            share_rows=shares_prompts(name, model, tokenizer, policy, context),
            log=lambda metrics, step: context.log(metrics, step, name),
            processing_class=tokenizer,
            peft_config=peft_config(recipe.model),
        )
    except ConnectionError as error:
        raise TrainingError(
            f"no vLLM server at {stage.vllm.url} within {stage.vllm.timeout:g} s: {error}. Start one "
            "(train/trainers/rollout.py says how), set vllm.url, or sample with the training model "
            "(vllm.enabled=false)."
        ) from error


def _arguments(stage: GRPOStageConfig, recipe: Recipe, folder: Path, num_steps: int) -> GRPOConfig:
    return GRPOConfig(
        **training_arguments(stage, recipe, folder, num_steps),
        activation_checkpointing=recipe.model.gradient_checkpointing,
        shuffle_dataset=False,  # our own order has been drawn before
        beta=stage.beta,
        num_generations=stage.num_generations,
        num_iterations=stage.num_iterations,
        temperature=stage.temperature,
        top_p=stage.top_p,
        max_completion_length=stage.max_completion_length,
        epsilon=stage.epsilon,
        epsilon_high=stage.epsilon_high,
        loss_type=stage.loss_type,
        mask_truncated_completions=stage.mask_truncated,
        # TRL's own advantages are these, but for flat groups and the cost; `losses/group_rewards.py` replaces them.
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=[*stage.rewards.values(), *([0.0] if stage.cost.model is not None else [])],
        use_vllm=stage.vllm.enabled,
        vllm_mode="server",
        vllm_server_base_url=stage.vllm.url,
        vllm_group_port=stage.vllm.group_port,
        vllm_server_timeout=stage.vllm.timeout,
    )


def _before(
    name: str,
    stage: GRPOStageConfig,
    policy: str,
    held_out: Sequence[Task],
    context: StageContext,
) -> TaskScores | None:
    """Scores before training, from the file of an interrupted run where there is one; None without held-out tasks."""
    path = context.stage_dir(name) / BEFORE_FILE
    if not held_out:
        return None
    if path.exists():
        return TaskScores.from_json(path.read_text(encoding="utf-8"))
    # Asked as it will be behind the stage, whole and in full precision; gone before the one to be trained is loaded.
    model, tokenizer = load_policy(context.recipe.model, policy)
    before = _ask(name, stage, model.to(default_device()), tokenizer, held_out, context, "before")
    if PartialState().is_main_process:
        context.log(before.metrics(), 0, name)
        write_aside(path, before.to_json())
    return before


def _ask(
    name: str,
    stage: GRPOStageConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Task],
    context: StageContext,
    when: str,
) -> TaskScores:
    settings = GenerationSettings(
        max_new_tokens=stage.max_completion_length,
        batch_size=context.recipe.evaluation.batch_size,
        max_prompt_tokens=context.recipe.data.max_length,
    )

    def progress(done: int, total: int, what: str) -> None:
        context.progress(done, total, f"{name}: held-out tasks {when}")

    scores = score_tasks(model, tokenizer, held_out, stage.threshold, settings, progress)
    context.say(f"{name}: held-out tasks {when}: {scores.summary()}")
    return scores
