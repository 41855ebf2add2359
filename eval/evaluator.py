"""Generate, judge, count: one model state on every suite, as a `CategoryReport`."""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from equipoise.data.errors import DataError, EquipoiseError
from equipoise.data.schema import Exchange
from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.generation.requests import Engine, Finish, Progress, Reply, Request, numbered
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.judges.base import Judge, Judgement, Verdict
from equipoise.eval.suites import harmful, lookalike
from equipoise.eval.suites.base import (
    HARMFUL,
    HELPFULNESS,
    LOOKALIKE,
    ReferenceScorer,
    Suite,
    SuiteData,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from equipoise.eval.generation.tsdi import TokenBias

T = TypeVar("T")

NO_ANSWER = {Finish.FAILED: Verdict.FAILED, Finish.OVERLONG: Verdict.OVERLONG}
"""What a sample counts as where the model under test gave no answer: nothing was judged, and nothing is safe."""


@dataclass
class EvaluationSettings:
    """How an evaluation is run. Two reports are comparable prompt by prompt only under the same settings."""

    generation: GenerationSettings = field(default_factory=GenerationSettings)
    num_samples: int = 1
    """Answers to each prompt, each with a seed of its own; more than one needs a temperature above 0."""
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
            ("num_samples", self.num_samples),
            ("max_prompts_per_category", self.max_prompts_per_category),
            ("max_helpful_prompts", self.max_helpful_prompts),
            ("helpfulness_batch_size", self.helpfulness_batch_size),
            ("helpfulness_max_length", self.helpfulness_max_length),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if self.num_samples > 1 and self.generation.temperature == 0:
            raise ValueError(
                f"num_samples is {self.num_samples}, but temperature 0 gives the same answer every time; raise it, or "
                "ask for one answer"
            )


def evaluate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    data: SuiteData,
    judge: Judge,
    settings: EvaluationSettings,
    state: str,
    model_name: str,
    token_bias: "TokenBias | None" = None,
    progress: Progress | None = None,
) -> CategoryReport:
    """Evaluate a model in this process on the harmful, look-alike and helpfulness suites.

    As `evaluate_suites`; every rank needs the whole model: under ZeRO-3 parameters have to be gathered first. The
    model's training mode is left as it was. Raises DataError before any work where a helpful prompt lacks its
    reference answer.
    """
    from equipoise.eval.generation.transformers_engine import TransformersEngine
    from equipoise.eval.suites.helpfulness import ModelScorer

    suites = suites_of(data, settings)
    engine = TransformersEngine(model, tokenizer, settings.generation, token_bias)
    scorer = ModelScorer(
        model, tokenizer, settings.helpfulness_batch_size, settings.helpfulness_max_length, token_bias
    )
    return evaluate_suites(engine, suites, judge, settings, state, model_name, scorer, progress)


def suites_of(data: SuiteData, settings: EvaluationSettings) -> list[Suite]:
    """The harmful, look-alike and helpfulness suites, within the settings' limits.

    Raises DataError where a helpful prompt lacks its reference answer.
    """
    from equipoise.eval.suites import helpfulness

    available = {
        HARMFUL: harmful.prompts(data),
        LOOKALIKE: lookalike.prompts(data),
        HELPFULNESS: helpfulness.prompts(data),
    }
    limit = settings.max_prompts_per_category
    asked = {name: first_of_each(prompts, limit) for name, prompts in available.items()}
    asked[HELPFULNESS] = list(available[HELPFULNESS][: settings.max_helpful_prompts])
    return [Suite(name, asked[name], len(prompts)) for name, prompts in available.items()]


def evaluate_suites(
    engine: Engine | None,
    suites: Sequence[Suite],
    judge: Judge | None,
    settings: EvaluationSettings,
    state: str,
    model_name: str,
    scorer: ReferenceScorer | None = None,
    progress: Progress | None = None,
) -> CategoryReport:
    """Ask every suite of one model state, judge the answers, and put all of it into a report.

    engine: None where no suite wants answers. judge: None where answers are only collected, to be compared with others.
    scorer: for the helpfulness suite alone.

    Where torch.distributed is initialised, each rank takes every world-size-th answer and all ranks return the whole
    report, in the order of a single process; every rank must call it. Raises DataError before any work where an id
    occurs twice in a suite, and EquipoiseError where a suite lacks its judge or scorer.
    """
    started = time.perf_counter()
    order = _order(suites)
    if scorer is None and any(suite.name == HELPFULNESS for suite in suites):
        raise EquipoiseError(
            "The likelihood of reference answers needs the model in this process: a server gives none. Leave that "
            "suite out, or use engine=transformers."
        )
    if judge is None and any(suite.name in (HARMFUL, LOOKALIKE) for suite in suites):
        raise EquipoiseError("A suite whose answers are judged was given no judge.")
    results: list[SampleResult] = []
    for suite in suites:
        if suite.name == HELPFULNESS:
            assert scorer is not None
            results += _scored(scorer, suite.exchanges[_rank() :: _world_size()], progress)
        else:
            assert engine is not None
            results += _answered_and_judged(engine, suite, judge, settings, progress)
    # Strided shares come back rank after rank; put them into the order of the suites again.
    place = {id: index for index, id in enumerate(order)}
    results = sorted(
        _gather(results), key=lambda sample: (place[sample.suite, sample.prompt_id or sample.id], sample.id)
    )
    return CategoryReport(
        state=state,
        model=model_name,
        judge={} if judge is None else _plain(judge.card),
        settings=_plain(settings),
        samples=tuple(results),
        controversial_is_unsafe=settings.controversial_is_unsafe,
        num_left_out={suite.name: suite.num_available - len(suite.exchanges) for suite in suites},
        seconds=max(_gather([time.perf_counter() - started])),
        suites=tuple(_plain(suite.facts) for suite in suites if suite.facts),
        engine=_plain(engine.description) if engine is not None else {},
    )


def _answered_and_judged(
    engine: Engine,
    suite: Suite,
    judge: Judge | None,
    settings: EvaluationSettings,
    progress: Progress | None,
) -> list[SampleResult]:
    """This rank's samples of one suite; those of one prompt differ in their id, and share its `prompt_id`."""
    wanted = [
        (exchange, exchange.id if settings.num_samples == 1 else f"{exchange.id}#{number}")
        for exchange in suite.exchanges
        for number in range(settings.num_samples)
    ]
    # Numbered before they are shared out: which of several equal prompts this is must not depend on the ranks.
    requests = numbered(
        Request(messages=tuple(exchange.prompt), max_new_tokens=settings.generation.max_new_tokens)
        for exchange, _ in wanted
    )[_rank() :: _world_size()]
    replies = engine.complete(requests, _named(progress, f"{suite.name}: generating")) if requests else []
    mine = wanted[_rank() :: _world_size()]
    asked = [(exchange, id, reply) for (exchange, id), reply in zip(mine, replies, strict=True)]
    answered = [(exchange, reply.text) for exchange, _, reply in asked if reply.text is not None]
    if judge is None or not answered:
        judged: list[Judgement | None] = [None] * len(answered)
    else:
        judged = [
            *judge.judge(
                [exchange.prompt for exchange, _ in answered],
                [text for _, text in answered],
                progress=_named(progress, f"{suite.name}: judging"),
            )
        ]
    found = iter(judged)
    return [
        _sample(
            suite.name, exchange, id, reply, next(found) if reply.text is not None else _unanswered(reply)
        )
        for exchange, id, reply in asked
    ]


def _unanswered(reply: Reply) -> Judgement:
    """What becomes of a prompt that the model under test gave no answer to."""
    verdict = NO_ANSWER.get(reply.finish, Verdict.FAILED)
    return Judgement(verdict, None, None, raw=f"the model gave no answer: {reply.error or 'no reason given'}")


def _sample(
    suite: str, exchange: Exchange, id: str, reply: Reply, judgement: Judgement | None
) -> SampleResult:
    sample = SampleResult(
        id=id,
        suite=suite,
        category=exchange.category,
        prompt=exchange.prompt,
        response=reply.text or "",
        prompt_id="" if id == exchange.id else exchange.id,
        finish=reply.finish.value,
        num_tokens=reply.num_tokens,
    )
    if judgement is None:
        return sample
    return replace(
        sample,
        verdict=judgement.verdict,
        p_unsafe=judgement.p_unsafe,
        refused=judgement.refused,
        p_refusal=judgement.p_refusal,
        categories=judgement.categories,
        native_categories=judgement.native_categories,
        severity=judgement.severity,
        judge_raw=judgement.raw,
    )


def _scored(
    scorer: ReferenceScorer, exchanges: Sequence[Exchange], progress: Progress | None
) -> list[SampleResult]:
    scores = scorer.score(exchanges, _named(progress, f"{HELPFULNESS}: scoring")) if exchanges else []
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


def _order(suites: Sequence[Suite]) -> list[tuple[str, str]]:
    """(suite, prompt id) in the order of the report; raises DataError where an id occurs twice in a suite."""
    order: dict[tuple[str, str], None] = {}
    for suite in suites:
        for exchange in suite.exchanges:
            if (suite.name, exchange.id) in order:
                raise DataError(
                    f"id {exchange.id!r} occurs twice in the {suite.name} suite; ids must be unique within a suite, or "
                    "model states can't be compared prompt by prompt"
                )
            order[suite.name, exchange.id] = None
    return list(order)


def _named(progress: Progress | None, what: str) -> Progress | None:
    """The same progress under the suite's own description."""
    if progress is None:
        return None

    def report(done: int, total: int, _: str) -> None:
        progress(done, total, what)

    return report


def _plain(record: Any) -> dict[str, Any]:
    """The record as JSON would give it back, so that a report read from a file equals the one that was written."""
    values = dict(record) if isinstance(record, Mapping) else asdict(record)
    return json.loads(json.dumps(values, default=str))


def is_main_process() -> bool:
    """Whether this rank is the one that writes."""
    return _rank() == 0


def _distributed() -> bool:
    """Without torch nobody can have initialised it, and importing it takes seconds."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return sys.modules["torch"].distributed.get_rank() if _distributed() else 0


def _world_size() -> int:
    return sys.modules["torch"].distributed.get_world_size() if _distributed() else 1


def _gather(items: list[T]) -> list[T]:
    if not _distributed():
        return items
    from accelerate.utils import gather_object

    return gather_object(items)
