"""Run a recipe: data, then the stages one after the other, each judged and gated, then the report."""

import gc
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers.utils import logging as transformers_logging

from equipoise.data.categorise import Guess
from equipoise.data.crosswalk import find_taxonomy
from equipoise.data.files import full_disk_named, write_aside
from equipoise.data.preparation import Helpers
from equipoise.data.report import write_preparation
from equipoise.data.schema import Turn
from equipoise.data.sources import SafetyData, load_data
from equipoise.data.taxonomy import OTHER
from equipoise.eval.gate import GateResult, GateRules
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.eval.generation.tsdi_decoding import TOKEN_BIAS_FILE
from equipoise.eval.judges.base import Judge
from equipoise.eval.judges.loading import load_judge
from equipoise.eval.models import load_tokenizer, native_dtype, resolve_model
from equipoise.eval.terminal import Progress, console, say
from equipoise.eval.terminal_table import category_table
from equipoise.train.checkpoints import remove_checkpoints
from equipoise.train.claim import claimed, forced
from equipoise.train.diagnostics.alarms import Alarms
from equipoise.train.gatekeeper import ALIGNED, BASE, TSDI, Gatekeeper
from equipoise.train.planning.dry_run import plan
from equipoise.train.planning.phase_memory import highest_resident_set
from equipoise.train.precision import agree_on_precision
from equipoise.train.preemption import REQUEUE, Preempted
from equipoise.train.ranks import from_first
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.data_checks import check_data
from equipoise.train.recipe.rl import GRPOStageConfig, SafeRLHFStageConfig
from equipoise.train.recipe.stages import (
    CostModelStageConfig,
    KTOStageConfig,
    MergeStageConfig,
    PreferenceStageConfig,
    RewardModelStageConfig,
    SFTStageConfig,
    StageConfig,
    TokenBiasStageConfig,
)
from equipoise.train.sharding import unsharded
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.stages.grpo import run_grpo
from equipoise.train.stages.kto import run_kto
from equipoise.train.stages.merge import run_merge
from equipoise.train.stages.preference import run_preference
from equipoise.train.stages.safe_rlhf import check_given_scorers, check_launch, run_safe_rlhf
from equipoise.train.stages.scorer import run_cost_model, run_reward_model
from equipoise.train.stages.sft import run_sft
from equipoise.train.stages.token_bias import run_token_bias
from equipoise.train.tracking import Tracker


def run(recipe: Recipe) -> int:
    """Run every stage; returns the gate's exit code: 0 pass (or nothing gated), 3 fail, 4 inconclusive.

    Everything lands in `<output_dir>/<name>/seed<seed>/`. The same recipe run again goes on where it stopped; another
    recipe in the same folder is refused (RecipeError).
    """
    _quiet_libraries()
    _use_all_cores()
    PartialState(cpu=not torch.cuda.is_available())
    set_seed(recipe.seed)
    if recipe.model.dtype == "native":
        recipe = replace(recipe, model=replace(recipe.model, dtype=native_dtype()))
    agree_on_precision(recipe.model, say)
    with unsharded():  # a judge that helps to prepare it is loaded when it is first asked
        data = load_data(recipe.data, recipe.seed, _data_helpers(recipe))
    say(f"data: {data.summary()}")
    check_data(recipe, data)
    run_dir = Path(recipe.output_dir) / recipe.name / f"seed{recipe.seed}"
    base_folder = _base_folder(recipe)
    check_launch(recipe)
    check_given_scorers(recipe, base_folder)
    if recipe.dry_run:
        with Progress() as progress:
            plan(recipe, data, base_folder, say, progress)
        return 0
    with full_disk_named(run_dir), claimed(run_dir, recipe):
        return _run(recipe, data, run_dir, base_folder)


def _run(recipe: Recipe, data: SafetyData, run_dir: Path, base_folder: str) -> int:
    """The rest of `run`, in a folder that is this recipe's."""
    state = PartialState()
    if state.is_main_process:
        for name, preparation in data.preparations.items():
            if preparation.asked:
                write_preparation(run_dir / "data" / name.replace("/", "-"), name, preparation)
    state.wait_for_everyone()
    tracker = Tracker(run_dir, recipe.tracking, asdict(recipe)) if state.is_main_process else None
    alarms = None
    if tracker is not None:
        alarms = Alarms(recipe.diagnostics, run_dir / "metrics.jsonl", tracker.log, say)
    exit_code = 1
    summary: dict[str, Any] = {}
    try:
        with Progress() as progress:
            context = StageContext(
                recipe=recipe,
                data=data,
                run_dir=run_dir,
                base_folder=base_folder,
                log=alarms.log if alarms is not None else lambda metrics, step, stage: None,
                log_evaluation=tracker.log_evaluation if tracker is not None else lambda content, label: None,
                log_promoted=tracker.log_promoted if tracker is not None else lambda *promoted: None,
                log_speed=_log_speed(recipe, tracker),
                rewind=tracker.rewind if tracker is not None else lambda stage, step: None,
                say=say,
                progress=progress,
                load_judge=lambda: _judge(recipe),
            )
            gatekeeper, seconds, facts, token_bias = _walk(context)
        exit_code = final_exit_code(gatekeeper)
        if state.is_main_process:
            summary = _finish(context, gatekeeper, seconds, facts, token_bias, exit_code)
    except Preempted:
        exit_code = REQUEUE
        raise
    finally:
        if tracker is not None:
            tracker.finish(exit_code, summary)
    state.wait_for_everyone()
    return exit_code


def _log_speed(
    recipe: Recipe, tracker: Tracker | None
) -> Callable[[Mapping[str, float], int, str], None] | None:
    """Where measured speeds go; every rank measures, the first one writes."""
    if not recipe.diagnostics.speed:
        return None
    return tracker.log_speed if tracker is not None else lambda speeds, step, stage: None


def _quiet_libraries() -> None:
    """The run draws its own progress; other libraries' bars would tear it."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    # PEFT and TRL still ask transformers by the old name.
    warnings.filterwarnings(
        "ignore", message=r"`(is_)?gradient_checkpointing\w*` is deprecated", category=FutureWarning
    )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for one, and says so


def _use_all_cores() -> None:
    """`accelerate launch` gives a CPU process one thread unless it is told otherwise; a lone process takes them all."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and not torch.cuda.is_available()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if alone and launched and torch.get_num_threads() == 1:
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


def final_exit_code(gatekeeper: Gatekeeper) -> int:
    """The verdict on the last state that was gated; 0 where no stage asked for one."""
    verdicts = list(gatekeeper.verdicts.values())
    return verdicts[-1].exit_code if verdicts else 0


def _walk(
    context: StageContext,
) -> tuple[Gatekeeper, dict[str, float], dict[str, dict[str, object]], TokenBias | None]:
    """Base evaluation, then each stage with its evaluation and verdict."""
    recipe = context.recipe
    names = state_names(recipe.stages)
    seconds: dict[str, float] = {}
    facts: dict[str, dict[str, object]] = {}
    judged = recipe.evaluation.baseline or any(stage.evaluate for stage in recipe.stages.values())
    gatekeeper = Gatekeeper(
        context, _judge(recipe) if judged else None, GateRules(**recipe.gate.rules), names
    )
    context.gate_inside = gatekeeper.inside_stage
    if recipe.evaluation.baseline:
        started = time.perf_counter()
        gatekeeper.evaluate(BASE, "base-0", context.base_folder)
        seconds["evaluate base"] = time.perf_counter() - started
    policy, token_bias = context.base_folder, None
    for name, stage in recipe.stages.items():
        start = context.policy_folder(stage.start_from, policy)
        result = _resumed(context, name) or _run_stage(name, stage, start, context)
        context.finished[name] = result
        seconds[name], facts[name] = result.seconds, result.facts
        policy = result.model_folder
        token_bias = result.token_bias or token_bias
        if not stage.evaluate:
            continue
        started = time.perf_counter()
        step = result.facts.get("num_steps", 0)
        for variant, folder in result.variants.items():
            _judged(gatekeeper, f"{names[name]}-{variant}", f"{name}-{variant}", folder, context)
        if not result.variants:
            _judged(gatekeeper, names[name], f"{name}-{step}", policy, context, result.token_bias)
        seconds[f"evaluate {name}"] = time.perf_counter() - started
    return gatekeeper, seconds, facts, token_bias


def state_names(stages: Mapping[str, StageConfig]) -> dict[str, str]:
    """How reports call what each judged stage leaves: `tsdi` for a token bias, `aligned` for a policy.

    Where a recipe judges several of a sort, each is called by its stage.
    """
    sorts = {
        name: TSDI if isinstance(stage, TokenBiasStageConfig) else ALIGNED
        for name, stage in stages.items()
        if stage.evaluate
    }
    return {name: name if list(sorts.values()).count(sort) > 1 else sort for name, sort in sorts.items()}


def _judged(
    gatekeeper: Gatekeeper,
    state: str,
    label: str,
    policy: str,
    context: StageContext,
    token_bias: TokenBias | None = None,
) -> None:
    """Evaluate and gate what a stage left."""
    gatekeeper.evaluate(state, label, policy, token_bias=token_bias)
    verdict = gatekeeper.decide(state, label, policy, token_bias)
    context.say(f"{label}: gate says {verdict.verdict.value}")


RUNNERS: dict[type[StageConfig], Callable[[str, Any, str, StageContext], StageResult]] = {
    SFTStageConfig: run_sft,
    PreferenceStageConfig: run_preference,
    KTOStageConfig: run_kto,
    MergeStageConfig: run_merge,
    RewardModelStageConfig: run_reward_model,
    CostModelStageConfig: run_cost_model,
    SafeRLHFStageConfig: run_safe_rlhf,
    GRPOStageConfig: run_grpo,
    TokenBiasStageConfig: run_token_bias,
}
"""What runs a stage: (its name, its keys, the policy's folder, the surroundings) -> what it leaves."""


def _run_stage(name: str, stage: StageConfig, policy: str, context: StageContext) -> StageResult:
    result = RUNNERS[type(stage)](name, stage, policy, context)
    # A trainer and its callbacks hold one another: their model would stay while the result is judged.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if PartialState().is_main_process:
        # The last file written: a stage without it is run again.
        write_aside(context.stage_dir(name) / "done.json", result.to_json())
    _remove_checkpoints(name, context)
    return result


def _remove_checkpoints(name: str, context: StageContext) -> None:
    """Those of a finished stage, or all but the last."""
    if PartialState().is_main_process:
        remove_checkpoints(context.stage_dir(name) / "checkpoints", keep_last=context.recipe.resume.keep_last)
    PartialState().wait_for_everyone()


def _resumed(context: StageContext, name: str) -> StageResult | None:
    """What a finished stage of an earlier, interrupted run left."""
    path = context.stage_dir(name) / "done.json"
    if not path.exists():
        return None
    bias = context.stage_dir(name) / TOKEN_BIAS_FILE
    context.say(f"{name}: finished before, kept")
    _remove_checkpoints(name, context)
    return StageResult.from_json(
        path.read_text(encoding="utf-8"), TokenBias.load(bias) if bias.exists() else None
    )


def _judge(recipe: Recipe) -> Judge:
    """The recipe's judge; one that is a model is whole on every rank."""
    with unsharded():
        return load_judge(recipe.judge)


def _data_helpers(recipe: Recipe) -> Helpers:
    """The recipe's judge, where cleansing or categories ask for it."""
    if recipe.data.categorise != "judge" and recipe.data.cleaning.p_safe != "judge":
        return Helpers()
    judge = _judge(recipe)

    def p_safe(prompts: Sequence[Sequence[Turn]], answers: Sequence[str]) -> list[float | None]:
        found = judge.judge(prompts, answers)
        return [None if judgement.p_unsafe is None else 1 - judgement.p_unsafe for judgement in found]

    def categories(prompts: Sequence[Sequence[Turn]], answers: Sequence[str]) -> list[Guess]:
        found = judge.judge(prompts, answers)
        if found and not any(judgement.categories for judgement in found):
            raise RecipeError(
                f"data.categorise: found 'judge', but {judge.card.name} names no category of what it finds unsafe; "
                "possible: none, classifier"
            )
        return [Guess(next(iter(judgement.categories), OTHER), None) for judgement in found]

    return Helpers(p_safe, categories)


def _base_folder(recipe: Recipe) -> str:
    """Resolve the starting model once: rank 0 converts or fetches, however long it takes; the others find it done."""
    from_first(lambda: resolve_model(recipe.model.id, recipe.model.revision, notify=say))
    return resolve_model(recipe.model.id, recipe.model.revision, notify=say)


def _finish(
    context: StageContext,
    gatekeeper: Gatekeeper,
    seconds: dict[str, float],
    facts: dict[str, dict[str, object]],
    token_bias: TokenBias | None,
    exit_code: int,
) -> dict[str, Any]:
    """Write report.html and summary.json, print the table; returns the summary."""
    recipe, run_dir = context.recipe, context.run_dir
    base = gatekeeper.reports.get(BASE)
    summary: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "states": {
            state: report.summary(base if state != BASE else None)
            for state, report in gatekeeper.reports.items()
        },
        "gate": {state: result.to_dict() for state, result in gatekeeper.verdicts.items()},
        "verdict": _last_verdict(gatekeeper.verdicts),
        "promoted": gatekeeper.promoted,
        "exit_code": exit_code,
        "stages": facts,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_bytes": highest_resident_set(),
    }
    if changed := forced(run_dir):
        summary["forced"] = changed
    if gatekeeper.reports:
        rows = None
        if token_bias is not None:
            tokenizer = load_tokenizer(
                context.base_folder,
                revision=recipe.model.revision,
                trust_remote_code=recipe.model.trust_remote_code,
            )
            rows = token_bias.top_tokens(tokenizer)
        gatekeeper.write_html(run_dir / "report.html", f"seed {recipe.seed}", token_bias_rows=rows)
        console.print(category_table(gatekeeper.reports, find_taxonomy(recipe.data.taxonomy).names))
    # Behind the report: scripts/sweep takes a run that has a summary for done.
    write_aside(run_dir / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    for state, result in gatekeeper.verdicts.items():
        say(f"gate, {state}: {result.verdict.value}")
    say(f"promoted: {gatekeeper.promoted or 'nothing'}")
    if gatekeeper.reports:
        say(f"report: {run_dir / 'report.html'}")
    return summary


def _last_verdict(verdicts: Mapping[str, GateResult]) -> str | None:
    return list(verdicts.values())[-1].verdict.value if verdicts else None
