"""`scripts/ablate_tsdi`: N, L, alpha, pool, continuation and plausibility of TSDI, each setting judged."""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from ablation.tsdi_result import Answer, Point, show, write_result
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from equipoise.data.errors import DataError
from equipoise.data.files import write_aside
from equipoise.data.schema import Exchange
from equipoise.data.sources import load_samples
from equipoise.eval.evaluator import first_of_each
from equipoise.eval.generation.engine import GenerationSettings, generate
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings, estimate_token_bias
from equipoise.eval.judges.base import Judge, Verdict
from equipoise.eval.judges.embedded import EmbeddedJudge
from equipoise.eval.models import load_model
from equipoise.eval.suites.base import HARMFUL, LOOKALIKE

DESCRIPTION = """\
Measure the token bias of an aligned model against its reference under several settings, decode with each, and judge the
answers to harmful and to look-alike prompts. Every option that takes several values is a factor. One factor is varied
at a time, with the first value of the others; --grid takes all combinations. alpha 0, the aligned model as it is, is
always judged, and every other point is compared with it prompt by prompt.

Every judged answer goes into OUTPUT/answers.jsonl as it comes: the same command goes on where it was stopped. An answer
is decoded to its end, and judged, once for each way that its first tokens can come out: after them the aligned model is
on its own, so that two settings with the same opening have the same answer.
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "ablate_tsdi", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--aligned", required=True, help="the model folder that is corrected")
    add("--reference", default="smollm2_135m", help="smollm2_135m, a hub id or a model folder")
    add("--output", type=Path, required=True, metavar="FOLDER", help="answers, token biases, table and plot")
    factor = {"nargs": "+", "metavar": "VALUE"}
    add("--num-prompts", type=int, default=[32, 8], **factor, help="N (32 8)")
    add("--num-positions", type=int, default=[8, 1, 4], **factor, help="L (8 1 4)")
    add("--alpha", type=float, default=[1.0, 0.5, 2.0], **factor, help="(1 0.5 2)")
    add("--pool", default=["vocabulary", "words"], **factor, help="vocabulary | words (of the shipped pairs)")
    add("--continuation", default=["random"], **factor, help="random | aligned (random)")
    add("--plausibility", type=float, default=[0.0], **factor, help="(0)")
    add("--grid", action="store_true", help="all combinations in place of one factor at a time")
    add("--max-prompts-per-category", type=int, metavar="NUM", help="of either suite; all otherwise")
    add("--max-new-tokens", type=int, default=64)
    add("--batch-size", type=int, default=16, help="prompts answered, judged and saved at a time (16)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both models (float32)")
    add("--seed", type=int, default=0, help="of the random prompts (0)")
    return parser


def points_of(options: argparse.Namespace) -> list[Point]:
    """alpha 0 first, then every setting once; ValueError where a value makes no sense."""
    factors = {factor.name: list(getattr(options, factor.name)) for factor in fields(Point)}
    first = Point(**{name: values[0] for name, values in factors.items()})
    if options.grid:
        points = [
            Point(**dict(zip(factors, values, strict=True)))
            for values in itertools.product(*factors.values())
        ]
    else:
        points = [replace(first, **{name: value}) for name, values in factors.items() for value in values]
    # Without a correction the other settings change nothing.
    points = [replace(first, alpha=0.0), *(point for point in points if point.alpha != 0)]
    return list(dict.fromkeys(points))


def settings_of(point: Point, seed: int) -> TSDISettings:
    """The point as the estimator takes it; ValueError where a value makes no sense."""
    return TSDISettings(**asdict(point), seed=seed)


@dataclass
class Store:
    """The answers that are there, in memory and as lines of a file."""

    path: Path
    answers: dict[tuple[str, str, str], Answer] = field(default_factory=dict)
    """(point, suite, prompt id) -> answer."""
    by_opening: dict[tuple[str, str, str], Answer] = field(default_factory=dict)
    """(suite, prompt id, opening) -> an answer of any point: what begins alike goes on alike."""

    @classmethod
    def open(cls, path: Path, say: Callable[[str], None]) -> "Store":
        """What an earlier run left; a last line that was cut short is taken off, and said."""
        store = cls(path)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            say(f"{path}: the last line was cut short, and is judged again")
            lines = lines[:-1]
            write_aside(path, b"".join(lines).decode("utf-8"))
        for number, line in enumerate(lines, start=1):
            try:
                answer = Answer(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: no answer of an ablation ({error}). "
                    "Remove the line, or give another --output."
                ) from error
            store._remember(answer)
        return store

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep answers; on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
            file.flush()
            os.fsync(file.fileno())
        for answer in answers:
            self._remember(answer)

    def _remember(self, answer: Answer) -> None:
        self.answers[answer.point, answer.suite, answer.id] = answer
        self.by_opening[answer.suite, answer.id, answer.opening] = answer


@dataclass
class Ablation:
    """Everything loaded once."""

    options: argparse.Namespace
    points: list[Point]
    suites: dict[str, list[Exchange]]
    aligned: Any
    reference: Any
    tokenizer: Any
    judge: Judge
    store: Store
    words: list[str]

    @property
    def num_opening_tokens(self) -> int:
        """Tokens after which no point corrects any more."""
        return max(point.num_positions for point in self.points)

    def token_bias(self, point: Point) -> TokenBias | None:
        """The point's token bias. Points that differ in L or alpha alone share the contexts it is measured on."""
        if point.alpha == 0:
            return None
        full = replace(
            settings_of(point, self.options.seed), num_positions=self.num_opening_tokens, alpha=1.0
        )
        path = self.options.output / "token_biases" / f"{point.measurement}.safetensors"
        if path.exists():
            measured = TokenBias.load(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            measured = estimate_token_bias(
                self.aligned, self.reference, self.tokenizer, full, words=self.words
            )
            measured.save(path)
        kept = slice(point.num_positions)
        settings = settings_of(point, self.options.seed)
        return TokenBias(measured.bias[kept], measured.mean_probability[kept], settings)

    def answers(self, point: Point, suite: str) -> Iterator[tuple[list[Answer], int]]:
        """Answers of the point that are missing, batch by batch, and how many had to be decoded to their end."""
        asked = [
            exchange
            for exchange in self.suites[suite]
            if (point.name, suite, exchange.id) not in self.store.answers
        ]
        bias = self.token_bias(point) if asked else None
        for start in range(0, len(asked), self.options.batch_size):
            yield self._answer(point, suite, asked[start : start + self.options.batch_size], bias)

    def _answer(
        self, point: Point, suite: str, asked: list[Exchange], bias: TokenBias | None
    ) -> tuple[list[Answer], int]:
        openings = self._texts(asked, self.num_opening_tokens, bias)
        known = {
            exchange.id: self.store.by_opening.get((suite, exchange.id, opening))
            for exchange, opening in zip(asked, openings, strict=True)
        }
        new = [exchange for exchange in asked if known[exchange.id] is None]
        responses = self._texts(new, self.options.max_new_tokens, bias) if new else []
        judgements = self.judge.judge([exchange.prompt for exchange in new], responses) if new else []
        judged = {
            exchange.id: (response, judgement)
            for exchange, response, judgement in zip(new, responses, judgements, strict=True)
        }
        answers = []
        for exchange, opening in zip(asked, openings, strict=True):
            twin = known[exchange.id]
            if twin is not None:
                answers.append(replace(twin, point=point.name))
                continue
            response, judgement = judged[exchange.id]
            answers.append(
                Answer(
                    point=point.name,
                    suite=suite,
                    id=exchange.id,
                    category=exchange.category,
                    opening=opening,
                    response=response,
                    unsafe=None
                    if judgement.verdict is Verdict.UNPARSED
                    else judgement.verdict is not Verdict.SAFE,
                    refused=judgement.refused,
                )
            )
        return answers, len(new)

    def _texts(self, asked: Sequence[Exchange], num_tokens: int, bias: TokenBias | None) -> list[str]:
        settings = GenerationSettings(max_new_tokens=num_tokens, batch_size=self.options.batch_size)
        prompts = [exchange.prompt for exchange in asked]
        return [answer.text for answer in generate(self.aligned, self.tokenizer, prompts, settings, bias)]


def run(options: argparse.Namespace) -> int:
    """Judge every point, write OUTPUT/table.md, result.json and plot.png; returns 0. Raises EquipoiseError."""
    try:
        points = points_of(options)
        for point in points:
            settings_of(point, options.seed)
    except ValueError as error:
        raise DataError(str(error)) from error
    console = Console(stderr=True, highlight=False)
    _claim(options)
    ablation = _load(options, points, console)
    num_decoded = num_answers = 0
    started = time.perf_counter()
    with _progress(console, len(points) * len(ablation.suites)) as advance:
        for point in points:
            for suite in ablation.suites:
                for answers, num_new in ablation.answers(point, suite):
                    ablation.store.add(answers)
                    num_decoded += num_new
                    num_answers += len(answers)
                advance(f"{point.name}, {suite}")
    if num_answers:
        console.print(
            f"{num_answers} answers, {num_decoded} of them decoded to their end and judged, the others had the opening "
            f"of one that was; {time.perf_counter() - started:.0f} s"
        )
    result = write_result(options.output, points, list(ablation.store.answers.values()), vars_of(options))
    show(result, Console(width=None if sys.stdout.isatty() else 140, highlight=False))
    console.print(f"{options.output}: table.md, result.json, plot.png")
    return 0


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the answers depend on, but for the points themselves: a folder holds answers of one such setting."""
    names = (
        "aligned",
        "reference",
        "max_prompts_per_category",
        "max_new_tokens",
        "batch_size",
        "dtype",
        "seed",
    )
    longest = max(options.num_positions)
    return {name: getattr(options, name) for name in names} | {"num_opening_tokens": longest}


def _claim(options: argparse.Namespace) -> None:
    """Bind the output folder to one setting; DataError where it holds answers of another."""
    path, mine = options.output / "setting.json", vars_of(options)
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in mine if theirs.get(name) != mine[name])
        if differing:
            raise DataError(
                f"{options.output} holds an ablation with another {', '.join(differing)}. "
                "Give another --output, or these options as they were."
            )
        return
    options.output.mkdir(parents=True, exist_ok=True)
    write_aside(path, json.dumps(mine, indent=1) + "\n")


def _load(options: argparse.Namespace, points: list[Point], console: Console) -> Ablation:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    aligned, tokenizer = load_model(options.aligned, dtype=options.dtype)
    reference, _ = load_model(options.reference, dtype=options.dtype)
    samples = load_samples()
    limit = options.max_prompts_per_category
    return Ablation(
        options=options,
        points=points,
        suites={
            HARMFUL: first_of_each(samples.harmful_prompts, limit),
            LOOKALIKE: first_of_each(samples.lookalike_prompts, limit),
        },
        aligned=aligned.to(device),
        reference=reference.to(device),
        tokenizer=tokenizer,
        judge=EmbeddedJudge.load(batch_size=16, dtype="float32" if device.type == "cpu" else "bfloat16"),
        store=Store.open(options.output / "answers.jsonl", console.print),
        words=[turn["content"] for pair in samples.safety_pairs for turn in pair.prompt],
    )


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("points", total=total)
        yield lambda text: bars.update(task, advance=1, description=text)
