"""How good a judge is on labelled answers: sensitivity, specificity and AUROC, each with its 95 % interval."""

import datetime
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.data.files import write_aside
from equipoise.data.schema import LabelledExchange
from equipoise.eval.generation.requests import Progress
from equipoise.eval.judges.base import Judge, JudgeError, Judgement, Verdict
from equipoise.eval.rates import Rate
from equipoise.eval.statistics import IntervalMethod, wilson_interval
from equipoise.eval.statistics.auroc import auroc_interval
from equipoise.eval.statistics.rogan_gladen import CorrectedRate, JudgeErrors

SCHEMA_VERSION = 1
MIN_LABELS = 30
"""A category with fewer answers of either label is corrected by the errors over all categories."""


@dataclass(frozen=True, slots=True)
class HeadCalibration:
    """One kind of finding (unsafe, or refused) on answers that somebody labelled."""

    n: int
    """Labelled answers."""
    sensitivity: Rate
    """Found among those labelled so; answers without a finding are counted beside it."""
    specificity: Rate
    """Not found among the others."""
    auroc: float | None
    """Of the judge's probability; None where it gives none, or one label does not occur."""
    auroc_low: float | None
    auroc_high: float | None
    num_scored: int
    """Answers with a probability: those that the AUROC is over."""


@dataclass(frozen=True)
class JudgeCalibration:
    """A judge held against labelled answers; written beside a judge and used to correct its rates."""

    judge: str
    """The judge's name, as on its card."""
    data: str
    """What it was measured on."""
    date: str
    """Day of the measurement, ISO 8601."""
    settings: dict[str, Any]
    """What determines the judge's findings: model, revision, sampling ..."""
    controversial_is_unsafe: bool
    n: int
    """Labelled answers judged."""
    num_no_finding: dict[str, int]
    """Verdict (`unparsed`, `failed`, `overlong`) -> answers that it did not judge."""
    unsafe: HeadCalibration
    unsafe_by_category: dict[str, HeadCalibration]
    refusal: HeadCalibration | None
    """None where nothing is labelled as a refusal or not."""

    def errors(self, category: str | None = None) -> JudgeErrors:
        """The judge's errors in calling answers unsafe: in the category, if that has enough labels, else over all."""
        head, source = self.unsafe, "all"
        own = self.unsafe_by_category.get(category) if category is not None else None
        if own is not None and min(own.sensitivity.n, own.specificity.n) >= MIN_LABELS:
            head, source = own, category or "all"
        sensitivity, specificity = head.sensitivity, head.specificity
        return JudgeErrors(
            num_unsafe=sensitivity.n_effective,
            num_found=sensitivity.n_effective * (sensitivity.rate or 0.0),
            num_safe=specificity.n_effective,
            num_cleared=specificity.n_effective * (specificity.rate or 0.0),
            source=source,
        )

    def card_entries(self) -> list[dict[str, object]]:
        """The figures as entries of `JudgeCard.calibration`."""
        heads = [("unsafe", self.unsafe)] + ([("refusal", self.refusal)] if self.refusal else [])
        entries: list[dict[str, object]] = []
        for name, head in heads:
            entry: dict[str, object] = {
                "name": self.data,
                "head": name,
                "protocol": f"measured {self.date}",
                "fitted_on": False,
                "n": head.n,
                "num_positive": head.sensitivity.n,
                "auroc": head.auroc,
                "auroc_low": head.auroc_low,
                "auroc_high": head.auroc_high,
            }
            for key, rate in (("sensitivity", head.sensitivity), ("specificity", head.specificity)):
                known = rate.rate is not None
                entry |= {
                    key: rate.rate,
                    f"{key}_low": rate.low if known else None,
                    f"{key}_high": rate.high if known else None,
                }
            entries.append(entry)
        return entries

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"schema_version": SCHEMA_VERSION} | asdict(self)

    def to_json(self, path: Path | str) -> None:
        """Write the calibration; aside first, then renamed over `path`."""
        write_aside(Path(path), json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=1))

    @classmethod
    def from_dict(cls, document: Any, where: str = "calibration") -> "JudgeCalibration":
        """The inverse of `to_dict`; raises JudgeError naming `where` and what is wrong."""
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise JudgeError(
                f"{where}: schema_version is {version!r}, expected {SCHEMA_VERSION}; calibrate the judge again"
            )
        try:
            values = {item.name: document[item.name] for item in fields(cls)}
            values["unsafe"] = _head(values["unsafe"])
            values["unsafe_by_category"] = {
                category: _head(head) for category, head in values["unsafe_by_category"].items()
            }
            values["refusal"] = None if values["refusal"] is None else _head(values["refusal"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise JudgeError(
                f"{where}: not a judge's calibration: {type(error).__name__} {error}; expected what "
                "`python -m equipoise.eval calibrate` writes"
            ) from error

    @classmethod
    def from_json(cls, path: Path | str) -> "JudgeCalibration":
        """Read a calibration; raises JudgeError naming the file and what is wrong with it."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise JudgeError(f"{path}: not a readable calibration: {error}") from error
        return cls.from_dict(document, str(path))


def calibrate(
    judge: Judge,
    exchanges: Sequence[LabelledExchange],
    progress: Progress | None = None,
    data: str = "",
    settings: Mapping[str, Any] | None = None,
    controversial_is_unsafe: bool = True,
    date: str | None = None,
) -> JudgeCalibration:
    """Hold a judge against labelled answers.

    exchanges: those with neither label are left out. Answers to one prompt are not independent and the intervals know
    it. data: the name of the data; settings: what determines the judge's findings; date: today where None.
    Raises JudgeError where nothing is labelled safe or unsafe.
    """
    exchanges = [e for e in exchanges if e.safe is not None or e.refusal is not None]
    if not any(exchange.safe is not None for exchange in exchanges):
        raise JudgeError(
            "no exchange is labelled safe or unsafe (`safe`); a judge is calibrated against such labels"
        )
    judgements = judge.judge(
        [exchange.prompt for exchange in exchanges], [exchange.response for exchange in exchanges], progress
    )
    found = [
        _Finding.unsafe(exchange, judgement, controversial_is_unsafe)
        for exchange, judgement in zip(exchanges, judgements, strict=True)
        if exchange.safe is not None
    ]
    refused = [
        _Finding.refusal(exchange, judgement)
        for exchange, judgement in zip(exchanges, judgements, strict=True)
        if exchange.refusal is not None
    ]
    verdicts = [judgement.verdict for judgement in judgements]
    categories = sorted({finding.category for finding in found})
    return JudgeCalibration(
        judge=judge.card.name,
        data=data,
        date=date or datetime.date.today().isoformat(),
        settings=json.loads(json.dumps(dict(settings or {}), default=str)),
        controversial_is_unsafe=controversial_is_unsafe,
        n=len(exchanges),
        num_no_finding={
            verdict.value: verdicts.count(verdict)
            for verdict in (Verdict.UNPARSED, Verdict.FAILED, Verdict.OVERLONG)
        },
        unsafe=_calibrated(found),
        unsafe_by_category={
            category: _calibrated([finding for finding in found if finding.category == category])
            for category in categories
        },
        refusal=_calibrated(refused) if refused else None,
    )


@dataclass(frozen=True, slots=True)
class _Finding:
    """One labelled answer and what the judge found."""

    category: str
    prompt: Hashable
    label: bool
    outcome: bool | None
    score: float | None
    verdict: Verdict

    @classmethod
    def unsafe(
        cls, exchange: LabelledExchange, judgement: Judgement, controversial_is_unsafe: bool
    ) -> "_Finding":
        outcome = {
            Verdict.UNSAFE: True,
            Verdict.SAFE: False,
            Verdict.CONTROVERSIAL: controversial_is_unsafe,
        }.get(judgement.verdict)
        return cls(
            exchange.category,
            _text(exchange),
            not exchange.safe,
            outcome,
            judgement.p_unsafe,
            judgement.verdict,
        )

    @classmethod
    def refusal(cls, exchange: LabelledExchange, judgement: Judgement) -> "_Finding":
        return cls(
            exchange.category,
            _text(exchange),
            bool(exchange.refusal),
            judgement.refused,
            judgement.p_refusal,
            judgement.verdict,
        )


def _text(exchange: LabelledExchange) -> str:
    return json.dumps(exchange.prompt)


def _calibrated(findings: Sequence[_Finding]) -> HeadCalibration:
    def rate(label: bool) -> Rate:
        of = [finding for finding in findings if finding.label is label]
        return Rate.of(
            [None if finding.outcome is None else finding.outcome is label for finding in of],
            verdicts=[finding.verdict for finding in of],
            prompts=[finding.prompt for finding in of],
        )

    scored = [finding for finding in findings if finding.score is not None]
    positive = [finding for finding in scored if finding.label]
    negative = [finding for finding in scored if not finding.label]
    auroc: float | None = None
    low: float | None = None
    high: float | None = None
    if positive and negative:
        auroc, low, high = auroc_interval(
            np.array([finding.score for finding in positive]),
            np.array([finding.score for finding in negative]),
            [finding.prompt for finding in positive],
            [finding.prompt for finding in negative],
        )
    return HeadCalibration(len(findings), rate(True), rate(False), auroc, low, high, len(scored))


def _head(document: Mapping[str, Any]) -> HeadCalibration:
    rates = {name: _rate(document[name]) for name in ("sensitivity", "specificity")}
    return HeadCalibration(**{**document, **rates})


def _rate(document: Mapping[str, Any]) -> Rate:
    corrected = document["corrected"]
    return Rate(
        **{
            **document,
            "method": IntervalMethod(document["method"]),
            "corrected": None if corrected is None else CorrectedRate(**corrected),
        }
    )


def calibration_entry(
    name: str, head: str, protocol: str, fitted_on: bool, label: NDArray, score: NDArray, threshold: float
) -> dict[str, object]:
    """One entry of a judge's card, from labels `(N,)` in {False, True} and probabilities `(N,)`.

    A rate whose kind of answer is absent from the data (no positives, or no negatives) is None.
    Sensitivity and specificity carry Wilson intervals, AUROC DeLong's.
    """
    positive, negative = score[label], score[~label]
    entry: dict[str, object] = {
        "name": name,
        "head": head,
        "protocol": protocol,
        "fitted_on": fitted_on,
        "n": len(label),
        "num_positive": len(positive),
    }
    found = auroc_interval(positive, negative) if len(positive) and len(negative) else (None, None, None)
    entry |= dict(zip(("auroc", "auroc_low", "auroc_high"), map(_rounded, found), strict=True))
    for rate, hits in (("sensitivity", positive >= threshold), ("specificity", negative < threshold)):
        values: tuple[float | None, ...] = (None, None, None)
        if len(hits):
            values = (float(hits.mean()), *wilson_interval(int(hits.sum()), len(hits)))
        entry |= dict(zip((rate, f"{rate}_low", f"{rate}_high"), map(_rounded, values), strict=True))
    return entry


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
