"""Safe RLHF: a reward model and a cost model before it, a policy in, a better policy out (`trainers/safe_rlhf.py`)."""

import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from equipoise.data.errors import DataError
from equipoise.data.schema import PreferencePair
from equipoise.data.sources import SafetyData, normalise_prompt
from equipoise.data.templates import EncodingLimits, encode_turns
from equipoise.eval.generation.engine import end_tokens
from equipoise.eval.models import load_tokenizer
from equipoise.eval.scorer import cut_behind_end
from equipoise.train.checkpoints import step_of
from equipoise.train.diagnostics.steps import StepWatch
from equipoise.train.losses.lagrange import ALL, Multipliers
from equipoise.train.model import save_merged
from equipoise.train.pairs import encode_pairs
from equipoise.train.preemption import deferred
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.rl import SafeRLHFStageConfig
from equipoise.train.recipe.safe_rlhf_checks import (
    SCORER_STAGES,
    constrained,
    policy_origin,
    scorer_source,
)
from equipoise.train.scorer import check_scorer
from equipoise.train.stages.context import BASE, StageContext, StageResult
from equipoise.train.stages.log_ratios import draw
from equipoise.train.stages.preference import select_pairs
from equipoise.train.trainers.completion_head import base_causal_lm
from equipoise.train.trainers.rollout import Sampler, TransformersSampler, VLLMSampler
from equipoise.train.trainers.safe_rlhf import Answers, Draws, SafeRLHFTrainer, shards_parameters
from equipoise.train.trainers.safe_rlhf_models import check_backbone, load_separate, load_shared
from equipoise.train.training import belongs_to, examples_per_step, resume_from


def run_safe_rlhf(name: str, stage: SafeRLHFStageConfig, policy: str, context: StageContext) -> StageResult:
    """Train the policy in `policy` against the recipe's scorers; resumes from its last complete checkpoint."""
    started = time.perf_counter()
    recipe, folder = context.recipe, context.stage_dir(name)
    set_seed(recipe.seed)  # a stage starts alike whether or not the one before ran in this process
    accelerator = _accelerator(recipe)
    scorers: dict[str, str | None] = {
        kind: _scorer_folder(kind, name, stage, context) for kind in ("reward", "cost")
    }
    load = load_shared if stage.layout == "shared" else load_separate
    models = load(recipe.model, policy, scorers, critics=stage.advantage == "gae")
    for kind, scorer in scorers.items():
        assert scorer is not None
        check_scorer(scorer, kind, models.tokenizer, f"stages.{name}.{kind}_model")
    ends = end_tokens(base_causal_lm(models.policy), models.tokenizer)
    draws, num_steps, facts = _draws(name, stage, models.tokenizer, context)
    multipliers = Multipliers(
        constrained(stage.multiplier, draws.names)
        if stage.multiplier.per_category
        else {ALL: stage.multiplier.threshold},
        initial=stage.multiplier.initial,
        maximum=stage.multiplier.max,
        window=stage.multiplier.window,
    )
    trainer = SafeRLHFTrainer(
        models=models,
        stage=stage,
        accelerator=accelerator,
        sampler=_sampler(stage, models.tokenizer, accelerator, recipe.seed),
        draws=draws,
        ends=ends,
        reward=partial(models.score, "reward"),
        cost=partial(models.score, "cost"),
        multipliers=multipliers,
        ptx=_ptx(stage, models.tokenizer, ends, context),
        folder=folder / "checkpoints",
        seed=recipe.seed,
        log=lambda metrics, step: context.log(metrics, step, name),
        progress=lambda done, total: context.progress(done, total, f"{name}: training"),
        step_end=lambda step: _gate(name, stage, trainer, step, context),
    )
    trainer.belongs_to = belongs_to(stage, recipe)
    checkpoint = resume_from(trainer.folder, trainer.num_steps, stage, context, trainer.load_state)
    start = 0
    if checkpoint is not None:
        trainer.load_weights(checkpoint)
        start = step_of(checkpoint)
    context.rewind(name, start)
    trainer.watch = StepWatch(name, stage, context, models.modules, "answers")
    with closing(trainer.watch), deferred():
        trainer.train(start)
    model_folder = folder / "model"
    save_merged(models.acting(), models.tokenizer, recipe.model, model_folder)
    accelerator.wait_for_everyone()
    facts = {
        "num_steps": num_steps,
        **facts,
        **trainer.counts,
        **{name: round(value, 4) for name, value in multipliers.metrics().items()},
        "phase_seconds": {phase: round(seconds, 1) for phase, seconds in trainer.seconds.items()},
        "phase_memory_bytes": trainer.memory.peaks,
    }
    return StageResult(str(model_folder), time.perf_counter() - started, facts)


def _accelerator(recipe: Recipe) -> Accelerator:
    # A stage before this one may have left another precision behind; transformers' Trainer resets it the same way.
    AcceleratorState._reset_state()
    PartialState(cpu=not torch.cuda.is_available())
    return Accelerator(
        mixed_precision="bf16" if recipe.model.dtype == "bfloat16" else "no",
        # Else it reads the `auto` of a DeepSpeed file.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


def check_launch(recipe: Recipe) -> None:
    """Safe RLHF trains adapters where the launch shards parameters; raises RecipeError before anything is trained."""
    names = [name for name, stage in recipe.stages.items() if isinstance(stage, SafeRLHFStageConfig)]
    if not names or recipe.model.lora.enabled or not shards_parameters(_accelerator(recipe)):
        return
    raise RecipeError(
        f"stages.{names[0]}: found model.lora.enabled=false in a launch that shards parameters (FSDP, ZeRO-3), where "
        "safe_rlhf trains adapters on frozen, sharded weights. Train adapters (model.lora.enabled=true), or launch "
        "with recipes/accelerate/ddp.yaml, where every GPU holds all models whole."
    )


def check_given_scorers(recipe: Recipe, base_folder: str) -> None:
    """Scorers that a recipe names by folder read the tokens of the run's model; raises ScorerError.

    Called before anything is trained. What the run trains itself fits by construction.
    """
    for name, stage in recipe.stages.items():
        if not isinstance(stage, SafeRLHFStageConfig):
            continue
        for kind in SCORER_STAGES:
            source = scorer_source(kind, name, stage, recipe)
            if source is None or source in recipe.stages:
                continue
            origin = policy_origin(recipe, name)
            known = origin if origin not in (BASE, *recipe.stages) else base_folder
            tokenizer = load_tokenizer(
                known, trust_remote_code=recipe.model.trust_remote_code, revision=recipe.model.revision
            )
            check_scorer(source, kind, tokenizer, f"stages.{name}.{kind}_model")
            if stage.layout == "shared" and origin not in recipe.stages:
                check_backbone(source, known)


def _scorer_folder(kind: str, name: str, stage: SafeRLHFStageConfig, context: StageContext) -> str:
    source = scorer_source(kind, name, stage, context.recipe)
    assert source is not None, "checked with the recipe"
    if source in context.finished:
        return str(context.finished[source].scorer_folder)
    return str(Path(source).expanduser())


def stage_prompts(stage: SafeRLHFStageConfig, data: SafetyData) -> list[PreferencePair]:
    """The first pair of every prompt of the subsets with a share."""
    pairs = select_pairs({"safety": data.safety_pairs, "helpful": data.helpful_pairs}, stage.mixture)
    first: dict[str, PreferencePair] = {}
    for pair in pairs:
        first.setdefault(normalise_prompt(pair.prompt), pair)
    return list(first.values())


def _draws(
    name: str, stage: SafeRLHFStageConfig, tokenizer: PreTrainedTokenizerBase, context: StageContext
) -> tuple[Draws, int, dict[str, object]]:
    """The prompts in order, the steps they make, and what there is to say about them."""
    recipe = context.recipe
    prompts = stage_prompts(stage, context.data)
    room = recipe.data.max_length - stage.rollout.max_new_tokens
    rows: list[dict[str, Any]] = []
    too_long: list[str] = []
    for pair in prompts:
        prompt_ids = encode_turns(tokenizer, pair.prompt, prompt=True)
        if len(prompt_ids) > room:
            too_long.append(pair.id)
        else:
            rows.append({"prompt_ids": prompt_ids, "category": pair.category})
    if too_long:
        context.say(
            f"{name}: {len(too_long)} of {len(prompts)} prompts are longer than {room} tokens (data.max_length="
            f"{recipe.data.max_length} less rollout.max_new_tokens={stage.rollout.max_new_tokens}) and left out "
            f"(first: {', '.join(too_long[:3])})"
        )
    if not rows:
        raise DataError(
            f"stages.{name}: no prompt leaves room for an answer of rollout.max_new_tokens="
            f"{stage.rollout.max_new_tokens} tokens in data.max_length={recipe.data.max_length}; raise data.max_length"
        )
    drawn, names, num_steps = draw(
        Dataset.from_list(rows), stage, examples_per_step(stage) // stage.num_generations, recipe.seed
    )
    facts: dict[str, object] = {
        "num_prompts": len(rows),
        "num_too_long": len(too_long),
        "num_draws": len(drawn),
    }
    draws = Draws(list(drawn["prompt_ids"]), list(drawn["category_index"]), tuple(names))
    return draws, num_steps, facts


def _ptx(
    stage: SafeRLHFStageConfig, tokenizer: PreTrainedTokenizerBase, ends: set[int], context: StageContext
) -> Answers | None:
    if not stage.ptx_coef:
        return None
    encoded = encode_pairs(
        context.data.helpful_pairs,
        tokenizer,
        context.recipe.data.max_length,
        EncodingLimits.of(context.recipe.data),
    ).dataset
    rows = {
        (tuple(prompt), tuple(cut_behind_end(answer, ends)))
        for prompt, answer in zip(encoded["prompt_ids"], encoded["chosen_ids"], strict=True)
    }
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(context.recipe.seed)).tolist()
    ordered = sorted(rows)
    return Answers([(list(ordered[i][0]), list(ordered[i][1])) for i in order])


def _sampler(
    stage: SafeRLHFStageConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, seed: int
) -> Sampler:
    rollout = stage.rollout
    if not rollout.vllm.enabled:
        return TransformersSampler(tokenizer, rollout.max_new_tokens, rollout.batch_size, seed)
    client = None
    if accelerator.is_main_process:
        from trl.generation.vllm_client import VLLMClient  # here: it imports vllm

        vllm = rollout.vllm
        client = VLLMClient(vllm.url, group_port=vllm.group_port, connection_timeout=vllm.timeout)
        client.init_communicator(device=accelerator.device)
    return VLLMSampler(client, accelerator, rollout.max_new_tokens, seed)


def _gate(
    name: str, stage: SafeRLHFStageConfig, trainer: SafeRLHFTrainer, step: int, context: StageContext
) -> None:
    """Judge and gate every `gate.every` steps."""
    every = context.recipe.gate.every
    if (
        context.gate_inside is None
        or not (every and stage.evaluate)
        or step % every
        or step >= trainer.num_steps
    ):
        return
    policy, tokenizer, config = trainer.models.acting(), trainer.models.tokenizer, context.recipe.model
    context.gate_inside(name, step, lambda folder: save_merged(policy, tokenizer, config, folder))
