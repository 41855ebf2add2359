"""`scripts/benchmark preference`: our preference trainer beside TRL's own DPOTrainer, on the same pairs."""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from argument_types import positive
from benchmarks.preference_result import MAX_LOSS_DIFFERENCE, show, summarise
from benchmarks.preference_sides import Side, Work, all_terms, our_side, prepare, trl_side
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equipoise.data.errors import EquipoiseError
from equipoise.eval.models import resolve_model
from equipoise.train.recipe import ModelConfig
from equipoise.train.trainers.category_terms import CategoryTerms

DESCRIPTION = """\
Train the same LoRA on the same pairs twice, with TRL's DPOTrainer and with equipoise's, in step and batch by batch.

Both sides get the same tokens, batches, order, dtype, initial adapters, optimizer and schedule. Both run without
gradient checkpointing (TRL's own default is with) unless --gradient-checkpointing is given. TRL computes the
reference's log-probabilities in every step, its default; equipoise once, before the first. Three ratios of pairs per
second are therefore printed: of the training steps alone, of the whole epoch with equipoise's reference pass counted,
and against TRL with precompute_ref_log_probs=True. Peak memory is that of a process a side.
"""


def add_command(commands: Any) -> None:
    """The subcommand `preference`."""
    command = commands.add_parser(
        "preference",
        help="the preference trainer beside TRL's DPOTrainer",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add(
        "--pairs",
        type=Path,
        action="append",
        metavar="FILE",
        help="JSON lines with prompt, chosen, rejected; repeatable; the shipped pairs otherwise",
    )
    add("--model", default="smollm2_135m", help="smollm2_135m, a hub id or a model folder")
    add("--steps", type=positive, default=10, help="timed optimizer steps, each on its own batch (10)")
    add("--batch-size", type=positive, default=4, help="pairs a step (4: with 8, TRL alone takes 22 GiB)")
    add(
        "--max-length",
        type=positive,
        default=512,
        help="pairs whose prompt + longer answer exceed it are left out",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    add("--learning-rate", type=float, default=2e-4, help="peak, decaying linearly (2e-4)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations, on both sides")
    add("--seed", type=int, default=0, help="of the draw of pairs and the adapters (0)")
    add("--json", action="store_true", help="one JSON object as the last line")
    add("--memory-of", choices=("trl", "equipoise"), help=argparse.SUPPRESS)  # how the program calls itself
    command.set_defaults(run=run)


def run(options: argparse.Namespace, program: Path) -> int:
    """Measure and print; returns 1 when the losses differ by more than they may, else 0. Raises EquipoiseError."""
    _quiet()
    options.model = resolve_model(options.model, notify=lambda text: print(text, file=sys.stderr))
    work = prepare(options)
    with tempfile.TemporaryDirectory() as scratch:
        # A cache of its own, so that the reference pass is really made.
        os.environ["EQUIPOISE_CACHE"] = scratch
        if options.memory_of:
            print(json.dumps(_memory_of(options, work, Path(scratch))))
            return 0
        memory = {name: _in_own_process(options, program, name) for name in ("trl", "equipoise")}
        measured = measure(options, work, Path(scratch))
    result = summarise(memory, measured)
    result["setting"] = {
        "pairs": [path.name for path in options.pairs or ()] or ["shipped samples"],
        "model": Path(options.model).name,
        "num_steps": options.steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "dtype": options.dtype,
        "lora_r": ModelConfig().lora.r,
        "learning_rate": options.learning_rate,
        "gradient_checkpointing": options.gradient_checkpointing,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_threads": torch.get_num_threads(),
        "tokens_in_batches": {side: sum(tokens) for side, tokens in work.num_tokens.items()},
    }
    show(result, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    if options.json:
        print(json.dumps(result))
    equal = result["max_loss_difference"] <= MAX_LOSS_DIFFERENCE  # False for nan too
    return 1 if options.dtype == "float32" and not equal else 0


def _quiet() -> None:
    """Other people's bars and notices stay out of a table of figures."""
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"


# ---- memory ------------------------------------------------------------------------------------------------------


def _memory_of(options: argparse.Namespace, work: Work, scratch: Path) -> dict[str, int]:
    """Bytes of this process before the first step, and at the peak over the two sides' largest batches."""
    side = (trl_side if options.memory_of == "trl" else our_side)(options, work, scratch)
    before = (
        torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    )
    for of in work.num_tokens:
        side.step(work.largest(of))
    return {"before_training": before, "peak": peak_memory()}


def peak_memory() -> int:
    """Most bytes this process ever held: allocated by torch on a GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a fresh process starts at its parent's size on Linux
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _in_own_process(options: argparse.Namespace, program: Path, name: str) -> dict[str, int]:
    command = [sys.executable, str(program), "preference", "--memory-of", name, "--model", options.model]
    for path in options.pairs or ():
        command += ["--pairs", str(path)]
    for flag in ("steps", "batch_size", "max_length", "dtype", "learning_rate", "seed"):
        command += [f"--{flag.replace('_', '-')}", str(vars(options)[flag])]
    if options.gradient_checkpointing:
        command.append("--gradient-checkpointing")
    started = time.perf_counter()
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGKILL:
        raise EquipoiseError(
            f"the process that measures {name}'s memory was killed, most likely for want of memory; "
            "lower --batch-size or --max-length."
        )
    if done.returncode != 0:
        raise EquipoiseError(
            f"the process that measures {name}'s memory failed (exit code {done.returncode})"
        )
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"memory of {name}, in a process of its own: {figures['peak'] / 2**30:.2f} GiB at the peak "
        f"({time.perf_counter() - started:.0f} s)",
        file=sys.stderr,
    )
    return figures


# ---- time and loss -----------------------------------------------------------------------------------------------


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)


def measure(options: argparse.Namespace, work: Work, scratch: Path) -> dict[str, Any]:
    """Losses and seconds of every step, side by side in this process."""
    warm_up = work.largest("trl")
    trl = trl_side(options, work, scratch)
    start = trl.adapters()
    losses: dict[str, list[float]] = {"trl": [], "equipoise": []}
    # The largest batch first: later ones find their memory mapped, the reference passes of the others too.
    losses["trl"].append(trl.step(warm_up)[0])
    ours = our_side(options, work, scratch)
    same = ours.adapters()
    if start.keys() != same.keys() or any(not torch.equal(start[name], same[name]) for name in start):
        raise EquipoiseError("the two sides' adapters differ before the first step: nothing to compare.")
    ours.share_base(trl)
    losses["equipoise"].append(ours.step(warm_up)[0])
    part = work.first(max(options.steps // 3, 2))
    precomputed = trl_side(options, part, scratch, precompute=True)
    precomputed.share_base(trl)
    seconds: dict[str, list[float]] = {"trl": [], "equipoise": [], "trl_precomputed": []}

    def timed(sides: dict[str, Side], batches: Sequence[list[int]], what: str) -> None:
        with _bar(what, len(batches)) as advance:
            for k, batch in enumerate(batches):
                for name in list(sides) if k % 2 == 0 else reversed(list(sides)):  # neither is always first
                    loss, elapsed = sides[name].step(batch)
                    seconds[name].append(elapsed)
                    if name in losses:
                        losses[name].append(loss)
                advance()

    timed({"trl": trl, "equipoise": ours, "trl_precomputed": precomputed}, part.batches, "steps, three sides")
    timed({"trl": trl, "equipoise": ours}, work.batches[len(part.batches) :], "steps, two sides")
    terms = _terms_ratios(ours, work.batches[: max(options.steps // 2, 3)], all_terms(work))
    return {
        "losses": losses,
        "seconds": seconds,
        "reference_seconds": {
            "equipoise": ours.trainer.reference_seconds,
            "trl_precomputed": precomputed.trainer.reference_seconds,
        },
        "terms_ratios": terms,
    }


def _terms_ratios(side: Side, batches: Sequence[list[int]], terms: CategoryTerms) -> list[float]:
    """Time of two steps with these category terms over two without, on the same batch, in the order - + + -."""
    without = side.trainer.terms
    ratios = []
    with _bar("category terms", len(batches)) as advance:
        for batch in batches:
            elapsed = {True: 0.0, False: 0.0}
            for on in (False, True, True, False):
                side.trainer.terms = terms if on else without
                elapsed[on] += side.step(batch)[1]
            ratios.append(elapsed[True] / elapsed[False])
            advance()
    side.trainer.terms = without
    return ratios
