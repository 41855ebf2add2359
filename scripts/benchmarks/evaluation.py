"""`scripts/benchmark evaluation`: the transformers engine beside transformers' own `generate` and lm-eval's."""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.preference_result import spread
from rich.console import Console
from rich.table import Table
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from equipoise.data.errors import EquipoiseError
from equipoise.data.sources import load_samples
from equipoise.eval.cache import Cache, CachedEngine
from equipoise.eval.generation.batches import decoding_by, inference, left_pad
from equipoise.eval.generation.encoding import encode_request
from equipoise.eval.generation.requests import Request
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.generation.transformers_engine import TransformersEngine
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings
from equipoise.eval.models import load_model

DESCRIPTION = """\
Answer the first prompts of the shipped suites greedily, in turn and in one process: with the engine, with transformers'
`generate` in the prompts' order at the same batch size, and with lm-eval's generate_until (pip install
'equipoise[lm_eval]'), which sorts by length. Loading is not counted; templates and tokenizing are.

generate_ratio and lm_eval_ratio: their seconds / the engine's, so 2 means twice the prompts a second. repeat_ratio: the
seconds of a second, unchanged run out of the cache / those of the first. tsdi_ratio: the engine's seconds with TSDI /
without, over the first two batches of prompts. Each is the median over the repeats. On a CPU the seconds are the
process's own CPU time, which other programs disturb less than the clock. With short prompts the engine answers up to
eight times its batch size at a time (`GenerationSettings.batch_size`); --their-batch-size gives the others as much. The
answers of `generate` and of the engine are compared; lm-eval's are not, for it decodes them with its own clean-up.
"""

PAGE_SIZE = 32
"""Tokens of a page of keys and values, for continuous batching."""


def add_command(commands: Any) -> None:
    """The subcommand `evaluation`."""
    command = commands.add_parser(
        "evaluation",
        help="the evaluator's engine beside transformers' generate and lm-eval",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", default="smollm2_135m", help="smollm2_135m, a hub id or a model folder")
    add("--num-prompts", type=int, default=200, help="harmful prompts first, then look-alikes (200)")
    add("--max-new-tokens", type=int, default=48, help="longest answer (48)")
    add("--batch-size", type=int, default=16, help="of every side (16)")
    add("--their-batch-size", type=int, help="of the sides that are not the engine (--batch-size)")
    add("--repeats", type=int, default=2, help="runs of every side (2)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    add("--continuous-batching", action="store_true", help="transformers' own `generate_batch` too")
    add("--without-lm-eval", action="store_true", help="leave lm-eval out; lm_eval_ratio is then null")
    add("--json", action="store_true", help="one JSON object as the last line")
    command.set_defaults(run=run)


def run(options: argparse.Namespace, program: Path) -> int:
    """Measure and print; returns 0. Raises EquipoiseError."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    samples = load_samples()
    exchanges = [*samples.harmful_prompts, *samples.lookalike_prompts][: options.num_prompts]
    requests = [
        Request(messages=tuple(exchange.prompt), max_new_tokens=options.max_new_tokens)
        for exchange in exchanges
    ]
    settings = GenerationSettings(max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
    theirs = replace(settings, batch_size=options.their_batch_size or options.batch_size)
    engine = TransformersEngine(model, tokenizer, settings)
    sides: dict[str, Callable[[], list[str]]] = {
        "engine": lambda: [reply.text or "" for reply in engine.complete(requests)],
        "generate": lambda: in_prompt_order(model, tokenizer, requests, theirs),
    }
    if options.continuous_batching:
        sides["continuous_batching"] = lambda: in_continuous_batches(model, tokenizer, requests, theirs)
    if not options.without_lm_eval:
        sides["lm_eval"] = lm_eval_side(model, tokenizer, requests, theirs)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    answers: dict[str, list[str]] = {}
    for turn in range(options.repeats):
        for side in list(sides) if turn % 2 == 0 else reversed(list(sides)):  # none is always first
            started = _seconds(model.device)
            answers[side] = sides[side]()
            seconds[side].append(_seconds(model.device) - started)
    few = requests[: 2 * options.batch_size]
    measured = {
        "seconds": seconds,
        "repeat_ratios": repeat_ratios(engine, few, options.repeats),
        "tsdi_ratios": tsdi_ratios(model, tokenizer, few, settings, options.repeats),
        "num_different_answers": sum(
            a != b for a, b in zip(answers["engine"], answers["generate"], strict=True)
        ),
    }
    result = summarise(measured)
    names = ("max_new_tokens", "batch_size", "repeats", "dtype")
    result["setting"] = {name: getattr(options, name) for name in names} | {
        "their_batch_size": theirs.batch_size,
        "num_prompts": len(requests),
        "model": Path(options.model).name,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
    }
    _show(result, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    if options.json:
        print(json.dumps(result))
    return 0


def in_prompt_order(
    model: Any, tokenizer: Any, requests: Sequence[Request], settings: GenerationSettings
) -> list[str]:
    """What one would write without an engine: batches in the prompts' order through `model.generate`."""
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        use_cache=True,
    )
    rows = [encode_request(tokenizer, request).row for request in requests]
    answers: list[str] = []
    with inference(model), decoding_by(model, config):
        for start in range(0, len(rows), settings.batch_size):
            batch = rows[start : start + settings.batch_size]
            input_ids, mask = left_pad(batch, tokenizer.pad_token_id, model.device)
            output = model.generate(input_ids=input_ids, attention_mask=mask)
            answers += tokenizer.batch_decode(
                output[:, input_ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
    return answers


def in_continuous_batches(
    model: Any, tokenizer: Any, requests: Sequence[Request], settings: GenerationSettings
) -> list[str]:
    """transformers' continuous batching, with pages of keys and values for all prompts at once.

    Left to itself it would take most of the machine's memory.
    """
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    rows = [encode_request(tokenizer, request).row for request in requests]
    pages = sum(math.ceil((len(row) + settings.max_new_tokens) / PAGE_SIZE) for row in rows)
    batching = ContinuousBatchingConfig(page_size=PAGE_SIZE, num_blocks=pages)
    with torch.no_grad():  # it writes in place into tensors that inference mode would forbid
        outputs = model.generate_batch(
            rows, generation_config=config, continuous_batching_config=batching
        ).values()
    return [tokenizer.decode(output.generated_tokens, skip_special_tokens=True) for output in outputs]


def lm_eval_side(
    model: Any, tokenizer: Any, requests: Sequence[Request], settings: GenerationSettings
) -> Callable[[], list[str]]:
    """lm-eval's HFLM around the same model. Raises EquipoiseError where lm-eval is not installed."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise EquipoiseError(
            f"lm-eval is not installed ({error}): pip install 'equipoise[lm_eval]', or leave it out with "
            "--without-lm-eval."
        ) from error
    harness = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, device=str(model.device)
    )
    arguments = {"until": [], "max_gen_toks": settings.max_new_tokens, "do_sample": False}

    def complete() -> list[str]:
        contexts = [
            tokenizer.apply_chat_template(
                list(request.messages or ()), add_generation_prompt=True, tokenize=False
            )
            for request in requests
        ]
        instances = [
            Instance(request_type="generate_until", doc={}, arguments=(context, dict(arguments)), idx=index)
            for index, context in enumerate(contexts)
        ]
        with inference(model):
            return harness.generate_until(instances, disable_tqdm=True)

    return complete


def repeat_ratios(engine: TransformersEngine, requests: Sequence[Request], repeats: int) -> list[float]:
    """Seconds of an unchanged run out of the cache over those of the first one."""
    device = engine.base.device
    ratios = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder, Cache(Path(folder) / "cache.sqlite") as cache:
            cached = CachedEngine(engine, cache)
            seconds = []
            for _run in range(2):
                started = _seconds(device)
                cached.complete(requests)
                seconds.append(_seconds(device) - started)
        ratios.append(seconds[1] / seconds[0])
    return ratios


def tsdi_ratios(
    model: Any, tokenizer: Any, requests: Sequence[Request], settings: GenerationSettings, repeats: int
) -> list[float]:
    """Seconds with TSDI over those without, with a token bias too small to change an answer."""
    tsdi = TSDISettings()
    bias = 1e-6 * torch.randn(tsdi.num_positions, model.config.get_text_config().vocab_size)
    engines = {
        "without": TransformersEngine(model, tokenizer, settings),
        "with": TransformersEngine(
            model, tokenizer, settings, TokenBias(bias, bias.exp() / bias.shape[1], tsdi)
        ),
    }
    ratios = []
    for turn in range(repeats):
        seconds = {}
        for side in ("without", "with") if turn % 2 == 0 else ("with", "without"):
            started = _seconds(model.device)
            engines[side].complete(requests)
            seconds[side] = _seconds(model.device) - started
        ratios.append(seconds["with"] / seconds["without"])
    return ratios


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """The figures of `--json`."""
    seconds = measured["seconds"]
    ratios = {
        f"{side}_ratio": [theirs / ours for theirs, ours in zip(values, seconds["engine"], strict=True)]
        for side, values in seconds.items()
        if side != "engine"
    }
    ratios |= {"repeat_ratio": measured["repeat_ratios"], "tsdi_ratio": measured["tsdi_ratios"]}
    return {
        "lm_eval_ratio": None,
        **{name: statistics.median(values) for name, values in ratios.items()},
        **{f"{name}_spread": spread(values) for name, values in ratios.items()},
        "num_different_answers": measured["num_different_answers"],
        "seconds": seconds,
    }


def _seconds(device: torch.device) -> float:
    """Seconds of work done: on a GPU the clock when the work is finished, on a CPU the process's CPU time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def _show(result: dict[str, Any], console: Console) -> None:
    setting = result["setting"]
    title = (
        "{num_prompts} prompts, {max_new_tokens} tokens, batches of {batch_size}; {model}, {dtype}, {device}"
    )
    table = Table("side", "prompts a second", "ratio: median (quartiles)", title=title.format(**setting))
    for side, seconds in result["seconds"].items():
        ratio = result.get(f"{side}_ratio_spread")
        table.add_row(
            side,
            f"{setting['num_prompts'] / statistics.median(seconds):.2f}",
            "" if ratio is None else f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})",
        )
    console.print(table)
    console.print(
        f"repeat out of the cache: {result['repeat_ratio']:.4f} of the first run's time; with TSDI: "
        f"{result['tsdi_ratio']:.3f}; answers that differ from generate's: {result['num_different_answers']} of "
        f"{setting['num_prompts']}."
    )
