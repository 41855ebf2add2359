"""What the training stages share: the trainer's arguments, checkpoints to go on from, progress, gates on the way."""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import PrinterCallback
from transformers.training_args import TrainingArguments

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.train import preemption
from equipoise.train.checkpoints import STATE_FILE, find_checkpoint, read_manifest, step_of
from equipoise.train.claim import launch, recipe_digest, recipe_digests, versions
from equipoise.train.diagnostics.steps import StepWatch, StepWatchCallback
from equipoise.train.model import adapters_in_fp32, load_policy, save_adapter, save_merged
from equipoise.train.pairs import can_share_prompt
from equipoise.train.ranks import from_first
from equipoise.train.recipe import ModelConfig, Recipe
from equipoise.train.recipe.stages import TrainingConfig
from equipoise.train.sharding import is_sharded
from equipoise.train.stages.context import Progress, StageContext


class TrainingError(EquipoiseError):
    """Training cannot go on; the message says where the evidence was written."""


def save_trained(trainer: Any, policy: str, config: ModelConfig, folder: Path) -> str:
    """Save the trained policy to `model/`, its adapter to `adapter/` and the category state; returns the model folder.

    policy: the folder that the stage started from. Collective: every rank has to call it.
    """
    trained = trainer.accelerator.unwrap_model(trainer.model)
    save_adapter(trained, policy, folder / "adapter")
    # Onto the weights on disk: those in memory may be in shards, or what quantising left of them.
    save_merged(trained, trainer.processing_class, config, folder / "model")
    if trainer.accelerator.is_main_process:
        write_aside(folder / STATE_FILE, json.dumps(trainer.terms.state_dict()) + "\n")
    trainer.accelerator.wait_for_everyone()
    return str(folder / "model")


def shares_prompts(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: str,
    context: StageContext,
) -> bool:
    """Whether answers to one prompt may share its row (`can_share_prompt`), said where they may not. Collective.

    model: what `load_trainable` read from the folder `policy`. The first rank alone asks, on its CPU: under FSDP it has
    all of the weights; of ZeRO-3's shards it reads the policy once more.
    """

    def ask() -> bool:
        whole = model if not is_sharded(model) else load_policy(context.recipe.model, policy)[0]
        with all_cores():
            return can_share_prompt(whole, tokenizer)

    share = from_first(ask)
    if not share:
        context.say(
            f"{name}: this model does not take a 4-D attention mask: every answer is trained in a row of its own, "
            "which encodes a pair's prompt twice and is slower."
        )
    return share


@contextmanager
def all_cores() -> Iterator[None]:
    """Inside, a process that has GPUs computes on every core: its launcher gave it one thread, and the others wait."""
    before = torch.get_num_threads()
    if torch.cuda.is_available():
        torch.set_num_threads(os.cpu_count() or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def examples_per_step(stage: TrainingConfig, num_processes: int | None = None) -> int:
    """Examples of one optimizer step, over accumulation and all ranks (None: of this launch)."""
    num_ranks = PartialState().num_processes if num_processes is None else num_processes
    return stage.per_device_batch_size * stage.gradient_accumulation_steps * num_ranks


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
        "logging_strategy": "no",  # exact metrics are written instead, see `metrics.py`
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,
    }


def train(
    trainer: Any,
    name: str,
    stage: TrainingConfig,
    context: StageContext,
    load_state: Callable[[Mapping[str, Any]], None],
) -> None:
    """Train, from the last complete checkpoint where there is one, with progress and gates on the way.

    load_state takes what the trainer wrote into the checkpoint's `STATE_FILE`. Raises TrainingError when it does not
    fit, Preempted when the process was told to end: a checkpoint of the last step is saved then.
    """
    adapters_in_fp32(trainer.model)
    trainer.remove_callback(PrinterCallback)
    unwrap = trainer.accelerator.unwrap_model
    models = [
        unwrap(model) for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None
    ]
    watch = StepWatch(name, stage, context, models, trainer.examples)
    trainer.add_callback(
        StepWatchCallback(watch)
    )  # the first: what the others do is no part of a step's time
    trainer.add_callback(ProgressCallback(context.progress, f"{name}: training"))
    if context.recipe.gate.every and stage.evaluate:
        trainer.add_callback(_GateCallback(trainer, name, context))
    ending = _PreemptionCallback(trainer.steps_between_checkpoints)
    trainer.add_callback(ending)  # the last: what the others do belongs to the step that is saved
    trainer.belongs_to = belongs_to(stage, context.recipe)
    folder = Path(trainer.args.output_dir)
    checkpoint = resume_from(folder, trainer.args.max_steps, stage, context, load_state)
    context.rewind(name, step_of(checkpoint) if checkpoint else 0)
    with closing(watch), preemption.deferred():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if ending.ended:
            raise preemption.Preempted  # on every rank, whichever got the signal


def belongs_to(stage: TrainingConfig, recipe: Recipe) -> dict[str, object]:
    """What a checkpoint belongs to, for its manifest."""
    return {
        "recipe": recipe_digest(recipe),
        "examples_per_step": examples_per_step(stage),
        **launch(),
        "versions": versions(),
    }


def resume_from(
    folder: Path,
    num_steps: int,
    stage: TrainingConfig,
    context: StageContext,
    load_state: Callable[[Mapping[str, Any]], None],
) -> Path | None:
    """The newest checkpoint that is whole, its state loaded, or None: the stage begins anew. Collective.

    num_steps: of the stage. Raises TrainingError when the checkpoint is one of another run.
    """
    checkpoint = find_checkpoint(folder, context.say)
    if checkpoint is None:
        return None
    try:
        _check_belongs(checkpoint, num_steps, stage, context)
        load_state(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
    except ValueError as error:
        raise TrainingError(f"{checkpoint}: {error}; remove the folder to start the stage anew") from error
    context.say(f"resuming from {checkpoint}")
    return checkpoint


def _check_belongs(checkpoint: Path, num_steps: int, stage: TrainingConfig, context: StageContext) -> None:
    """Raise ValueError where the checkpoint is not this run's; what `resume.force` may change was looked at before."""
    saved, recipe = read_manifest(checkpoint), recipe_digest(context.recipe)
    if saved["recipe"] not in (recipe, *recipe_digests(context.run_dir)):
        raise ValueError(f"it was saved by a run of another recipe ({saved['recipe']}, this one is {recipe})")
    if saved["examples_per_step"] != (mine := examples_per_step(stage)):
        raise ValueError(f"its steps have {saved['examples_per_step']} examples, those of this run {mine}")
    if step_of(checkpoint) > num_steps:
        raise ValueError(f"it stands behind step {step_of(checkpoint)}, and the stage has {num_steps} steps")


class ProgressCallback(TrainerCallback):
    """Reports every optimizer step to the run's progress."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress, self._what = progress, what

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the trainer."""
        self._progress(state.global_step, state.max_steps, self._what)


def told_to_end() -> bool:
    """Whether any rank was told to end; collective, so that all of them stop at the same step."""
    state = PartialState()
    if state.num_processes == 1:
        return preemption.asked()
    flag = torch.tensor([float(preemption.asked())], device=state.device)
    return bool(reduce(flag, reduction="sum").item())


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Inside the `with` random numbers may be drawn, of Python, NumPy and torch: those behind it are as without it."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


class _PreemptionCallback(TrainerCallback):
    """Save and stop behind the step in which the process was told to end, the next one that can be saved."""

    ended = False

    def __init__(self, steps_between_checkpoints: int) -> None:
        self._every = steps_between_checkpoints

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if told_to_end() and (state.global_step % self._every == 0 or state.global_step == state.max_steps):
            self.ended = control.should_save = control.should_training_stop = True


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
        config, tokenizer = context.recipe.model, trainer.processing_class
        with random_state_kept():  # a resumed run finds the report, and draws nothing
            context.gate_inside(
                self._name, state.global_step, lambda folder: save_merged(model, tokenizer, config, folder)
            )
        if context.unsafe_counts is not None:
            trainer.terms.update_from_evaluation(context.unsafe_counts)
