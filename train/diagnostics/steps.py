"""What is measured of a stage's optimizer steps: their speed, their peak of memory, a profile where it is asked for."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from equipoise.eval.generation.batches import base_of
from equipoise.eval.scorer import Scorer
from equipoise.train.diagnostics.speed import PassCounter, peak_flops
from equipoise.train.planning.phase_memory import PhaseMemory
from equipoise.train.recipe.measuring import ProfileConfig
from equipoise.train.recipe.stages import TrainingConfig
from equipoise.train.stages.context import StageContext

STEP = "step"


class StepWatch:
    """Measures the steps between `begin` and `end`; what lies between steps (evaluation, saving) is not in it."""

    def __init__(
        self, name: str, stage: TrainingConfig, context: StageContext, models: list[nn.Module], examples: str
    ) -> None:
        """models: those that passes go through, unwrapped; examples: what a batch consists of, `num_<examples>`."""
        self._name, self._stage, self._context, self._examples = name, stage, context, examples
        self._counter: PassCounter | None = None
        if context.log_speed is not None:
            decoders = {
                id(decoder): decoder for decoder in map(decoder_of, models)
            }  # scorers may share the policy's
            self._counter = PassCounter(decoders.values())
            self._peak = peak_flops(context.recipe.model.dtype)
        self._memory = PhaseMemory(PartialState().device)
        self._profiler = StepProfiler(context.recipe.profile, context.stage_dir(name))
        self._inside = ExitStack()
        self._started = self._seconds = 0.0
        self._steps = 0

    def begin(self, step: int) -> None:
        """Step `step`, from 1, begins."""
        self._profiler.begin(step)
        if self._counter is None:
            return
        if not self._steps:
            self._memory.peaks.clear()
            self._counter.take()
        self._inside.enter_context(self._memory.measured(STEP))
        self._started = time.perf_counter()

    def end(self, step: int) -> None:
        """It has ended; every `log_every` steps the numbers of all ranks are logged. Collective."""
        self._profiler.end(step)
        if self._counter is None:
            return
        self._seconds += time.perf_counter() - self._started
        self._inside.close()
        self._steps += 1
        if step % self._stage.log_every == 0:
            self._log(step)

    def close(self) -> None:
        """Training is over, or has failed: nothing is counted from here on."""
        self._inside.close()
        self._profiler.close()
        if self._counter is not None:
            self._counter.close()

    def _log(self, step: int) -> None:
        assert self._counter is not None
        assert self._context.log_speed is not None
        tokens, flops = self._counter.take()
        memory = self._memory.peaks.get(STEP, 0)
        mine = [[self._seconds, tokens, flops, self._peak, memory]]
        ranks = gather(torch.tensor(mine, dtype=torch.float64, device=PartialState().device)).cpu()
        seconds = float(ranks[:, 0].mean())
        num = self._stage.per_device_batch_size * self._stage.gradient_accumulation_steps * len(ranks)
        found = {
            f"speed/{self._examples}_per_second": num * self._steps / seconds,
            "speed/tokens_per_second": float(ranks[:, 1].sum()) / seconds,
            "speed/seconds_per_step": seconds / self._steps,
            "speed/mfu": float(ranks[:, 2].sum() / ranks[:, 3].sum()) / seconds,
        }
        if memory:
            found["speed/peak_memory_gib"] = float(ranks[:, 4].max()) / 2**30
        self._context.log_speed(found, step, self._name)
        self._seconds, self._steps = 0.0, 0


class StepProfiler:
    """A torch.profiler trace of some steps, on the first rank."""

    def __init__(self, config: ProfileConfig, folder: Path) -> None:
        self._steps = config.steps if PartialState().is_main_process else []
        self._folder = folder
        self._running: profile | None = None

    def begin(self, step: int) -> None:
        """Start in front of the first of the steps (or of those that are left of them, in a resumed stage)."""
        if self._running is None and self._steps and self._steps[0] <= step <= self._steps[1]:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(
                activities=activities, profile_memory=True, record_shapes=True, acc_events=True
            )
            self._running.start()

    def end(self, step: int) -> None:
        """Write the trace behind the last one."""
        if self._running is not None and step == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Stop and write what there is."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self._folder / f"trace-{self._steps[0]}-{self._steps[1]}.json.gz"))


class StepWatchCallback(TrainerCallback):
    """A `StepWatch` in transformers' Trainer."""

    def __init__(self, watch: StepWatch) -> None:
        self._watch = watch

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the trainer."""
        self._watch.begin(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the trainer."""
        self._watch.end(state.global_step)


def decoder_of(model: Any) -> PreTrainedModel:
    """The decoder of a policy or a scorer, under its adapter and without its head."""
    return model.decoder if isinstance(model, Scorer) else base_of(model).base_model
