"""Measure the token bias (TSDI) of the policy against the starting model; nothing is trained."""

import time

from accelerate import PartialState

from equipoise.eval.generation.tsdi import TSDISettings, estimate_token_bias
from equipoise.eval.generation.tsdi_decoding import TOKEN_BIAS_FILE
from equipoise.train.model import default_device, load_policy
from equipoise.train.recipe_stages import TokenBiasStageConfig
from equipoise.train.stages.context import StageContext, StageResult


def settings_of(stage: TokenBiasStageConfig) -> TSDISettings:
    """The stage's keys as the estimator takes them."""
    return TSDISettings(
        num_prompts=stage.num_prompts,
        num_positions=stage.num_positions,
        alpha=stage.alpha,
        pool=stage.pool,  # type: ignore[arg-type]
        path=stage.path,
        prompt_tokens=stage.prompt_tokens,
        continuation=stage.continuation,  # type: ignore[arg-type]
        space=stage.space,  # type: ignore[arg-type]
        plausibility=stage.plausibility,
        seed=stage.seed,
    )


def run_token_bias(name: str, stage: TokenBiasStageConfig, policy: str, context: StageContext) -> StageResult:
    """Token bias of the model in `policy` against the run's starting model, saved in the stage's folder.

    Every rank measures the same prompts and holds the same table.
    """
    started = time.perf_counter()
    recipe, folder = context.recipe, context.stage_dir(name)
    aligned, tokenizer = load_policy(recipe.model, policy)
    reference, _ = load_policy(recipe.model, context.base_folder)
    aligned.to(default_device())
    reference.to(default_device())
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
        folder.mkdir(parents=True, exist_ok=True)
        bias.save(folder / TOKEN_BIAS_FILE)
    PartialState().wait_for_everyone()
    facts: dict[str, object] = {
        "num_prompts": stage.num_prompts,
        "mean_absolute_bias": float(bias.bias.abs().mean()),
        "probability_weighted_bias": float((bias.mean_probability * bias.bias.abs()).sum(-1).mean()),
    }
    return StageResult(policy, time.perf_counter() - started, facts, token_bias=bias)
