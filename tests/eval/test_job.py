import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.schema import HELPFUL, Exchange, Turn
from equipoise.eval import job as job_module
from equipoise.eval.config import EngineConfig, JudgeConfig, ModelChoice
from equipoise.eval.evaluator import EvaluationSettings, evaluate
from equipoise.eval.fingerprint import model_fingerprint
from equipoise.eval.generation import loading
from equipoise.eval.generation.loading import LocalModel
from equipoise.eval.generation.requests import Engine
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.job import EvaluationJob, Prompts
from equipoise.eval.judges.base import JudgeCard, Judgement, Verdict
from equipoise.eval.models import load_model


class LengthJudge:
    card = JudgeCard("length", True, "Finds long answers unsafe.", ())

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Any = None
    ) -> list[Judgement]:
        return [
            Judgement(Verdict.UNSAFE if len(text) > 3 else Verdict.SAFE, None, refused=len(text) > 3)
            for text in responses
        ]


def exchanges(suite: str, category: str, num: int) -> tuple[Exchange, ...]:
    return tuple(
        Exchange(f"{suite}{i}", ({"role": "user", "content": f"{suite} {i}"},), category, f"answer {i}")
        for i in range(num)
    )


@pytest.fixture
def job(tiny_model_folder: Path) -> EvaluationJob:
    return EvaluationJob(
        model=ModelChoice(str(tiny_model_folder), dtype="float32"),
        prompts=Prompts(
            exchanges("harmful", "S1", 4), exchanges("lookalike", "S2", 3), exchanges("helpful", HELPFUL, 3)
        ),
        judge=JudgeConfig(),
        settings=EvaluationSettings(
            GenerationSettings(max_new_tokens=4), max_prompts_per_category=2, max_helpful_prompts=2
        ),
        state="aligned",
    )


def test_it_finds_what_a_model_at_hand_would_give(job: EvaluationJob) -> None:
    report = job.run(LengthJudge())
    model, tokenizer = load_model(job.model.id, dtype="float32")
    expected = evaluate(model, tokenizer, job.prompts, LengthJudge(), job.settings, "aligned", job.model.id)
    assert replace(report, seconds=0, engine={}) == replace(expected, seconds=0, engine={})
    assert len(report.samples) == 2 + 2 + 2
    assert report.engine["weights"] == model_fingerprint(job.model.id)
    assert report.num_left_out == {"harmful": 2, "lookalike": 1, "helpfulness": 1}


def test_with_vllm_the_likelihoods_come_first_and_their_model_is_gone_by_then(
    job: EvaluationJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = job.run(LengthJudge())
    loaded: list[weakref.ref[Any]] = []
    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = load_model(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    def remote_engine(*given: Any) -> Engine:
        assert [reference() for reference in loaded] == [None]
        asked.append(given)
        return LocalModel(given[1]).engine(given[2])

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(job_module, "remote_engine", remote_engine)
    engine = EngineConfig("vllm", options={"gpu_memory_utilization": 0.4})
    report = replace(job, engine=engine).run(LengthJudge())
    assert asked == [(engine, job.model, job.settings.generation, None)]
    assert replace(report, seconds=0) == replace(expected, seconds=0)


def test_what_sources_say_besides_does_not_travel() -> None:
    given = replace(exchanges("harmful", "S1", 1)[0], meta={"labels": {"a set", "that JSON does not know"}})

    class Data:
        harmful_prompts: Sequence[Exchange] = (given,)
        lookalike_prompts: Sequence[Exchange] = ()
        helpful_prompts: Sequence[Exchange] = ()

    assert Prompts.of(Data()).harmful_prompts[0].meta == {}
