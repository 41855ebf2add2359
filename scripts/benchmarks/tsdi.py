"""`scripts/benchmark tsdi`: decoding with a token bias taken out beside decoding without."""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.preference_result import spread
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.utils import logging as transformers_logging

from equipoise.data.sources import load_samples
from equipoise.eval.generation.batches import decoding_by, encode_prompts, inference, left_pad
from equipoise.eval.generation.tsdi_decoding import TSDILogitsProcessor
from equipoise.eval.models import load_model

DESCRIPTION = """\
Answer the same prompts with and without TSDI, in turn and in one process, with answers of the same fixed length.

tsdi_ratio is the median over the pairs of (seconds with) / (seconds without): 1.02 means 2 % more time a token. On a
CPU the seconds are the process's own CPU time, which other programs disturb less than the clock. processor_share is the
time inside the logits processor alone over that of the whole answer, and much less noisy. The token bias is noise: what
it holds makes no difference to the time.
"""


def add_command(commands: Any) -> None:
    """The subcommand `tsdi`."""
    command = commands.add_parser(
        "tsdi",
        help="decoding with TSDI beside decoding without",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", default="smollm2_135m", help="smollm2_135m, a hub id or a model folder")
    add("--pairs-of-runs", type=int, default=10, help="answers with and without, each (10)")
    add("--batch-size", type=int, default=8, help="prompts answered at a time (8)")
    add("--max-new-tokens", type=int, default=64, help="length of every answer (64)")
    add("--num-positions", type=int, default=8, help="L, positions that are corrected (8)")
    add("--plausibility", type=float, default=0.0, help="its limit; above 0 a step costs more (0)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    add("--json", action="store_true", help="one JSON object as the last line")
    command.set_defaults(run=run)


class TimedProcessor(TSDILogitsProcessor):
    """Adds up the seconds that it takes."""

    seconds = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As the processor, timed."""
        started = _seconds(scores.device)
        corrected = super().__call__(input_ids, scores)
        self.seconds += _seconds(scores.device) - started
        return corrected


def run(options: argparse.Namespace, program: Path) -> int:
    """Measure and print; returns 0. Raises EquipoiseError."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = model.config.get_text_config().vocab_size
    correction = torch.randn(options.num_positions, vocabulary).to(model.device)
    prompts = [exchange.prompt for exchange in load_samples().lookalike_prompts[: options.batch_size]]
    input_ids, mask = left_pad(encode_prompts(tokenizer, prompts), tokenizer.pad_token_id, model.device)
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        use_cache=True,
    )
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    shares: list[float] = []
    with inference(model), decoding_by(model, config):
        for turn in range(-1, options.pairs_of_runs):
            for side in (
                ("without", "with") if turn % 2 == 0 else ("with", "without")
            ):  # neither is always first
                processor = TimedProcessor(correction, input_ids.shape[1], options.plausibility)
                used = LogitsProcessorList([processor] if side == "with" else [])
                started = _seconds(model.device)
                answer = model.generate(input_ids=input_ids, attention_mask=mask, logits_processor=used)
                elapsed = _seconds(model.device) - started
                assert answer.shape[1] - input_ids.shape[1] == options.max_new_tokens
                if turn < 0:  # warms up
                    continue
                seconds[side].append(elapsed)
                if side == "with":
                    shares.append(processor.seconds / elapsed)
    result = summarise(seconds, shares)
    result["setting"] = {
        name: getattr(options, name)
        for name in (
            "batch_size",
            "max_new_tokens",
            "num_positions",
            "plausibility",
            "dtype",
            "pairs_of_runs",
        )
    } | {
        "model": Path(options.model).name,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "vocabulary": vocabulary,
    }
    _show(result, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    if options.json:
        print(json.dumps(result))
    return 0


def _seconds(device: torch.device) -> float:
    """Seconds of work done: on a GPU the clock when the work is finished, on a CPU the process's CPU time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def summarise(seconds: dict[str, list[float]], shares: Sequence[float]) -> dict[str, Any]:
    """The ratio of each pair, its median and spread, and the processor's own share."""
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    return {
        "tsdi_ratio": statistics.median(ratios),
        "tsdi_ratio_spread": spread(ratios),
        "processor_share": statistics.median(shares),
        "seconds": seconds,
    }


def _show(result: dict[str, Any], console: Console) -> None:
    setting, tokens = result["setting"], result["setting"]["batch_size"] * result["setting"]["max_new_tokens"]
    table = Table(
        "decoding", "ms a token", title=f"{setting['model']}, {setting['device']}, {setting['dtype']}"
    )
    for side in ("without", "with"):
        table.add_row(f"{side} TSDI", f"{1000 * statistics.median(result['seconds'][side]) / tokens:.2f}")
    console.print(table)
    low, high = result["tsdi_ratio_spread"]["q1"], result["tsdi_ratio_spread"]["q3"]
    console.print(
        f"with / without: {result['tsdi_ratio']:.4f} (quartiles {low:.4f} to {high:.4f}, {setting['pairs_of_runs']} "
        f"pairs); the processor's own share of the time: {result['processor_share']:.2%}"
    )
