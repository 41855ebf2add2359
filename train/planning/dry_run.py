"""`dry_run=true`: load data and tokenizer, check templates and lengths, say what a run would do and take."""

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise.data.sources import SafetyData
from equipoise.data.templates import encode_turns
from equipoise.eval.models import load_tokenizer
from equipoise.eval.terminal import console, duration
from equipoise.train.planning.memory import Memory, ModelSize, Training
from equipoise.train.planning.stage_plans import Planning, plan_stage
from equipoise.train.recipe import Recipe
from equipoise.train.stages.context import Progress


def plan(
    recipe: Recipe, data: SafetyData, base_folder: str, say: Callable[[str], None], progress: Progress
) -> None:
    """Print stages, steps, tokens, and estimates of memory and time; raises DataError where training would."""
    options: dict[str, Any] = {
        "trust_remote_code": recipe.model.trust_remote_code,
        "revision": recipe.model.revision,
    }
    tokenizer = load_tokenizer(base_folder, **options)
    config = AutoConfig.from_pretrained(base_folder, **options)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    model.tie_weights()
    num_parameters = sum(p.numel() for p in model.parameters())
    flops = _measured_flops(torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32)
    training = Training.of(recipe.model, ModelSize.of(config, num_parameters))
    planning = Planning(recipe, data, tokenizer, training, flops, say)
    table = Table(
        "stage", "kind", "steps", "examples", "tokens", "memory", "time", title=f"plan of {recipe.name}"
    )
    total = 0.0
    for name, stage in recipe.stages.items():
        row = plan_stage(name, stage, planning)
        total += row.seconds
        time_text = f"about {duration(row.seconds)}" if row.seconds else ""
        table.add_row(name, stage.kind, row.steps, row.examples, row.tokens, _gib(row.memory), time_text)
    num_states = recipe.evaluation.baseline + sum(bool(stage.evaluate) for stage in recipe.stages.values())
    num_prompts = len(data.harmful_prompts) + len(data.lookalike_prompts)
    evaluation = num_states * planning.decoding(num_prompts * recipe.evaluation.max_new_tokens)
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


def _gib(memory: Memory | None) -> str:
    """What the device holds; on CPU the process itself is in it, as it is now."""
    if memory is None:
        return ""
    process = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return f"about {(memory.total + process) / 2**30:.1f} GiB"


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
