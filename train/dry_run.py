"""`dry_run=true`: load data and tokenizer, check templates and lengths, say what a run would do and take."""

import statistics
import time
from collections import Counter
from collections.abc import Callable

import psutil
import torch
from accelerate import PartialState, init_empty_weights
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise.data.sources import SafetyData
from equipoise.eval.models import load_tokenizer
from equipoise.train.model import uses_frozen_copy
from equipoise.train.pairs import encode_pairs, encode_turns
from equipoise.train.recipe import Recipe
from equipoise.train.recipe_stages import PreferenceStageConfig, ScorerStageConfig, TokenBiasStageConfig
from equipoise.train.scorer_pairs import scorer_pairs, split_by_prompt
from equipoise.train.stages.context import Progress
from equipoise.train.stages.log_ratios import draw
from equipoise.train.stages.preference import stage_pairs
from equipoise.train.terminal import console, duration

EFFICIENCY = 1 / 3
"""Share of a large matrix product's speed that training reaches; measured on the embedded model on CPU."""


def plan(
    recipe: Recipe, data: SafetyData, base_folder: str, say: Callable[[str], None], progress: Progress
) -> None:
    """Print stages, steps, tokens, and estimates of memory and time; raises DataError where training would."""
    tokenizer = load_tokenizer(base_folder, trust_remote_code=recipe.model.trust_remote_code)
    config = AutoConfig.from_pretrained(base_folder, trust_remote_code=recipe.model.trust_remote_code)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    num_parameters = sum(p.numel() for p in model.parameters())
    flops = _measured_flops(torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32)
    table = Table(
        "stage", "kind", "steps", "pairs", "tokens a pair", "memory", "time", title=f"plan of {recipe.name}"
    )
    total = 0.0
    for name, stage in recipe.stages.items():
        if isinstance(stage, PreferenceStageConfig | ScorerStageConfig):
            row, seconds = _pairs_row(
                recipe, stage, data, tokenizer, config, num_parameters, flops, say, name
            )
        else:
            row, seconds = _token_bias_row(stage, num_parameters, flops)
        total += seconds
        table.add_row(name, stage.kind, *row)
    num_states = 1 + sum(bool(stage.evaluate) for stage in recipe.stages.values())
    evaluation = num_states * _evaluation_seconds(recipe, data, num_parameters, flops)
    table.add_row("evaluation", f"{num_states} states", "", "", "", "", f"about {duration(evaluation)}")
    console.print(table)
    longest = max(len(encode_turns(tokenizer, e.prompt, prompt=True)) for e in data.harmful_prompts)
    say(
        f"model: {base_folder}, {num_parameters / 1e6:.0f} M parameters; longest judged prompt {longest} tokens"
    )
    say(
        f"about {duration(total + evaluation)} in all on {_where()} at {flops / 1e9:.0f} GFLOP/s, measured just now on "
        "one matrix product; a rough guide, and too long on a machine that is busy"
    )
    say("dry run: nothing was trained, nothing was written")


def _pairs_row(
    recipe: Recipe,
    stage: PreferenceStageConfig | ScorerStageConfig,
    data: SafetyData,
    tokenizer: object,
    config: object,
    num_parameters: int,
    flops: float,
    say: Callable[[str], None],
    name: str,
) -> tuple[list[str], float]:
    if isinstance(stage, ScorerStageConfig):
        pairs, _ = scorer_pairs(stage, data)
        pairs, _ = split_by_prompt(pairs, stage.held_out_fraction, recipe.seed)
    else:
        pairs, _ = stage_pairs(stage, data)
    encoded = encode_pairs(pairs, tokenizer, recipe.data.max_length)
    world = PartialState().num_processes
    micro = stage.per_device_batch_size
    rows, names, num_steps = draw(
        encoded.dataset, stage, micro * stage.gradient_accumulation_steps * world, recipe.seed
    )
    tokens = [
        len(p) + len(c) + len(r)
        for p, c, r in zip(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True)
    ]
    num_passes = (
        2 if recipe.model.lora.enabled else 3
    )  # forward, and backward without or with weight gradients
    if isinstance(stage, PreferenceStageConfig):
        num_passes += 1  # the reference, once a pair
    seconds = num_passes * 2 * num_parameters * sum(tokens) / world / (flops * EFFICIENCY)
    counts = Counter(encoded.dataset["category"])
    say(f"{name}: pairs by category: {', '.join(f'{c} {counts[c]}' for c in names)}")
    if encoded.too_long:
        say(
            f"{name}: {len(encoded.too_long)} pairs are longer than data.max_length={recipe.data.max_length}, left out"
        )
    memory = _training_bytes(recipe, config, num_parameters, micro * max(tokens))
    return [
        str(num_steps),
        str(len(encoded.ids)),
        f"{statistics.mean(tokens):.0f} (max {max(tokens)})",
        f"about {memory / 2**30:.1f} GiB",
        f"about {duration(seconds)}",
    ], seconds


def _training_bytes(recipe: Recipe, config: object, num_parameters: int, num_tokens: int) -> float:
    """Weights, gradients, Adam's moments, and the activations of one microbatch of `num_tokens` tokens."""
    text = config.get_text_config()  # type: ignore[attr-defined]
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    weights = num_parameters * width * (2 if uses_frozen_copy(recipe.model) else 1)
    if recipe.model.lora.enabled:
        inner = text.intermediate_size
        a_layer = recipe.model.lora.r * (4 * 2 * text.hidden_size + 3 * (text.hidden_size + inner))
        trained = text.num_hidden_layers * a_layer
    else:
        trained = num_parameters
    # fp32 adapters: weight, gradient, two moments; full fine-tuning: gradient and moments in the weights' dtype.
    states = trained * (16 if recipe.model.lora.enabled else 3 * width)
    # Saved for the backward pass: about 12 hidden-size and 6 inner-size tensors a layer, twice that with adapters,
    # which keep inputs and products of their own.
    kept = 1 if recipe.model.gradient_checkpointing else text.num_hidden_layers
    kept *= 2 if recipe.model.lora.enabled else 1
    activations = num_tokens * width * kept * (12 * text.hidden_size + 6 * text.intermediate_size)
    process = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return weights + states + activations + 2 * 256 * text.vocab_size * 4 + process


def _token_bias_row(
    stage: TokenBiasStageConfig, num_parameters: int, flops: float
) -> tuple[list[str], float]:
    tokens = stage.num_prompts * (stage.prompt_tokens + stage.num_positions + 30)  # 30: the chat template
    seconds = 2 * 2 * num_parameters * tokens / flops
    return ["", f"{stage.num_prompts} prompts", "", "two models", f"about {duration(seconds)}"], seconds


def _evaluation_seconds(recipe: Recipe, data: SafetyData, num_parameters: int, flops: float) -> float:
    """Decoding reads every weight once a step and a batch; it is bound by memory, here put at a tenth of the peak."""
    num_prompts = len(data.harmful_prompts) + len(data.lookalike_prompts)
    return 2 * num_parameters * num_prompts * recipe.evaluation.max_new_tokens / flops * 10


def _measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product of the size that training has, on this machine's device; the best of five."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (
        torch.ones(2048, 1024, device=device, dtype=dtype),
        torch.ones(1024, 2048, device=device, dtype=dtype),
    )
    best = 0.0
    for _ in range(6):  # the first one warms up
        started = time.perf_counter()
        (a @ b).sum().item()  # the item waits for a GPU
        best = max(best, 2 * 2048 * 1024 * 2048 / (time.perf_counter() - started))
    return best


def _where() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
