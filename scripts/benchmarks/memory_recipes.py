"""What `scripts/benchmark memory` trains: two steps of every method, from the shipped recipes."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import DictConfig
from transformers import AutoConfig

from equipoise.data.errors import EquipoiseError
from equipoise.data.sources import load_data
from equipoise.eval.models import load_tokenizer
from equipoise.train.cli import compose
from equipoise.train.planning.evaluation import Judging
from equipoise.train.planning.machine import Machine
from equipoise.train.planning.memory import ModelSize, Training
from equipoise.train.planning.phase_memory import PhaseMemory
from equipoise.train.planning.stage_plans import Planning, plan_stage
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.loading import load_recipe
from equipoise.train.run import run

WARM_UP = "warm_up"
"""Folder of the small model."""


@dataclass(frozen=True)
class Method:
    """A recipe and the stage of it that is measured; the other stages are not run."""

    recipe: str
    stage: str
    changes: Mapping[str, object] = field(default_factory=dict)
    """Of the stage."""
    model: Mapping[str, object] = field(default_factory=dict)
    """Of the recipe's model."""
    judged: bool = False
    """Between its two steps, and behind them."""


_JUDGED = ["gate.every=1", "data.max_prompts_per_category=2", "evaluation.max_new_tokens=16"]
_ROLLOUTS = {"num_steps": 2, "per_device_batch_size": 8, "gradient_accumulation_steps": 1}
_SCORERS = {"reward_model": "{folder}/reward_model/scorer", "cost_model": "{folder}/cost_model/scorer"}

METHODS = {
    "sft": Method("sft", "sft"),
    "dpo": Method("dpo", "safe"),
    "dpo_full": Method("dpo", "safe", model={"lora.enabled": "false"}),
    "dpo_checkpointed": Method("dpo", "safe", model={"gradient_checkpointing": "true"}),
    "dpo_full_checkpointed": Method(
        "dpo", "safe", model={"lora.enabled": "false", "gradient_checkpointing": "true"}
    ),
    "dpo_judged": Method("dpo", "safe", judged=True),
    "dpo_full_judged": Method("dpo", "safe", model={"lora.enabled": "false"}, judged=True),
    "dpo_nf4": Method("dpo", "safe", model={"quantization": "nf4"}),
    "sft_checkpointed": Method("sft", "sft", model={"gradient_checkpointing": "true"}),
    "kto": Method("kto", "safe"),
    "reward_model": Method("reward_model", "reward"),
    "cost_model": Method("cost_model", "cost"),
    "safe_rlhf": Method("safe_rlhf", "safe_rlhf", {**_ROLLOUTS, **_SCORERS, "start_from": "base"}),
    "safe_rlhf_separate": Method(
        "safe_rlhf", "safe_rlhf", {**_ROLLOUTS, **_SCORERS, "start_from": "base", "layout": "separate"}
    ),
    "grpo": Method("rlvf", "answer", {"per_device_batch_size": 16, "num_steps": 2, "start_from": "base"}),
}
"""In an order in which the scorers come before what needs them."""


def recipe_of(method: str, folder: Path, name: str | None = None) -> Recipe:
    """The recipe of a method with its one stage, two steps, on the model in `folder`; `name` of the run."""
    chosen = METHODS[method]
    cfg = compose(
        [
            f"recipe={chosen.recipe}",
            f"name={name or method}",
            f"model.id={folder / 'model'}",
            "model.dtype=float32",
            *(f"model.{key}={value}" for key, value in chosen.model.items()),
            "diagnostics.speed=false",
            "evaluation.baseline=false",
            f"output_dir={folder / 'runs'}",
            *(_JUDGED if chosen.judged else []),
        ]
    )
    if not isinstance(cfg, DictConfig):
        raise EquipoiseError(f"recipe={chosen.recipe} cannot be composed")
    stage: dict[str, Any] = {**cfg.stages[chosen.stage], "num_steps": 2, "save_every": 0}
    stage["evaluate"] = chosen.judged
    for key, value in chosen.changes.items():
        stage[key] = value.format(folder=scorers(folder)) if isinstance(value, str) else value
    cfg.stages = {chosen.stage: stage}
    return load_recipe(cfg)


def scorers(folder: Path) -> Path:
    """Where the reward and the cost model of earlier points are put."""
    return folder / "scorers"


def measure(method: str, folder: Path) -> dict[str, Any]:
    """Train in this process: {"estimate", "growth", "ratio"}, bytes of the dry run and of the resident set."""
    recipe = recipe_of(method, folder)
    config = AutoConfig.from_pretrained(recipe.model.id)
    num_bytes = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    training = Training.of(recipe.model, ModelSize.of(config, num_bytes // 4))
    data = load_data(recipe.data, recipe.seed)
    machine = Machine("this one", memory=1.0, flops=1.0, efficiency=1.0)
    tokenizer = load_tokenizer(recipe.model.id)
    planning = Planning(recipe, data, tokenizer, training, machine, say=lambda text: None)
    ((name, stage),) = recipe.stages.items()
    row = plan_stage(name, stage, planning)
    phases = [planning.memory(stage, row)]
    if stage.evaluate:
        judging = Judging.of(recipe, data, tokenizer, on_gpu=False, say=print)
        phases = [
            judging.beside(name, row, phases[0]),
            judging.inside(name, row, training),
            judging.behind(training),
        ]
    memory = max(phases, key=lambda phase: phase.total)
    # What libraries load on their first use is none of the training's: a small model goes first.
    first = method if METHODS[method].judged else "dpo"
    run(recipe_of(first, folder.parent / WARM_UP, name=f"before_{method}_{folder.name}"))
    gc.collect()
    before = psutil.Process().memory_info().rss
    peak = PhaseMemory(torch.device("cpu"))
    with peak.measured("run"):
        run(recipe)
    if not peak.peaks:
        raise EquipoiseError("a process's peak memory is read from /proc, which this system does not have")
    growth = peak.peaks["run"] - before
    left = folder / "runs" / method / "seed0" / "stages" / name / "scorer"
    if left.exists():
        target = scorers(folder) / method / "scorer"
        target.parent.mkdir(parents=True)
        left.rename(target)
    parts = {item.name: getattr(memory, item.name) for item in fields(memory) if item.name != "host"}
    return {"estimate": memory.total, "growth": growth, "ratio": memory.total / growth, "parts": parts}
