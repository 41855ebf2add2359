"""`scripts/benchmark data`: time and memory of cleaning, splitting and categorising many pairs."""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from equipoise.data import cli
from equipoise.data.schema import PreferencePair
from equipoise.data.sources import load_jsonl_pairs, load_samples

DESCRIPTION = """\
Make --num-pairs synthetic pairs by recombining the sentences of the texts of --pairs (seeded; a tenth repeat others),
and run what `python -m equipoise.data clean`, `split` and `categorise` run on them, files and report included.

peak_memory_bytes is that of the whole process. Seconds are by the clock.
"""


def add_command(commands: Any) -> None:
    """The subcommand `data`."""
    command = commands.add_parser(
        "data",
        help="cleaning, splitting and categorising many pairs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--pairs", type=Path, help="JSON lines of pairs to recombine (the shipped pairs)")
    add("--num-pairs", type=int, default=100_000, help="synthetic pairs (100000)")
    add("--seed", type=int, default=0, help="of the recombination (0)")
    add("--json", action="store_true", help="one JSON object as the last line")
    command.set_defaults(run=run)


def run(options: argparse.Namespace, program: Path) -> int:
    """Measure and print; returns 0. Raises EquipoiseError."""
    shipped = load_samples()
    texts = (
        load_jsonl_pairs(options.pairs) if options.pairs else [*shipped.safety_pairs, *shipped.helpful_pairs]
    )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        started = time.perf_counter()
        write_synthetic(path, texts, options.num_pairs, options.seed)
        seconds["generate"] = time.perf_counter() - started
        for command in ("clean", "split", "categorise"):
            started = time.perf_counter()
            cli.run(command, ["data=jsonl", f"data.path={path}", f"out={folder}/{command}"])
            seconds[command] = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "num_pairs": options.num_pairs,
        "seconds": seconds,
        "total_seconds": sum(value for name, value in seconds.items() if name != "generate"),
        "peak_memory_bytes": peak,
    }
    table = Table(
        "step", "seconds", min_width=60, title=f"{options.num_pairs:,} pairs, at most {peak / 2**30:.2f} GiB"
    )
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}")
    console.print(table)
    if options.json:
        print(json.dumps(result))
    return 0


def write_synthetic(path: Path, pairs: list[PreferencePair], num_pairs: int, seed: int) -> None:
    """`num_pairs` pairs whose prompts and answers are made of the sentences of `pairs`; one in ten repeats another."""
    generator = random.Random(seed)
    pools = {
        "prompt": _sentences(pair.prompt[-1]["content"] for pair in pairs),
        "chosen": _sentences(pair.chosen for pair in pairs),
        "rejected": _sentences(pair.rejected for pair in pairs),
    }
    earlier: dict[str, str] = {}
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_pairs):
            if not earlier or generator.random() >= 0.1:
                earlier = {
                    name: " ".join(
                        generator.choices(pool, k=generator.randint(1, 2 if name == "prompt" else 5))
                    )
                    for name, pool in pools.items()
                }
                earlier["rejected"] += " So be it."  # never the same as the chosen one
            file.write(json.dumps({"id": str(number), **earlier}, ensure_ascii=False) + "\n")


def _sentences(texts: Any) -> list[str]:
    return [
        sentence.strip()
        for text in texts
        for sentence in text.replace("\n", " ").split(". ")
        if sentence.strip()
    ]
