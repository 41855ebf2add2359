"""What `scripts/benchmark preference` makes of its measurements: ratios with their spread, and the table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

MAX_LOSS_DIFFERENCE = 1e-4
"""In float32; in bfloat16 the difference is shown and not judged."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    points = np.percentile(values, [0, 25, 50, 75, 100])
    return dict(zip(("min", "q1", "median", "q3", "max"), map(float, points), strict=True))


def summarise(memory: Mapping[str, Mapping[str, int]], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of `--json`; every ratio of pairs a second is over the same batches on both sides."""
    seconds, losses = measured["seconds"], measured["losses"]
    ours, trl, precomputed = seconds["equipoise"], seconds["trl"], seconds["trl_precomputed"]
    same = ours[: len(precomputed)]  # TRL with a precomputed reference runs on the first batches
    reference = measured["reference_seconds"]
    our_reference_a_step = reference["equipoise"] / len(ours)
    steps = spread([a / b for a, b in zip(trl, ours, strict=True)])
    precomputed_steps = spread([a / b for a, b in zip(precomputed, same, strict=True)])
    terms = spread(measured["terms_ratios"])
    training = {side: values["peak"] - values["before_training"] for side, values in memory.items()}
    return {
        # numpy's maximum, unlike max(), lets nan through.
        "max_loss_difference": float(np.max(np.abs(np.subtract(losses["trl"], losses["equipoise"])))),
        "pairs_per_second_ratio": steps["median"],
        "peak_memory_ratio": memory["equipoise"]["peak"] / memory["trl"]["peak"],
        "category_terms_ratio": terms["median"],
        "pairs_per_second_ratio_spread": steps,
        "category_terms_ratio_spread": terms,
        "whole_epoch_ratio": sum(trl) / (sum(ours) + reference["equipoise"]),
        "trl_precomputed": {
            "num_steps": len(precomputed),
            "pairs_per_second_ratio": precomputed_steps["median"],
            "pairs_per_second_ratio_spread": precomputed_steps,
            "whole_epoch_ratio": (sum(precomputed) + reference["trl_precomputed"])
            / (sum(same) + our_reference_a_step * len(same)),
        },
        "memory_ratio_of_training": training["equipoise"] / training["trl"],
        "memory_bytes": memory,
        **measured,
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print what was compared, and each figure beside what is aimed at."""
    setting, memory = result["setting"], result["memory_bytes"]
    console.print(
        "{num_steps} steps of {batch_size} pairs from {files}; {model}, {dtype}, LoRA r {lora_r}, AdamW at "
        "{learning_rate:g}, at most {max_length} tokens a sequence, gradient checkpointing {checkpointing} on both "
        "sides; {device}, {num_threads} threads. Tokens put through the model, padding included: {trl:,} by TRL, "
        "{equipoise:,} by equipoise.".format(
            **{k: v for k, v in setting.items() if k not in ("pairs", "tokens_in_batches")},
            **setting["tokens_in_batches"],
            files=", ".join(setting["pairs"]),
            checkpointing="on" if setting["gradient_checkpointing"] else "off",
        )
    )
    num_pairs = {side: setting["batch_size"] * len(values) for side, values in result["seconds"].items()}
    steps = {side: sum(values) for side, values in result["seconds"].items()}
    epoch = {side: steps[side] + result["reference_seconds"].get(side, 0.0) for side in steps}

    def rates(side: str, seconds: Mapping[str, float]) -> tuple[str, str]:
        return tuple(f"{num_pairs[s] / seconds[s]:.2f}" for s in (side, "equipoise"))  # type: ignore[return-value]

    def gib(what: str) -> tuple[str, str]:
        return tuple(f"{memory[side][what] / 2**30:.2f}" for side in ("trl", "equipoise"))  # type: ignore[return-value]

    precomputed = result["trl_precomputed"]
    table = Table("measured", "TRL", "equipoise", "ratio: median (quartiles; range)", "aim")
    rows = (
        (
            "loss of a batch, largest difference",
            "",
            "",
            f"{result['max_loss_difference']:.1e}",
            "<= 1e-4, fp32",
        ),
        (
            "pairs a second, training steps",
            *rates("trl", steps),
            _with_spread(result["pairs_per_second_ratio_spread"], 2),
            ">= 4, not < 2.5",
        ),
        ("  and our reference pass", *rates("trl", epoch), f"{result['whole_epoch_ratio']:.2f}", ""),
        (
            f"  TRL precomputing its reference, {precomputed['num_steps']} steps",
            *rates("trl_precomputed", steps),
            _with_spread(precomputed["pairs_per_second_ratio_spread"], 2),
            "",
        ),
        (
            "  and both reference passes",
            *rates("trl_precomputed", epoch),
            f"{precomputed['whole_epoch_ratio']:.2f}",
            "",
        ),
        ("peak memory, GiB", *gib("peak"), f"{result['peak_memory_ratio']:.2f}", "<= 0.6"),
        (
            "  before the first step",
            *gib("before_training"),
            f"{result['memory_ratio_of_training']:.2f} of what came after",
            "",
        ),
        (
            "step with all category terms, over without",
            "",
            "",
            _with_spread(result["category_terms_ratio_spread"], 3),
            "<= 1.02",
        ),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _with_spread(s: Mapping[str, float], digits: int) -> str:
    numbers = (f"{s[name]:.{digits}f}" for name in ("median", "q1", "q3", "min", "max"))
    return "{} ({} to {}; {} to {})".format(*numbers)
