"""`scripts/benchmark processes`: the pairs a second of several processes beside those of one."""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from argument_types import positive
from benchmarks.preference_result import spread
from rich.console import Console
from rich.table import Table

from equipoise.data.errors import EquipoiseError

DESCRIPTION = """\
Train the recipe `dpo` with one process and with several under torchrun, each process with one thread (on a CPU) or one
GPU, in turn. The steps are the same on both sides: the same pairs in the same global batch, which one process works
through in as many more forward passes. So the seconds of each step stand beside those of the same step.

pairs_per_second_ratio: seconds of a step with one process / with several, the median over the steps; the first step is
left out, and so are loading and the reference's log-probabilities. max_loss_difference: between the sides' mean losses.
"""

STAGE = "safe"


def add_command(commands: Any) -> None:
    """The subcommand `processes`."""
    command = commands.add_parser(
        "processes",
        help="several processes beside one: pairs a second of the same steps",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", default="smollm2_135m", help="smollm2_135m or a model folder (smollm2_135m)")
    add("--processes", type=positive, default=2, metavar="N", help="processes beside one (2)")
    add("--batch-size", type=positive, default=4, help="pairs a forward pass in each process (4)")
    add("--accumulation", type=positive, default=4, help="forward passes a step, of the several (4)")
    add("--steps", type=positive, default=4, help="steps that are measured (4)")
    add("--repeats", type=positive, default=1, help="runs of either side (1)")
    add("--json", action="store_true", help="one JSON object as the last line")
    command.set_defaults(run=run)


def run(options: argparse.Namespace, program: Path) -> int:
    """Measure and print; returns 0. Raises EquipoiseError where training fails."""
    if options.processes < 2:
        raise EquipoiseError(
            f"--processes: found {options.processes}; one is what 2 or more are held against"
        )
    sides = (1, options.processes)
    seconds: dict[int, list[float]] = {side: [] for side in sides}
    losses: dict[int, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(options.repeats):
            for side in sides if turn % 2 == 0 else reversed(sides):
                of_steps, of_loss = _train(options, program, Path(scratch) / f"{turn}-{side}", side)
                seconds[side] += of_steps
                losses[side] += of_loss
    ratios = [one / several for one, several in zip(seconds[1], seconds[options.processes], strict=True)]
    result = {
        "pairs_per_second_ratio": statistics.median(ratios),
        "pairs_per_second_ratio_spread": spread(ratios),
        "max_loss_difference": max(
            abs(one - several) for one, several in zip(losses[1], losses[options.processes], strict=True)
        ),
        "seconds": seconds,
        "setting": {
            **{name: getattr(options, name) for name in ("processes", "batch_size", "accumulation", "steps")},
            "model": Path(options.model).name,
            "num_pairs_a_step": _num_pairs(options),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }
    _show(result)
    if options.json:
        print(json.dumps(result))
    return 0


def _num_pairs(options: argparse.Namespace) -> int:
    return options.batch_size * options.accumulation * options.processes


def _train(
    options: argparse.Namespace, program: Path, folder: Path, num_processes: int
) -> tuple[list[float], list[float]]:
    """Seconds and mean loss of every measured step."""
    root = program.parents[1]
    num_passes = options.accumulation * options.processes // num_processes
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes),
        str(root / "train.py"), "recipe=dpo", f"model.id={options.model}", "model.dtype=float32",
        f"output_dir={folder}", "name=run", "seed=0", "evaluation.baseline=false",
        f"stages.{STAGE}.num_steps={options.steps + 1}",
        f"stages.{STAGE}.per_device_batch_size={options.batch_size}",
        f"stages.{STAGE}.gradient_accumulation_steps={num_passes}",
        f"stages.{STAGE}.evaluate=false",
        f"stages.{STAGE}.save_every=0",
    ]  # fmt: skip
    print(f"{num_processes} process{'es' * (num_processes > 1)} ...", file=sys.stderr)
    # Both sides find the reference's log-probabilities done, or compute them before the first step.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EQUIPOISE_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise EquipoiseError(f"training with {num_processes} processes failed:\n{done.stdout[-2000:]}")
    lines = map(json.loads, (folder / "run" / "seed0" / "metrics.jsonl").read_text("utf-8").splitlines())
    steps = [line for line in lines if line["stage"] == STAGE and "train/loss" in line]
    times = [datetime.fromisoformat(line["time"]) for line in steps]
    seconds = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    return seconds, [float(line["train/loss"]) for line in steps]


def _show(result: dict[str, Any]) -> None:
    setting = result["setting"]
    title = (
        "{num_pairs_a_step} pairs a step, batches of {batch_size}; {model}, float32, {device}, "
        "one thread a process"
    )
    table = Table("processes", "pairs a second", title=title.format(**setting))
    for num_processes, seconds in result["seconds"].items():
        table.add_row(str(num_processes), f"{setting['num_pairs_a_step'] / statistics.median(seconds):.2f}")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    ratio = result["pairs_per_second_ratio_spread"]
    console.print(
        f"ratio over the same steps: {ratio['median']:.2f} (quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f}, "
        f"n {sum(map(len, result['seconds'].values())) // 2}); largest difference of the losses: "
        f"{result['max_loss_difference']:.1e}"
    )
