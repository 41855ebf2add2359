"""`scripts/benchmark preference`: our preference trainer beside TRL's own DPOTrainer, on the same pairs."""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from equipoise.data.errors import EquipoiseError
from equipoise.data.schema import PreferencePair
from equipoise.data.sources import load_jsonl_pairs, load_samples
from equipoise.eval.models import load_model, load_tokenizer, resolve_model
from equipoise.train.category_terms import CategoryTerms
from equipoise.train.model import peft_config
from equipoise.train.pairs import PairCollator, encode_pairs
from equipoise.train.preference_trainer import PreferenceTrainer
from equipoise.train.recipe import (
    CategoryConfig,
    MarginConfig,
    ModelConfig,
    MultiplierConfig,
    PreferenceStageConfig,
    WeightConfig,
)

DESCRIPTION = """\
Train the same LoRA on the same pairs twice, with TRL's DPOTrainer and with equipoise's, in step and batch by batch.

Both sides get the same tokens, batches, order, dtype, initial adapters, optimizer and schedule. Both run without
gradient checkpointing (TRL's own default is with) unless --gradient-checkpointing is given. TRL computes the
reference's log-probabilities in every step, its default; equipoise once, before the first. Three ratios of pairs per
second are therefore printed: of the training steps alone, of the whole epoch with equipoise's reference pass counted,
and against TRL with precompute_ref_log_probs=True. Peak memory is that of a process a side.
"""
MAX_LOSS_DIFFERENCE = 1e-4
"""In float32; in bfloat16 the difference is shown and not judged."""
LORA = ModelConfig().lora


@dataclass
class Work:
    """What both sides train on."""

    pairs: list[PreferencePair]
    rows: Dataset
    """Our tokens, one row a pair, in training order."""
    category_names: list[str]
    batches: list[list[int]]
    """Row numbers, one list an optimizer step."""
    num_tokens: dict[str, list[int]]
    """Tokens of each batch that `trl` and `equipoise` put through the model, padding included."""

    def largest(self, side: str) -> list[int]:
        """The batch of most tokens for one side."""
        tokens = self.num_tokens[side]
        return self.batches[tokens.index(max(tokens))]

    def first(self, num_batches: int) -> "Work":
        """The same with the first batches only."""
        batches = self.batches[:num_batches]
        num_pairs = sum(map(len, batches))
        tokens = {side: values[:num_batches] for side, values in self.num_tokens.items()}
        rows = self.rows.select(range(num_pairs))
        return Work(self.pairs[:num_pairs], rows, self.category_names, batches, tokens)


class _TimesReference:
    """Notes how long the constructor's pass over the reference took."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        started = time.perf_counter()
        result = super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]
        self.reference_seconds = time.perf_counter() - started
        return result


class _Trl(_TimesReference, DPOTrainer):
    pass


class _Ours(_TimesReference, PreferenceTrainer):
    pass


class Side:
    """A trainer driven one optimizer step at a time, doing what `Trainer.train` does between two log lines."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)

    def step(self, rows: Sequence[int]) -> tuple[float, float]:
        """(loss, seconds) of one step on these rows of the data, collating included."""
        trainer = self.trainer
        started = time.perf_counter()
        batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
        loss = float(trainer.training_step(self.model, batch))
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        trainer.state.global_step += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return loss, time.perf_counter() - started

    def adapters(self) -> dict[str, torch.Tensor]:
        """The trained weights by name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


def argument_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog=program)
    commands = parser.add_subparsers(dest="command", required=True)
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
    add("--steps", type=_positive, default=12, help="timed optimizer steps, each on its own batch (12)")
    add("--batch-size", type=_positive, default=8, help="pairs a step (8)")
    add(
        "--max-length",
        type=_positive,
        default=512,
        help="pairs whose prompt + longer answer exceed it are left out",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    add("--learning-rate", type=float, default=2e-4, help="peak, decaying linearly (2e-4)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations, on both sides")
    add("--seed", type=int, default=0, help="of the draw of pairs and the adapters (0)")
    add("--json", action="store_true", help="one JSON object as the last line")
    add("--memory-of", choices=("trl", "equipoise"), help=argparse.SUPPRESS)  # how the program calls itself
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def run(options: argparse.Namespace, program: Path) -> int:
    """Measure and print; returns 1 when the losses differ by more than they may, else 0. Raises EquipoiseError."""
    _quiet()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
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
    result = summarise(options, work, memory, measured)
    show(console, options, work, result)
    if options.json:
        print(json.dumps(result))
    return 1 if options.dtype == "float32" and not result["max_loss_difference"] <= MAX_LOSS_DIFFERENCE else 0


def _quiet() -> None:
    """Other people's bars and notices stay out of a table of figures."""
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"


def prepare(options: argparse.Namespace) -> Work:
    """Draw the pairs and cut them into batches. Raises DataError, and EquipoiseError for too few pairs."""
    if options.pairs:
        pairs = [pair for path in options.pairs for pair in load_jsonl_pairs(path)]
    else:
        samples = load_samples()
        pairs = samples.safety_pairs + samples.helpful_pairs
    random.Random(options.seed).shuffle(pairs)
    wanted = options.steps * options.batch_size
    tokenizer = load_tokenizer(options.model)
    encoded = encode_pairs(pairs[: 2 * wanted], tokenizer, options.max_length)
    if len(encoded.ids) < wanted:
        raise EquipoiseError(
            f"{len(encoded.ids)} pairs fit into {options.max_length} tokens; {options.steps} steps of "
            f"{options.batch_size} need {wanted}. Give more --pairs, or fewer --steps."
        )
    by_id = {pair.id: pair for pair in pairs}
    rows = encoded.dataset.select(range(wanted))
    names = sorted(set(rows["category"]))
    rows = rows.add_column("category_index", [names.index(category) for category in rows["category"]])
    rows = rows.add_column("slot", list(range(wanted)))
    size = options.batch_size
    batches = [list(range(start, start + size)) for start in range(0, wanted, size)]
    ours, trl = PairCollator(tokenizer.pad_token_id), DataCollatorForPreference(tokenizer.pad_token_id)
    num_tokens = {
        side: [collator([rows[i] for i in batch])["input_ids"].numel() for batch in batches]
        for side, collator in (("trl", trl), ("equipoise", ours))
    }
    return Work([by_id[name] for name in encoded.ids[:wanted]], rows, names, batches, num_tokens)


def _arguments(options: argparse.Namespace, folder: Path, **more: Any) -> DPOConfig:
    """The same for both sides but for `more`; what isn't named is TRL's default."""
    on_cpu = not torch.cuda.is_available()
    return DPOConfig(
        output_dir=str(folder),
        max_steps=options.steps + 1,  # the warm-up is one
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=options.gradient_checkpointing,
        max_length=None,  # longer pairs are left out on both sides
        seed=options.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def _lora() -> LoraConfig:
    return peft_config(ModelConfig())


def trl_side(options: argparse.Namespace, work: Work, scratch: Path, *, precompute: bool = False) -> Side:
    """TRL's trainer, given the texts and tokenising them itself."""
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    texts = Dataset.from_list(
        [
            {
                "prompt": list(pair.prompt),
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            for pair in work.pairs
        ]
    )
    trainer = _Trl(
        model=model,
        args=_arguments(options, scratch / "trl", precompute_ref_log_probs=precompute),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=_lora(),
    )
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        if list(trainer.train_dataset[name]) != list(work.rows[name]):
            raise EquipoiseError(
                f"TRL and equipoise tokenise these pairs differently ({name}): nothing to compare."
            )
    return Side(trainer)


def our_side(options: argparse.Namespace, work: Work, scratch: Path) -> Side:
    """Our trainer without category terms, as TRL has none."""
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    stage = PreferenceStageConfig()
    return Side(
        _Ours(
            model=model,
            ref_model=None,
            args=_arguments(options, scratch / "equipoise", precompute_ref_log_probs=True),
            dataset=work.rows,
            category_names=work.category_names,
            pair_ids=[pair.id for pair in work.pairs],
            stage=stage,
            terms=CategoryTerms(stage.category, work.category_names, work.rows["category"]),
            contexts=None,
            log=lambda metrics, step: None,
            warn=lambda text: print(text, file=sys.stderr),
            processing_class=tokenizer,
            peft_config=_lora(),
        )
    )


def _all_terms(work: Work) -> CategoryTerms:
    config = CategoryConfig(
        margin=MarginConfig(enabled=True),
        weight=WeightConfig(mode="group_dro"),
        multiplier=MultiplierConfig(enabled=True),
        update_every=1,
    )
    return CategoryTerms(config, work.category_names, work.rows["category"])


# ---- memory ------------------------------------------------------------------------------------------------------


def _memory_of(options: argparse.Namespace, work: Work, scratch: Path) -> dict[str, int]:
    """Bytes of this process before the first step, and at the peak of training on the largest batches of either side."""
    side = (trl_side if options.memory_of == "trl" else our_side)(options, work, scratch)
    before = (
        torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    )
    for of in work.num_tokens:
        side.step(work.largest(of))
    return {"loaded": before, "peak": peak_memory()}


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
    if any(not torch.equal(start[name], value) for name, value in ours.adapters().items()):
        raise EquipoiseError("the two sides' adapters differ before the first step: nothing to compare.")
    losses["equipoise"].append(ours.step(warm_up)[0])
    seconds: dict[str, list[float]] = {"trl": [], "equipoise": [], "trl_precomputed": []}

    def timed(sides: dict[str, Side], batches: Sequence[list[int]], what: str) -> None:
        with _bar(what, len(batches)) as advance:
            for k, batch in enumerate(batches):
                for name in list(sides) if k % 2 == 0 else reversed(list(sides)):
                    loss, elapsed = sides[name].step(batch)
                    seconds[name].append(elapsed)
                    if name in losses:
                        losses[name].append(loss)
                advance()

    timed({"trl": trl, "equipoise": ours}, work.batches, "steps of TRL and equipoise")
    terms = _terms_ratios(ours, work.batches[: max(options.steps // 2, 3)], _all_terms(work))
    del trl
    part = work.first(max(options.steps // 3, 2))
    precomputed = trl_side(options, part, scratch, precompute=True)
    timed({"trl_precomputed": precomputed}, part.batches, "steps of TRL with precomputed reference")
    return {
        "losses": losses,
        "seconds": seconds,
        "reference_seconds": ours.trainer.reference_seconds,
        "trl_reference_seconds": precomputed.trainer.reference_seconds,
        "terms": terms,
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


# ---- the result --------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    points = np.percentile(values, [0, 25, 50, 75, 100])
    return dict(zip(("min", "q1", "median", "q3", "max"), (float(p) for p in points), strict=True))


def summarise(
    options: argparse.Namespace,
    work: Work,
    memory: dict[str, dict[str, int]],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """The figures of `--json`."""
    seconds, losses = measured["seconds"], measured["losses"]
    total = {name: sum(values) for name, values in seconds.items()}
    steps = spread([a / b for a, b in zip(seconds["trl"], seconds["equipoise"], strict=True)])
    precomputed = spread(
        [a / b for a, b in zip(seconds["trl_precomputed"], seconds["equipoise"], strict=True)]
    )
    terms = spread(measured["terms"])
    reference, trl_reference = measured["reference_seconds"], measured["trl_reference_seconds"]
    num_pairs = len(work.pairs)
    trl_memory, our_memory = memory["trl"], memory["equipoise"]
    return {
        "max_loss_difference": max(
            abs(a - b) for a, b in zip(losses["trl"], losses["equipoise"], strict=True)
        ),
        "pairs_per_second_ratio": steps["median"],
        "peak_memory_ratio": our_memory["peak"] / trl_memory["peak"],
        "category_terms_ratio": terms["median"],
        "pairs_per_second_spread": steps,
        "pairs_per_second_ratio_whole_epoch": total["trl"] / (total["equipoise"] + reference),
        "pairs_per_second_ratio_trl_precomputed": precomputed["median"],
        "pairs_per_second_trl_precomputed_spread": precomputed,
        "pairs_per_second_ratio_whole_epoch_trl_precomputed": (total["trl_precomputed"] + trl_reference)
        / (total["equipoise"] + reference),
        "category_terms_spread": terms,
        "pairs_per_second": {name: num_pairs / value for name, value in total.items()},
        "reference_seconds": {"equipoise": reference, "trl_precomputed": trl_reference},
        "seconds": seconds,
        "losses": losses,
        "memory_bytes": memory,
        "num_pairs": num_pairs,
        "num_steps": options.steps,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "gradient_checkpointing": options.gradient_checkpointing,
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def show(console: Console, options: argparse.Namespace, work: Work, result: dict[str, Any]) -> None:
    """Print what was compared, the table, and each aim with whether it was met."""
    files = ", ".join(path.name for path in options.pairs) if options.pairs else "the shipped pairs"
    console.print(
        f"{result['num_steps']} steps of {options.batch_size} pairs from {files} (at most {options.max_length} tokens "
        f"a sequence), {Path(options.model).name}, {options.dtype}, LoRA r {LORA.r}, AdamW at "
        f"{options.learning_rate:g}, gradient checkpointing {'on' if options.gradient_checkpointing else 'off'} on "
        f"both sides, {result['device']}, {result['num_threads']} threads."
    )

    def ratio(key: str, digits: int) -> str:
        s = result[key]
        numbers = [f"{s[name]:.{digits}f}" for name in ("median", "q1", "q3", "min", "max")]
        return "{} (quartiles {} to {}, range {} to {})".format(*numbers)

    rate, bytes_of = result["pairs_per_second"], result["memory_bytes"]
    gib = {side: {k: f"{v / 2**30:.2f}" for k, v in values.items()} for side, values in bytes_of.items()}
    own = bytes_of["equipoise"]["peak"] - bytes_of["equipoise"]["loaded"]
    trl_own = bytes_of["trl"]["peak"] - bytes_of["trl"]["loaded"]
    table = Table("measured", "TRL", "equipoise", "ratio", "aim")
    table.add_row(
        "largest difference of a batch's loss",
        "",
        "",
        f"{result['max_loss_difference']:.1e}",
        "<= 1e-4 in float32",
    )
    table.add_row(
        "pairs a second, training steps",
        f"{rate['trl']:.2f}",
        f"{rate['equipoise']:.2f}",
        ratio("pairs_per_second_spread", 2),
        ">= 4, not under 2.5",
    )
    table.add_row(
        "... the whole epoch, our reference pass counted",
        f"{rate['trl']:.2f}",
        f"{_epoch_rate(result, 'equipoise'):.2f}",
        f"{result['pairs_per_second_ratio_whole_epoch']:.2f}",
        "",
    )
    table.add_row(
        "... steps, TRL with precompute_ref_log_probs",
        f"{rate['trl_precomputed']:.2f}",
        f"{rate['equipoise']:.2f}",
        ratio("pairs_per_second_trl_precomputed_spread", 2),
        "",
    )
    table.add_row(
        "... whole epoch, both reference passes counted",
        f"{_epoch_rate(result, 'trl_precomputed'):.2f}",
        f"{_epoch_rate(result, 'equipoise'):.2f}",
        f"{result['pairs_per_second_ratio_whole_epoch_trl_precomputed']:.2f}",
        "",
    )
    table.add_row(
        "peak memory of the process, GiB",
        gib["trl"]["peak"],
        gib["equipoise"]["peak"],
        f"{result['peak_memory_ratio']:.2f}",
        "<= 0.6",
    )
    table.add_row(
        "... beyond the loaded model, GiB",
        f"{trl_own / 2**30:.2f}",
        f"{own / 2**30:.2f}",
        f"{own / trl_own:.2f}",
        "",
    )
    table.add_row(
        "time with all category terms over without", "", "", ratio("category_terms_spread", 3), "<= 1.02"
    )
    console.print(table)


def _epoch_rate(result: dict[str, Any], side: str) -> float:
    """Pairs a second over one epoch, the reference pass included."""
    return result["num_pairs"] / (sum(result["seconds"][side]) + result["reference_seconds"][side])
