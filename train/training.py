"""What the training stages share: the trainer's arguments, checkpoints to go on from, progress, gates on the way."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback
from transformers.training_args import TrainingArguments

from equipoise.data.errors import EquipoiseError
from equipoise.train.recipe import Recipe
from equipoise.train.recipe_stages import StageConfig, TrainingConfig
from equipoise.train.stages.context import Progress, StageContext

STATE_FILE = "category_state.json"
"""Written last into a checkpoint: a checkpoint without it is not complete."""


class TrainingError(EquipoiseError):
    """Training cannot go on; the message says where the evidence was written."""


def examples_per_step(stage: TrainingConfig) -> int:
    """Examples of one optimizer step, over all ranks and accumulation."""
    return stage.per_device_batch_size * stage.gradient_accumulation_steps * PartialState().num_processes


def training_arguments(stage: TrainingConfig, recipe: Recipe, folder: Path, num_steps: int) -> dict[str, Any]:
    """Arguments that TRL's and transformers' configurations have in common; checkpoints go to `folder`."""
    on_cpu = not torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "max_steps": num_steps,
        "per_device_train_batch_size": stage.per_device_batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation_steps,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": stage.lr_scheduler,
        "warmup_steps": stage.warmup,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        # bf16 weights: activations in bf16, adapters and their optimizer in fp32.
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": False,
        "use_cpu": on_cpu,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "train_sampling_strategy": "sequential",  # our own order has been drawn before
        "remove_unused_columns": False,
        "save_strategy": "steps" if stage.save_every else "no",
        "save_steps": max(stage.save_every, 1),
        "save_total_limit": 2,
        "logging_strategy": "no",  # exact metrics are written instead, see `metrics.py`
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,
    }


def train(
    trainer: Trainer,
    name: str,
    stage: StageConfig,
    context: StageContext,
    load_state: Callable[[Mapping[str, Any]], None],
) -> None:
    """Train, from the last complete checkpoint where there is one, with progress and gates on the way.

    load_state takes what the trainer wrote into the checkpoint's `STATE_FILE`. Raises TrainingError when it does not
    fit.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(context.progress, f"{name}: training"))
    if context.recipe.gate.every and stage.evaluate:
        trainer.add_callback(_GateCallback(trainer, name, context))
    checkpoint = _resume_from(Path(trainer.args.output_dir), load_state, context.say)
    context.rewind(name, int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _resume_from(
    folder: Path, load_state: Callable[[Mapping[str, Any]], None], say: Callable[[str], None]
) -> Path | None:
    """The newest complete checkpoint, its state loaded; incomplete ones are named and passed over."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        try:
            state = json.loads((checkpoint / STATE_FILE).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            say(f"{checkpoint} is not complete (interrupted while saving) and passed over")
            continue
        try:
            load_state(state)
        except ValueError as error:
            raise TrainingError(
                f"{checkpoint}: {error}; remove the folder to start the stage anew"
            ) from error
        say(f"resuming from {checkpoint}")
        return checkpoint
    return None


class ProgressCallback(TrainerCallback):
    """Reports every optimizer step to the run's progress."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress, self._what = progress, what

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the trainer."""
        self._progress(state.global_step, state.max_steps, self._what)


class _GateCallback(TrainerCallback):
    """Judge, gate and update the category terms every `gate.every` optimizer steps."""

    def __init__(self, trainer: Any, name: str, context: StageContext) -> None:
        self._trainer, self._name, self._context = trainer, name, context

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        context, trainer = self._context, self._trainer
        due = state.global_step % context.recipe.gate.every == 0 and state.global_step < state.max_steps
        if not due or context.gate_inside is None:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        context.gate_inside(self._name, state.global_step, model, trainer.processing_class)
        if context.unsafe_counts is not None:
            trainer.terms.update_from_evaluation(context.unsafe_counts)
