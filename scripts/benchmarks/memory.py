"""`scripts/benchmark memory`: what the memory arithmetic of the dry run says, beside what training takes."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.memory_recipes import METHODS, WARM_UP, measure
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.eval.models import load_tokenizer, resolve_model

DESCRIPTION = """\
Build two random Llamas of about 30 and 120 million parameters (with the embedded model's tokenizer), train two steps a
method in a process of its own, and compare how far its resident memory grew with the estimate of `dry_run=true`.

What a process holds before (Python, the libraries, the data) is not counted on either side. The estimate has to be
within {tolerance:.0%} of the growth; the exit code is 1 where it is not. CPU only, fp32: a GPU's allocator is another
matter.
"""

TOLERANCE = 0.35


@dataclass(frozen=True)
class Size:
    """Of a random Llama."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


SIZES = {"30M": Size(384, 1024, 6, 6), "120M": Size(768, 2048, 12, 12)}
SMALLEST = Size(32, 64, 1, 2)


def add_command(commands: Any) -> None:
    """The subcommand `memory`."""
    command = commands.add_parser(
        "memory",
        help="the dry run's memory estimates beside measured peaks",
        description=DESCRIPTION.format(tolerance=TOLERANCE),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--methods", default=",".join(METHODS), help=f"comma-separated ({','.join(METHODS)})")
    add("--sizes", default=",".join(SIZES), help=f"comma-separated ({','.join(SIZES)})")
    add("--json", action="store_true", help="one JSON object as the last line")
    add("--point", nargs=2, help=argparse.SUPPRESS)  # how the program calls itself: METHOD FOLDER
    command.set_defaults(run=run)


def run(options: argparse.Namespace, program: Path) -> int:
    """Measure and print; returns 1 where an estimate is off by more than `TOLERANCE`."""
    if options.point:
        print(json.dumps(measure(options.point[0], Path(options.point[1]))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        _random_llama(SMALLEST, Path(scratch) / WARM_UP / "model")
        for name in options.sizes.split(","):
            folder = Path(scratch) / name
            num_parameters = _random_llama(SIZES[name], folder / "model")
            for method in options.methods.split(","):
                measured = _in_own_process(program, method, folder)
                rows.append({"size": name, "num_parameters": num_parameters, "method": method, **measured})
                _tell(rows[-1])
            shutil.rmtree(folder)
    table = Table("model", "method", "estimate, MiB", "measured, MiB", "estimate / measured")
    for row in rows:
        estimate, growth = row["estimate"] / 2**20, row["growth"] / 2**20
        table.add_row(row["size"], row["method"], f"{estimate:.0f}", f"{growth:.0f}", f"{row['ratio']:.2f}")
    Console().print(table)
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"largest difference {worst:.0%}, tolerance {TOLERANCE:.0%}")
    if options.json:
        print(json.dumps({"rows": rows, "worst": worst, "tolerance": TOLERANCE}))
    return int(worst > TOLERANCE)


def _tell(row: dict[str, Any]) -> None:
    print(f"{row['size']} {row['method']}: estimate / measured {row['ratio']:.2f}", file=sys.stderr)


def _random_llama(size: Size, folder: Path) -> int:
    """Write a random model with the embedded model's tokenizer; returns its number of parameters."""
    tokenizer = load_tokenizer(resolve_model("smollm2_135m"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def _in_own_process(program: Path, method: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "EQUIPOISE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    # Freed tensors go back to the system at once, and the resident set is what is held, not what glibc keeps for later.
    environment |= {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, str(program), "memory", "--point", method, str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
