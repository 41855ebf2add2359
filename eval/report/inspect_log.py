"""A report as an Inspect log, so that `inspect view` opens it: every sample with its verdict, every rate as a metric.

    python -m equipoise.eval.report.inspect_log report.json logs/aligned.eval

Needs inspect_ai, the extra `inspect`. Its dependencies hold back some that equipoise pins in constraints.txt: install
it into an environment of its own, with equipoise beside it. Nothing here needs torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from equipoise.data.errors import EquipoiseError
from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.judges.base import Verdict
from equipoise.eval.rates import Rate
from equipoise.eval.suites import harmful
from equipoise.eval.suites.base import HARMFUL, HELPFULNESS, LOOKALIKE

_MISSING: ImportError | None = None
try:
    from inspect_ai.log import (
        EvalConfig,
        EvalDataset,
        EvalLog,
        EvalMetric,
        EvalResults,
        EvalSample,
        EvalScore,
        EvalSpec,
        EvalStats,
        write_eval_log,
    )
    from inspect_ai.model import (
        ChatMessage,
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        ModelOutput,
    )
    from inspect_ai.scorer import Score
except ImportError as error:  # the module can be read without; writing a log says what is missing
    _MISSING = error

SUFFIXES = (".eval", ".json")
"""Of the two formats that a log has."""
_REASONS = {
    Verdict.UNPARSED: "invalid_response_format",
    Verdict.FAILED: "grader_failed",
    Verdict.OVERLONG: "scoring_failed",
}
"""Inspect's words for what is no finding."""
_STOP_REASONS = {"stop": "stop", "length": "max_tokens", "overlong": "model_length"}


def write_inspect_log(report: CategoryReport, path: Path | str, created: datetime | None = None) -> Path:
    """Write `report` as an Inspect log: `.eval`, or `.json`; `created` is now where None. Returns `path`.

    Raises ValueError for another suffix, EquipoiseError where inspect_ai is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: an Inspect log ends in {' or '.join(SUFFIXES)}")
    log = inspect_log(report, created)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write_eval_log(log, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def inspect_log(report: CategoryReport, created: datetime | None = None) -> EvalLog:
    """`report` as an Inspect log; samples without a finding are unscored there too, never 0.

    Raises EquipoiseError where inspect_ai is not installed.
    """
    if _MISSING is not None:
        raise EquipoiseError(
            f"an Inspect log needs inspect_ai: {_MISSING}; `pip install 'equipoise[inspect]'` in an environment of "
            "its own"
        ) from _MISSING
    judge = str(report.judge.get("name"))
    ended = (created or datetime.now(UTC)).astimezone(UTC)
    started = (ended - timedelta(seconds=report.seconds)).isoformat(timespec="seconds")
    return EvalLog(
        status="success",
        stats=EvalStats(started_at=started, completed_at=ended.isoformat(timespec="seconds")),
        eval=EvalSpec(
            created=ended.isoformat(timespec="seconds"),
            task=f"equipoise/{report.state}",
            task_version=1,
            dataset=EvalDataset(
                name="equipoise",
                samples=len(report.samples),
                sample_ids=[_id(sample) for sample in report.samples],
            ),
            model=_encodable(report.model),
            config=EvalConfig(),
            metadata=_encodable(
                {
                    "judge": report.judge,
                    "settings": report.settings,
                    "engine": report.engine,
                    "suites": list(report.suites),
                    "num_left_out": report.num_left_out,
                    "controversial_is_unsafe": report.controversial_is_unsafe,
                    "calibration": None if report.calibration is None else report.calibration.to_dict(),
                }
            ),
        ),
        results=EvalResults(
            total_samples=len(report.samples),
            completed_samples=len(report.samples),
            scores=list(_scores(report, judge)),
        ),
        samples=[_sample(report, sample, judge) for sample in report.samples],
    )


def _sample(report: CategoryReport, sample: SampleResult, judge: str) -> EvalSample:
    prompt = [_message(turn["role"], _encodable(turn["content"])) for turn in sample.prompt]
    response = _encodable(sample.response)
    scored = sample.suite == HELPFULNESS  # there `response` is the reference answer: nothing was generated
    answer: list[ChatMessage] = [] if scored else [ChatMessageAssistant(content=response)]
    stop_reason = cast(Any, _STOP_REASONS.get(sample.finish or "stop", "unknown"))
    return EvalSample(
        id=_id(sample),
        epoch=1,
        input=prompt,
        target=response if scored else "",
        messages=prompt + answer,
        output=ModelOutput()
        if scored
        else ModelOutput.from_content(_encodable(report.model), response, stop_reason),
        scores=dict(_sample_scores(report, sample, judge)),
        metadata=_encodable(
            {
                "suite": sample.suite,
                "category": sample.category,
                "prompt_id": sample.prompt_id or sample.id,
                "finish": sample.finish,
                "num_tokens": sample.num_tokens,
            }
        ),
    )


def _sample_scores(report: CategoryReport, sample: SampleResult, judge: str) -> Iterator[tuple[str, Score]]:
    if sample.suite == HELPFULNESS:
        yield "log_likelihood", _score(sample.score, "", "")
        return
    verdict = sample.verdict
    found: dict[str, Any] = {
        "judge": judge,
        "verdict": None if verdict is None else verdict.value,
        "p_unsafe": sample.p_unsafe,
        "severity": sample.severity,
        "categories": list(sample.categories),
        "native_categories": list(sample.native_categories),
    }
    reason = _REASONS.get(verdict, "grader_failed") if verdict is not None else "grader_failed"
    shown = "" if verdict is None else verdict.value
    if sample.suite == HARMFUL:
        unsafe = harmful.unsafe(verdict, report.controversial_is_unsafe)
        yield "unsafe", _score(unsafe, shown, sample.judge_raw, found, reason)
    refused = {None: "not said", True: "refused", False: "complied"}[sample.refused]
    yield (
        "refused",
        _score(sample.refused, refused, sample.judge_raw, {"p_refusal": sample.p_refusal}, reason),
    )


def _score(
    value: bool | float | None,
    answer: str,
    explanation: str,
    metadata: Mapping[str, Any] | None = None,
    reason: str = "scoring_failed",
) -> Score:
    fields: dict[str, Any] = {
        "answer": answer or None,
        "explanation": _encodable(explanation) or None,
        "metadata": _encodable(dict(metadata or {})) or None,
    }
    if value is None:
        return Score.unscored(reason=reason, **fields)
    return Score(value=float(value), **fields)


def _scores(report: CategoryReport, judge: str) -> Iterator[EvalScore]:
    """The rates over all samples and of each category, with their intervals as metadata."""
    for name, rate, categories in (
        ("unsafe", report.overall_unsafe_rate, report.unsafe_rate),
        ("refused", report.over_refusal, report.over_refusal_rate),
    ):
        metric = {"unsafe": "unsafe_rate", "refused": "over_refusal_rate"}[name]
        rates = {metric: rate} | {f"{metric}/{category}": each for category, each in categories.items()}
        yield EvalScore(
            name=name,
            scorer=judge,
            scored_samples=rate.n,
            unscored_samples=rate.num_no_finding,
            metrics={key: _metric(key, each) for key, each in rates.items() if each.rate is not None},
            metadata={"suite": HARMFUL if name == "unsafe" else LOOKALIKE},
        )
    mean = report.helpfulness
    if mean.mean is not None:
        yield EvalScore(
            name="log_likelihood",
            scorer="equipoise",
            scored_samples=mean.n,
            unscored_samples=report.num_unscored,
            metrics={
                "mean": EvalMetric(
                    name="mean", value=mean.mean, metadata={"low": mean.low, "high": mean.high}
                )
            },
            metadata={"suite": HELPFULNESS},
        )


def _metric(name: str, rate: Rate) -> EvalMetric:
    assert rate.rate is not None
    known = {
        key: getattr(rate, key) for key in ("low", "high", "n", "num_no_finding", "best_low", "worst_high")
    }
    return EvalMetric(name=name, value=rate.rate, metadata=known)


def _id(sample: SampleResult) -> str:
    return _encodable(f"{sample.suite}/{sample.id}")


def _message(role: str, content: str) -> ChatMessage:
    if role == "system":
        return ChatMessageSystem(content=content)
    return ChatMessageAssistant(content=content) if role == "assistant" else ChatMessageUser(content=content)


def _encodable(value: Any) -> Any:
    """`value` with lone surrogates as escapes: UTF-8 has no bytes for them, and Inspect's writer stops there."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """`report.json` in, Inspect log out; 2 where the report can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m equipoise.eval.report.inspect_log",
        description="Write a report as an Inspect log: inspect view --log-dir FOLDER opens it.",
    )
    parser.add_argument("report", type=Path, help="a report.json")
    parser.add_argument("log", type=Path, help="the log to write: .eval or .json")
    options = parser.parse_args(arguments)
    try:
        report = CategoryReport.from_json(options.report)
        created = datetime.fromtimestamp(options.report.stat().st_mtime, UTC)
        print(write_inspect_log(report, options.log, created))
    except (EquipoiseError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
