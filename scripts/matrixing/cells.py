"""The cells: what each trainer is given, and how each engine is launched."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ACCELERATE = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
GLOBAL_BATCH = 8
"""Examples of an optimizer step over all ranks, whatever the engine."""
ONE = "one"
"""The engine that the others are compared with."""


@dataclass(frozen=True)
class Trainer:
    """One row of the table."""

    stage: str
    """Its stage in the recipe."""
    overrides: Sequence[str]
    scorers: bool = False
    """Takes the scorers that `tiny.py` wrote."""
    judged: bool = False
    """What the whole pass leaves is evaluated and gated."""


def _stage(name: str, num_steps: int | None, *keys: str) -> list[str]:
    steps = [] if num_steps is None else [f"stages.{name}.num_steps={num_steps}"]
    common = ["lr_scheduler=constant", "warmup=0", "gradient_accumulation_steps=1", *keys]
    return [*steps, *(f"stages.{name}.{key}" for key in common)]


TRAINERS: dict[str, Trainer] = {
    "sft": Trainer(
        "sft",
        [
            "recipe=sft",
            *_stage(
                "sft",
                None,
                "num_epochs=1.5",
                "evaluate=false",
                "learning_rate=1e-2",
                "weight.mode=group_dro",
                "kl.coef=0.1",
            ),
        ],
    ),
    "preference": Trainer(
        "safe",
        [
            "recipe=category_margin",
            *_stage(
                "safe",
                None,
                "num_epochs=1.5",
                "learning_rate=1e-2",
                "kl.coef=0.1",
                "category.update_every=1",
                "category.multiplier.enabled=true",
                "category.weight.mode=group_dro",
            ),
        ],
        judged=True,
    ),
    "preference_full": Trainer(
        "safe",
        [
            "recipe=dpo",
            "model.lora.enabled=false",
            *_stage("safe", None, "num_epochs=1.5", "evaluate=false", "learning_rate=1e-3"),
            "stages.safe.kl={coef: 0.1, estimator: reverse}",
        ],
    ),
    "kto": Trainer(
        "safe",
        [
            "recipe=kto",
            *_stage("safe", None, "learning_rate=1e-2", "category.weight.mode=group_dro", "split_pairs=true"),
            "stages.safe.evaluate=false",
            "stages.safe.mixture={safety: 0.65, helpful: 0.35}",
        ],
    ),
    "reward_model": Trainer(
        "reward", ["recipe=reward_model", *_stage("reward", 4, "learning_rate=1e-2", "normalise=true")]
    ),
    "cost_model": Trainer(
        "cost",
        [
            "recipe=cost_model",
            *_stage(
                "cost",
                None,
                "num_epochs=2",
                "learning_rate=1e-2",
                "weight.mode=group_dro",
                "held_out_fraction=0.2",
                "eval_every=2",
            ),
        ],
    ),
    "safe_rlhf": Trainer(
        "safe_rlhf",
        [
            "recipe=safe_rlhf_per_category",
            "~stages.sft",
            "~stages.reward",
            "~stages.cost",
            *_stage("safe_rlhf", 4, "learning_rate=1e-2", "rollout.max_new_tokens=5", "multiplier.eta=1.0"),
            "stages.safe_rlhf.evaluate=false",
        ],
        scorers=True,
    ),
    "grpo": Trainer(
        "answer",
        [
            "recipe=rlvf",
            "~stages.warm_up",
            *_stage("answer", 4, "learning_rate=1e-2", "num_generations=4", "max_completion_length=5"),
            "stages.answer.evaluate=false",
            "stages.answer.arithmetic.num_training=12",
            "stages.answer.arithmetic.num_held_out=4",
            "stages.answer.rewards={answer_format: 1.0, calibrated_abstention: 1.0}",
            "stages.answer.format_pattern='(?s).*[a-z].*'",  # what a random model does now and then
            "stages.answer.weight.mode=group_dro",
        ],
    ),
}


@dataclass(frozen=True)
class Engine:
    """One column of the table."""

    name: str
    num_ranks: int
    launch: Sequence[str]
    """In front of the script."""
    environment: Mapping[str, str] = field(default_factory=dict)
    shards_weights: bool = False
    """No rank but the first reads a whole model that is to be trained."""
    fsdp_on_cpu: bool = False
    """Takes what `fsdp_on_cpu.py` does."""
    shard_all: bool = False
    """Takes what `shard_all.py` does."""


def _accelerate(file: str) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / file)]
    return [*launch, "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(ONE, 1, [sys.executable]),
        Engine(
            "ddp", 2, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        ),
        Engine("zero2", 2, _accelerate("zero2.yaml"), {"DS_ACCELERATOR": "cpu"}),
        Engine(
            "zero3",
            2,
            _accelerate("zero3.yaml"),
            {"DS_ACCELERATOR": "cpu"},
            shards_weights=True,
            shard_all=True,
        ),
        Engine("fsdp2", 2, _accelerate("fsdp2.yaml"), shards_weights=True, fsdp_on_cpu=True),
    )
}


def overrides(trainer: Trainer, engine: Engine, inputs: Path, dtype: str) -> list[str]:
    """The command line of a cell, without name and output folder; inputs: what `tiny.py` wrote."""
    found = [
        *trainer.overrides,
        f"stages.{trainer.stage}.per_device_batch_size={GLOBAL_BATCH // engine.num_ranks}",
        f"stages.{trainer.stage}.save_every=2",
        "model=hub",
        f"model.id={inputs / 'model'}",
        f"model.dtype={dtype}",
        "data=jsonl",
        f"data.path={inputs / 'pairs.jsonl'}",
        "data.max_length=160",
        "data.max_prompts_per_category=1",
        "evaluation.baseline=false",
        "evaluation.max_new_tokens=4",
    ]
    scorers = ("reward", "cost") if trainer.scorers else ()
    return [*found, *(f"stages.{trainer.stage}.{kind}_model={inputs / kind}" for kind in scorers)]
