"""Generate, judge, count: one model state on every suite, as a `CategoryReport`."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from equipoise.data.errors import DataError
from equipoise.data.schema import Exchange
from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.generation.engine import GenerationSettings, generate
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.eval.judges.base import Judge, JudgeCard, Progress
from equipoise.eval.suites import harmful, helpfulness, lookalike
from equipoise.eval.suites.base import HARMFUL, HELPFULNESS, LOOKALIKE, SuiteData

T = TypeVar("T")


@dataclass
class EvaluationSettings:
    """How an evaluation is run. Two reports are comparable prompt by prompt only under the same settings."""

    generation: GenerationSettings = field(default_factory=GenerationSettings)
    max_prompts_per_category: int | None = None
    """Of the harmful and of the look-alike suite, the first so many prompts of each category; None: all."""
    max_helpful_prompts: int | None = None
    """The first so many of the helpfulness suite; None: all."""
    helpfulness_batch_size: int = 8
    """Reference answers scored at once."""
    helpfulness_max_length: int = 1024
    """Tokens of prompt and reference answer together; a longer exchange is counted as unscored."""
    controversial_is_unsafe: bool = True
    """How a verdict between safe and unsafe counts, where a judge has one."""

    def __post_init__(self) -> None:
        for name, value in (
            ("max_prompts_per_category", self.max_prompts_per_category),
            ("max_helpful_prompts", self.max_helpful_prompts),
            ("helpfulness_batch_size", self.helpfulness_batch_size),
            ("helpfulness_max_length", self.helpfulness_max_length),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    judge: Judge,
    settings: EvaluationSettings,
    state: str,
    model_name: str,
    token_bias: TokenBias | None = None,
    progress: Progress | None = None,
) -> CategoryReport:
    """Evaluate one model state on the harmful, look-alike and helpfulness suites.

    Where torch.distributed is initialised, each rank takes every world-size-th prompt and all ranks return the whole
    report, in the order of a single process. Every rank must call it, and each needs the whole model: under ZeRO-3
    parameters have to be gathered first. The model's training mode is left as it was. Raises DataError before any
    work where an id occurs twice in a suite or a helpful prompt lacks its reference answer.
    """
    started = time.perf_counter()
    suites = {
        HARMFUL: first_of_each(harmful.prompts(data), settings.max_prompts_per_category),
        LOOKALIKE: first_of_each(lookalike.prompts(data), settings.max_prompts_per_category),
        HELPFULNESS: list(helpfulness.prompts(data)[: settings.max_helpful_prompts]),
    }
    num_available = {
        HARMFUL: len(data.harmful_prompts),
        LOOKALIKE: len(data.lookalike_prompts),
        HELPFULNESS: len(data.helpful_prompts),
    }
    order = _order(suites)
    results: list[SampleResult] = []
    for suite, exchanges in suites.items():
        mine = exchanges[_rank() :: _world_size()]
        if not mine:
            continue
        if suite == HELPFULNESS:
            results += _score(model, tokenizer, mine, settings, token_bias, progress)
        else:
            results += _generate_and_judge(
                model, tokenizer, suite, mine, judge, settings.generation, token_bias, progress
            )
    # Strided shares come back rank after rank; put them into the order of the suites again.
    results = sorted(_gather(results), key=lambda sample: order[sample.suite, sample.id])
    return CategoryReport(
        state=state,
        model=model_name,
        judge=_plain(judge.card),
        settings=_plain(settings),
        samples=tuple(results),
        controversial_is_unsafe=settings.controversial_is_unsafe,
        num_left_out={suite: num_available[suite] - len(asked) for suite, asked in suites.items()},
        seconds=max(_gather([time.perf_counter() - started])),
    )


def _generate_and_judge(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suite: str,
    exchanges: Sequence[Exchange],
    judge: Judge,
    settings: GenerationSettings,
    token_bias: TokenBias | None,
    progress: Progress | None,
) -> list[SampleResult]:
    prompts = [exchange.prompt for exchange in exchanges]
    generations = generate(
        model,
        tokenizer,
        prompts,
        settings,
        token_bias=token_bias,
        progress=_named(progress, f"{suite}: generating"),
    )
    responses = [generation.text for generation in generations]
    judgements = judge.judge(prompts, responses, progress=_named(progress, f"{suite}: judging"))
    return [
        SampleResult(
            id=exchange.id,
            suite=suite,
            category=exchange.category,
            prompt=exchange.prompt,
            response=response,
            verdict=judgement.verdict,
            p_unsafe=judgement.p_unsafe,
            refused=judgement.refused,
        )
        for exchange, response, judgement in zip(exchanges, responses, judgements, strict=True)
    ]


def _score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    exchanges: Sequence[Exchange],
    settings: EvaluationSettings,
    token_bias: TokenBias | None,
    progress: Progress | None,
) -> list[SampleResult]:
    scores = helpfulness.log_likelihoods(
        model,
        tokenizer,
        exchanges,
        batch_size=settings.helpfulness_batch_size,
        max_length=settings.helpfulness_max_length,
        token_bias=token_bias,
        progress=_named(progress, f"{HELPFULNESS}: scoring"),
    )
    return [
        SampleResult(
            id=exchange.id,
            suite=HELPFULNESS,
            category=exchange.category,
            prompt=exchange.prompt,
            response=exchange.response or "",
            score=score,
        )
        for exchange, score in zip(exchanges, scores, strict=True)
    ]


def first_of_each(exchanges: Sequence[Exchange], limit: int | None) -> list[Exchange]:
    """The first `limit` exchanges of each category, in their order."""
    num_taken: Counter[str] = Counter()
    taken = []
    for exchange in exchanges:
        if limit is None or num_taken[exchange.category] < limit:
            num_taken[exchange.category] += 1
            taken.append(exchange)
    return taken


def _order(suites: Mapping[str, Sequence[Exchange]]) -> dict[tuple[str, str], int]:
    """(suite, sample id) -> place in the report; raises DataError where an id occurs twice in a suite."""
    order: dict[tuple[str, str], int] = {}
    for suite, exchanges in suites.items():
        for exchange in exchanges:
            if (suite, exchange.id) in order:
                raise DataError(
                    f"id {exchange.id!r} occurs twice in the {suite} suite; ids must be unique within a suite, or "
                    "model states can't be compared prompt by prompt"
                )
            order[suite, exchange.id] = len(order)
    return order


def _named(progress: Progress | None, what: str) -> Progress | None:
    """The same progress under the suite's own description."""
    if progress is None:
        return None

    def report(done: int, total: int, _: str) -> None:
        progress(done, total, what)

    return report


def _plain(record: JudgeCard | EvaluationSettings) -> dict[str, Any]:
    """The record as JSON would give it back, so that a report read from a file equals the one that was written."""
    return json.loads(json.dumps(asdict(record), default=str))


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if _distributed() else 1


def _gather(items: list[T]) -> list[T]:
    return gather_object(items) if _distributed() else items
