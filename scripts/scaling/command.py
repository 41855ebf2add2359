"""`scripts/scale_plan`: the command line and its table."""

import argparse

from argument_types import positive
from rich.table import Table
from scaling.model import ENGINES, MODELS, Step, step, training_of

from equipoise.eval.terminal import console, say
from equipoise.train.planning.machine import GPUS

DESCRIPTION = """\
Memory a GPU, traffic a step and expected efficiency of preference training or SFT for 7B, 70B and 405B on 8, 64 and
1,024 GPUs, by engine. Arithmetic, not a measurement: the formulas, their sources and what they leave out are in
scripts/scaling/README.md. `train.py ... dry_run=true` plans the recipe at hand on the machine at hand.
"""


def argument_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--gpus", nargs="+", type=positive, default=[8, 64, 1024], help="numbers of GPUs, 8 a node")
    add("--gpu", choices=GPUS, default="h100", help="80 GB each (h100)")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add(
        "--lora",
        type=int,
        default=0,
        metavar="RANK",
        help="adapters of this rank on all linear layers (0: full)",
    )
    add("--tokens", type=positive, default=8192, help="a GPU and step, padding included (8192)")
    add("--length", type=positive, default=1024, help="of a sequence (1024)")
    add(
        "--kernel-efficiency",
        type=_share,
        default=0.5,
        help="share of the GPU's peak that its kernels reach while nothing waits (0.5; measure yours)",
    )
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is no share in (0, 1]")
    return value


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    kind = f"LoRA of rank {options.lora}" if options.lora else "full fine-tuning"
    columns = ("model", "GPUs", "engine", "GiB a GPU", "fits", "GB sent a GPU", "seconds", "tokens/s", "MFU")
    table = Table(*columns, title=f"{kind} on {options.gpu}, {options.tokens} tokens a GPU and step")
    for name in options.models:
        for num_gpus in options.gpus:
            for engine in options.engines:
                table.add_row(
                    name,
                    f"{num_gpus:,}",
                    engine,
                    *row(
                        step(
                            training_of(MODELS[name], options.lora or None),
                            engine,
                            num_gpus,
                            options.tokens,
                            options.length,
                            GPUS[options.gpu],
                            options.kernel_efficiency,
                        ),
                        num_gpus * options.tokens,
                    ),
                )
    console.print(table)
    say(
        "Ranges: all of the traffic hidden behind computing, or none of it; kernels at "
        f"{options.kernel_efficiency:.0%} of the peak. What does not fit has no time. Not included: CUDA's context, "
        "fragmentation, a reference model for KL penalties, evaluation (which loads the whole model on every GPU), and "
        "stragglers, which decide on a thousand GPUs."
    )
    return 0


def row(found: Step, num_tokens: int) -> list[str]:
    """The table's cells for one plan; `num_tokens` of all GPUs."""
    cells = [f"{found.memory / 2**30:,.1f}", "yes" if found.fits else "no", f"{found.traffic / 1e9:,.1f}"]
    if not found.fits:
        return [*cells, "", "", ""]
    slow, fast = (
        found.compute_seconds + found.traffic_seconds,
        max(found.compute_seconds, found.traffic_seconds),
    )
    low, high = found.efficiency
    return [
        *cells,
        f"{fast:.3g} - {slow:.3g}",
        f"{num_tokens / slow:,.0f} - {num_tokens / fast:,.0f}",
        f"{low:.0%} - {high:.0%}",
    ]
