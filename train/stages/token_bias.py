"""Measure the token bias (TSDI) of the policy against a reference; nothing is trained."""

import json
import random
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from equipoise.eval.generation.tsdi import TokenBias, TSDISettings, estimate_token_bias
from equipoise.eval.generation.tsdi_diagnosis import ALPHAS, KEPT, find_forks
from equipoise.eval.models import ModelError
from equipoise.train.model import default_device, load_policy
from equipoise.train.recipe.stages import TokenBiasStageConfig
from equipoise.train.stages.context import StageContext, StageResult


def settings_of(stage: TokenBiasStageConfig) -> TSDISettings:
    """The stage's keys as the estimator takes them."""
    return TSDISettings(
        num_prompts=stage.num_prompts,
        num_positions=stage.num_positions,
        alpha=tuple(stage.alpha) if isinstance(stage.alpha, list) else float(stage.alpha),
        pool=stage.pool,  # type: ignore[arg-type]
        path=stage.path,
        prompt_tokens=stage.prompt_tokens,
        continuation=stage.continuation,  # type: ignore[arg-type]
        space=stage.space,  # type: ignore[arg-type]
        plausibility=stage.plausibility,
        seed=stage.seed,
    )


def run_token_bias(name: str, stage: TokenBiasStageConfig, policy: str, context: StageContext) -> StageResult:
    """Token bias of the model in `policy` against `stage.reference`, saved in the stage's folder.

    Every rank measures the same prompts and holds the same table.
    """
    started = time.perf_counter()
    aligned, reference, tokenizer = _models(stage, policy, context)
    words = [turn["content"] for pair in context.data.safety_pairs for turn in pair.prompt]
    bias = estimate_token_bias(
        aligned,
        reference,
        tokenizer,
        settings_of(stage),
        batch_size=stage.batch_size,
        progress=context.progress,
        words=words,
    )
    if PartialState().is_main_process:
        folder = context.stage_dir(name)
        folder.mkdir(parents=True, exist_ok=True)
        bias.export(folder)
    PartialState().wait_for_everyone()
    facts: dict[str, object] = {
        "num_prompts": stage.num_prompts,
        "alpha": stage.alpha,
        "mean_absolute_bias": float(bias.bias.abs().mean()),
        "probability_weighted_bias": float((bias.mean_probability * bias.bias.abs()).sum(-1).mean()),
    }
    if stage.num_diagnosed:
        facts["forks"] = _diagnose(name, stage, aligned, reference, tokenizer, bias, context)
    return StageResult(policy, time.perf_counter() - started, facts, token_bias=bias)


def _diagnose(
    name: str,
    stage: TokenBiasStageConfig,
    aligned: Any,
    reference: Any | None,
    tokenizer: PreTrainedTokenizerBase,
    bias: TokenBias,
    context: StageContext,
) -> dict[str, object]:
    """How many harmful training prompts the correction leaves on the aligned model's way: said, and for the facts."""
    prompts = list({pair.prompt[-1]["content"]: pair.prompt for pair in context.data.safety_pairs}.values())
    drawn = random.Random(stage.seed).sample(prompts, min(stage.num_diagnosed, len(prompts)))
    # One alpha a position is a profile, which is judged as it is: times 1.
    alpha = 1.0 if isinstance(stage.alpha, list) else float(stage.alpha)
    found = find_forks(
        aligned,
        reference,
        tokenizer,
        drawn,
        bias,
        alphas=[*ALPHAS, alpha],
        batch_size=stage.batch_size,
        progress=context.progress,
    )
    rate, low, high = found.kept_rate(alpha)
    share = "none" if found.bias_share is None else f"{found.bias_share:.0%}"
    context.say(
        f"{name}: {found.num_changed} of {found.num_prompts} harmful training prompts are answered otherwise than "
        f"before, from the first words on; with alpha {stage.alpha}, {rate:.0%} [{low:.0%}, {high:.0%}] of them still "
        f"are, and up to alpha {found.suggested_alpha:g} it is {KEPT:.0%} or more (the token bias explains {share} of "
        "what training gained there)"
    )
    return {
        "num_prompts": found.num_prompts,
        "num_changed": found.num_changed,
        "bias_share": found.bias_share,
        "kept_rate": {f"{each:g}": found.kept_rate(each)[0] for each in found.alphas},
        "reverted_rate": {f"{each:g}": found.reverted_rate(each) for each in found.alphas},
        "suggested_alpha": found.suggested_alpha,
    }


def _models(
    stage: TokenBiasStageConfig, policy: str, context: StageContext
) -> tuple[Any, Any | None, PreTrainedTokenizerBase]:
    """(aligned, reference, tokenizer); the reference is None where it is the aligned model without its adapter."""
    model = context.recipe.model
    reference_folder = context.policy_folder(stage.reference, context.base_folder)
    reference, tokenizer = load_policy(model, reference_folder)
    reference.to(default_device())
    if stage.one_backbone:
        adapter = _adapter_of(policy, reference_folder)
        return PeftModel.from_pretrained(reference, adapter).eval(), None, tokenizer
    aligned, tokenizer = load_policy(model, policy)
    return aligned.to(default_device()), reference, tokenizer


def _adapter_of(policy: str, reference: str) -> Path:
    """The adapter that lies beside a stage's `model/`, if it was trained on the reference; ModelError otherwise."""
    folder = Path(policy).parent / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"one_backbone needs an adapter in {folder}, beside the model of the stage that trained it. "
            "Start from such a stage, or set one_backbone: false."
        )
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    expected = str(Path(reference).resolve()) if Path(reference).is_dir() else reference
    if base != expected:
        raise ModelError(
            f"The adapter in {folder} was trained on {base}, the reference is {expected}. "
            "Set reference to the model it was trained on, or one_backbone: false."
        )
    return folder
