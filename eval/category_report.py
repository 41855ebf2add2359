"""What an evaluation found: every sample, and the rates per category that follow from them.

A report holds samples; rates, intervals and means are derived from them each time they are read, so they can't
disagree with the samples. The JSON schema is in `eval/README.md`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.data.schema import Turn
from equipoise.data.taxonomy import OTHER
from equipoise.eval.comparison import compare
from equipoise.eval.judges.base import JudgeError, Verdict
from equipoise.eval.judges.calibration import JudgeCalibration
from equipoise.eval.rates import Rate, gap_of
from equipoise.eval.statistics import (
    Gap,
    IntervalMethod,
    Mean,
    mean_interval,
)
from equipoise.eval.statistics.rogan_gladen import JudgeErrors
from equipoise.eval.statistics.win_rate import WinRate
from equipoise.eval.suites import harmful
from equipoise.eval.suites.base import COMPLIANCE, HARMFUL, HELPFULNESS, LOOKALIKE
from equipoise.eval.suites.win_rate import Pairwise

SCHEMA_VERSION = 2

T = TypeVar("T")


class ReportError(EquipoiseError):
    """A report file that cannot be read as one."""


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One prompt of one suite, what the model answered and what became of it."""

    id: str
    suite: str
    category: str
    prompt: tuple[Turn, ...]
    response: str
    """The model's answer; in the helpfulness suite, the reference answer."""
    verdict: Verdict | None = None
    """None where no judge was asked (helpfulness)."""
    p_unsafe: float | None = None
    refused: bool | None = None
    score: float | None = None
    """Helpfulness: mean log-probability per token of the reference answer, nats."""
    prompt_id: str = ""
    """Several answers to one prompt share it, and are no independent samples; empty: `id`."""
    p_refusal: float | None = None
    categories: tuple[str, ...] = ()
    """Canonical ids of the hazards that the judge names, most fitting first; `category` is the prompt's own."""
    native_categories: tuple[str, ...] = ()
    """The same in the judge's own words."""
    severity: float | None = None
    """In [0, 1], 1 the worst, from the judge's own scale."""
    judge_raw: str = ""
    """The judge's own words, or why there is no verdict: those of the engine where the model gave no answer."""
    finish: str | None = None
    """How the model's answer ended: `stop`, `length`, `overlong` or `failed`; None where none was asked for."""
    num_tokens: int | None = None
    """Of the model's answer."""


@dataclass(frozen=True)
class CategoryReport:
    """One model state, evaluated on every suite."""

    state: str
    """`base`, `aligned` or `tsdi`, or whatever the run calls it."""
    model: str
    judge: dict[str, Any]
    """The judge's card as a dict."""
    settings: dict[str, Any]
    """The evaluation's settings as a dict."""
    samples: tuple[SampleResult, ...]
    controversial_is_unsafe: bool = True
    num_left_out: dict[str, int] = field(default_factory=dict)
    """Per suite: prompts not asked because of `max_prompts_per_category`."""
    seconds: float = 0.0
    calibration: JudgeCalibration | None = None
    """Of the judge, where it was held against labelled answers: rates are then also given corrected."""
    pairwise: Pairwise | None = None
    """The comparison with another model's answers, where one was made."""
    suites: tuple[dict[str, Any], ...] = ()
    """Where the prompts come from: of each suite its `suite`, `source`, `licence`, `revision`, `faults` ..."""
    engine: dict[str, Any] = field(default_factory=dict)
    """All that determines the answers besides the prompts: engine, weights, dtype, sampling, seed, TSDI."""
    capability: tuple[dict[str, Any], ...] = ()
    """lm-eval's scores: one a task, metric and filter (`suites/capability.py`)."""

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        for sample in self.samples:
            if (sample.suite, sample.id) in seen:
                raise ReportError(
                    f"sample id {sample.id!r} occurs twice in suite {sample.suite!r}; ids must be unique within a "
                    "suite, or runs can't be compared prompt by prompt"
                )
            seen.add((sample.suite, sample.id))
        if self.calibration is None:
            return
        if self.calibration.judge != self.judge.get("name"):
            raise ReportError(
                f"the calibration is of the judge {self.calibration.judge!r}, the report's judge is "
                f"{self.judge.get('name')!r}; calibrate that one"
            )
        if self.calibration.controversial_is_unsafe != self.controversial_is_unsafe:
            raise ReportError(
                f"the calibration counts controversial answers as unsafe: {self.calibration.controversial_is_unsafe}, "
                f"the report: {self.controversial_is_unsafe}; calibrate the judge under the report's setting"
            )

    # Outcomes by sample id: what rates and paired comparisons are made of.

    def of_suite(self, suite: str) -> list[SampleResult]:
        """The samples of one suite, in the order in which they were asked."""
        return [sample for sample in self.samples if sample.suite == suite]

    def unsafe_outcomes(self, category: str | None = None) -> dict[str, bool | None]:
        """Harmful suite: sample id -> answered unsafely (None: no finding), of one category or all."""
        return {
            sample.id: harmful.unsafe(sample.verdict, self.controversial_is_unsafe)
            for sample in self.of_suite(HARMFUL)
            if category in (None, sample.category)
        }

    def compliance_outcomes(self, category: str | None = None) -> dict[str, bool | None]:
        """Harmful suite: sample id -> answered without refusing."""
        return {
            sample.id: harmful.complied(sample.refused)
            for sample in self.of_suite(HARMFUL)
            if category in (None, sample.category)
        }

    def over_refusal_outcomes(self, category: str | None = None) -> dict[str, bool | None]:
        """Look-alike suite: sample id -> refused."""
        return {
            sample.id: sample.refused
            for sample in self.of_suite(LOOKALIKE)
            if category in (None, sample.category)
        }

    def prompt_ids(self, suite: str) -> dict[str, str]:
        """Sample id -> what tells its prompt from others: the same for several answers to one prompt."""
        return {sample.id: sample.prompt_id or sample.id for sample in self.of_suite(suite)}

    def helpfulness_scores(self) -> dict[str, float | None]:
        """Helpfulness suite: sample id -> mean log-probability per token (None: unscored)."""
        return {sample.id: sample.score for sample in self.of_suite(HELPFULNESS)}

    # Figures.

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The categories of the harmful suite, in natural order (S2 before S10)."""
        return _in_order(sample.category for sample in self.of_suite(HARMFUL))

    @cached_property
    def lookalike_categories(self) -> tuple[str, ...]:
        """The categories of the look-alike suite, in natural order."""
        return _in_order(sample.category for sample in self.of_suite(LOOKALIKE))

    def unsafe_rate_of(
        self,
        category: str | None,
        confidence: float = 0.95,
        method: IntervalMethod = IntervalMethod.WILSON,
    ) -> Rate:
        """Unsafe answers to the harmful prompts of one category, or of all; corrected where the judge is calibrated."""
        errors = self.calibration.errors(category) if self.calibration is not None else None
        return self._rate(HARMFUL, self.unsafe_outcomes(category), confidence, method, errors)

    def over_refusal_of(
        self,
        category: str | None = None,
        confidence: float = 0.95,
        method: IntervalMethod = IntervalMethod.WILSON,
    ) -> Rate:
        """Benign look-alikes of one category, or of all, that were refused."""
        return self._rate(LOOKALIKE, self.over_refusal_outcomes(category), confidence, method)

    def _rate(
        self,
        suite: str,
        outcomes: Mapping[str, bool | None],
        confidence: float = 0.95,
        method: IntervalMethod = IntervalMethod.WILSON,
        errors: JudgeErrors | None = None,
    ) -> Rate:
        verdicts = {sample.id: sample.verdict for sample in self.of_suite(suite)}
        prompts = self.prompt_ids(suite)
        return Rate.of(
            outcomes.values(),
            confidence,
            [verdicts[id] for id in outcomes],
            [prompts[id] for id in outcomes],
            method,
            errors,
        )

    @cached_property
    def unsafe_rate(self) -> dict[str, Rate]:
        """Per category: unsafe answers to harmful prompts."""
        return {category: self.unsafe_rate_of(category) for category in self.categories}

    @cached_property
    def overall_unsafe_rate(self) -> Rate:
        """Unsafe answers to harmful prompts, every prompt counting once."""
        return self.unsafe_rate_of(None)

    @cached_property
    def gap(self) -> Gap:
        """Unsafe rate of the worst category minus that of the best one; `worst` and `best` index `categories`."""
        return gap_of([self.unsafe_rate[category] for category in self.categories])

    @cached_property
    def compliance_rate(self) -> dict[str, Rate]:
        """Per category: harmful prompts answered without refusing."""
        return {
            category: self._rate(HARMFUL, self.compliance_outcomes(category)) for category in self.categories
        }

    @cached_property
    def overall_compliance_rate(self) -> Rate:
        """Harmful prompts answered without refusing, every prompt counting once."""
        return self._rate(HARMFUL, self.compliance_outcomes())

    @cached_property
    def over_refusal_rate(self) -> dict[str, Rate]:
        """Per category: benign look-alikes refused."""
        return {category: self.over_refusal_of(category) for category in self.lookalike_categories}

    @cached_property
    def over_refusal(self) -> Rate:
        """Benign look-alikes refused, every prompt counting once."""
        return self.over_refusal_of(None)

    @cached_property
    def helpful_compliance(self) -> Rate:
        """Ordinary prompts that were answered without refusing."""
        outcomes = {sample.id: harmful.complied(sample.refused) for sample in self.of_suite(COMPLIANCE)}
        return self._rate(COMPLIANCE, outcomes)

    @cached_property
    def helpfulness(self) -> Mean:
        """Mean over exchanges of the log-probability per token of the reference answer, nats."""
        prompts = self.prompt_ids(HELPFULNESS)
        known = {id: score for id, score in self.helpfulness_scores().items() if score is not None}
        return mean_interval(list(known.values()), prompts=[prompts[id] for id in known])

    @cached_property
    def win_rate(self) -> WinRate | None:
        """How often the model's answers are preferred to the opponent's; None where nobody compared them."""
        return self.pairwise.win_rate() if self.pairwise is not None else None

    @property
    def num_unscored(self) -> int:
        """Reference answers that got no score: they didn't fit, or their likelihood wasn't finite."""
        return list(self.helpfulness_scores().values()).count(None)

    def summary(self, baseline: "CategoryReport | None" = None) -> dict[str, Any]:
        """The figures without the samples, for `summary.json`; with a baseline, the paired changes too."""
        figures: dict[str, Any] = {
            "state": self.state,
            "model": self.model,
            "judge": self.judge.get("name"),
            "judge_is_stand_in": self.judge.get("stand_in"),
            "unsafe_rate": {
                "overall": asdict(self.overall_unsafe_rate),
                "categories": {category: asdict(rate) for category, rate in self.unsafe_rate.items()},
            },
            "gap": asdict(self.gap)
            | {
                "worst": None if self.gap.worst is None else self.categories[self.gap.worst],
                "best": None if self.gap.best is None else self.categories[self.gap.best],
            },
            "compliance_rate": {
                "overall": asdict(self.overall_compliance_rate),
                "categories": {category: asdict(rate) for category, rate in self.compliance_rate.items()},
            },
            "over_refusal": {
                "overall": asdict(self.over_refusal),
                "categories": {category: asdict(rate) for category, rate in self.over_refusal_rate.items()},
            },
            "helpful_compliance": asdict(self.helpful_compliance),
            "helpfulness": {
                "mean": self.helpfulness.mean,
                "n": self.helpfulness.n,
                "low": self.helpfulness.low,
                "high": self.helpfulness.high,
                "num_unscored": self.num_unscored,
            },
            "win_rate": None if self.win_rate is None else asdict(self.win_rate),
            "num_left_out": self.num_left_out,
            "seconds": self.seconds,
        }
        if baseline is not None:
            changes = compare(self, baseline)
            figures["baseline"] = baseline.state
            figures["unsafe_rate"]["change"] = {
                "overall": asdict(changes.unsafe_overall),
                "categories": {
                    category: asdict(change)
                    | {
                        "p_adjusted": changes.unsafe_p_adjusted[category],
                        "q_value": changes.unsafe_q_values[category],
                    }
                    for category, change in changes.unsafe.items()
                },
            }
            figures["compliance_rate"]["change"] = asdict(changes.compliance)
            figures["over_refusal"]["change"] = asdict(changes.over_refusal)
            figures["helpfulness"]["change"] = asdict(changes.helpfulness)
        return figures

    def to_json(self, path: Path | str) -> None:
        """Write the report with every sample; aside first, then renamed over `path`."""
        path = Path(path)
        document = {"schema_version": SCHEMA_VERSION} | asdict(self)
        document["calibration"] = None if self.calibration is None else self.calibration.to_dict()
        # Derived, for readers of the file; `from_json` computes it anew.
        document["summary"] = self.summary()
        write_aside(path, json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1))

    @classmethod
    def from_json(cls, path: Path | str) -> "CategoryReport":
        """Read a report; raises ReportError naming the file and what is wrong with it."""
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ReportError(f"{path}: not a readable report: {error}") from error
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise ReportError(
                f"{path}: schema_version is {version!r}, expected {SCHEMA_VERSION}; evaluate the model again"
            )
        try:
            values = {item.name: document[item.name] for item in fields(cls)}
            values["samples"] = tuple(_sample(sample) for sample in values["samples"])
            values["calibration"] = _built(values["calibration"], JudgeCalibration.from_dict)
            values["pairwise"] = _built(values["pairwise"], Pairwise.from_dict)
            values["suites"] = tuple(values["suites"])
            values["capability"] = tuple(values["capability"])
            return cls(**values)
        except (ReportError, JudgeError) as error:
            raise ReportError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(
                f"{path}: not a category report: {type(error).__name__} {error}; expected the fields that "
                "eval/README.md lists"
            ) from error


def _sample(document: dict[str, Any]) -> SampleResult:
    verdict = document["verdict"]
    return SampleResult(
        **document
        | {
            "prompt": tuple(document["prompt"]),
            "verdict": None if verdict is None else Verdict(verdict),
            "categories": tuple(document["categories"]),
            "native_categories": tuple(document["native_categories"]),
        }
    )


def _built(document: dict[str, Any] | None, build: Callable[[dict[str, Any]], T]) -> T | None:
    return None if document is None else build(document)


def _in_order(categories: Iterable[str]) -> tuple[str, ...]:
    """Unique categories, S2 before S10, OTHER last."""

    def key(category: str) -> tuple[bool, str, int, str]:
        stem = category.rstrip("0123456789")
        digits = category[len(stem) :]
        return category == OTHER, stem, int(digits) if digits else -1, category

    return tuple(sorted(set(categories), key=key))
