"""What a report says, before it becomes HTML or markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.comparison import Comparison, compare
from equipoise.eval.gate import GateResult
from equipoise.eval.gate_checks import GateVerdict
from equipoise.eval.gate_paired import obstacle
from equipoise.eval.rates import Rate
from equipoise.eval.statistics.worst import Worst, worst_rate
from equipoise.eval.suites.base import HARMFUL

if TYPE_CHECKING:  # it would load torch, and a report is read and written without
    from equipoise.eval.generation.tsdi import TokenShift

NUM_EXAMPLES = 3
"""Prompts shown of each category and suite."""
NUM_BIAS_TOKENS = 6
"""Most boosted and most suppressed tokens shown at each position."""


@dataclass(frozen=True)
class ReportContent:
    """Everything that a report is made of."""

    title: str
    reports: Mapping[str, CategoryReport]
    """State -> report, in the order in which they are shown; the last is the candidate."""
    gate_results: Mapping[str, GateResult] = field(default_factory=dict)
    """State -> verdict; states that weren't gated are absent."""
    category_names: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    recipe_yaml: str = ""
    token_bias_rows: "Sequence[TokenShift] | None" = None

    def __post_init__(self) -> None:
        if not self.reports:
            raise ValueError("a report needs at least one evaluated model state")

    @property
    def baseline_state(self) -> str:
        """What changes are against: `base`, or the first state where there is none."""
        return "base" if "base" in self.reports else next(iter(self.reports))

    @property
    def baseline(self) -> CategoryReport:
        """The baseline's report."""
        return self.reports[self.baseline_state]

    @cached_property
    def changes(self) -> dict[str, Comparison]:
        """State -> paired changes against the baseline, for every other state."""
        return {
            state: compare(report, self.baseline)
            for state, report in self.reports.items()
            if state != self.baseline_state
        }

    @cached_property
    def categories(self) -> list[str]:
        """Categories of harmful prompts, in the order of the first report that has them."""
        return list(dict.fromkeys(c for report in self.reports.values() for c in report.categories))

    @cached_property
    def lookalike_categories(self) -> list[str]:
        """Categories of look-alikes, likewise."""
        return list(dict.fromkeys(c for report in self.reports.values() for c in report.lookalike_categories))

    @property
    def with_ordinary(self) -> bool:
        """Whether some state was asked ordinary prompts and judged on whether it answers them."""
        rates = [report.helpful_compliance for report in self.reports.values()]
        return any(rate.n + rate.num_no_finding for rate in rates)

    @cached_property
    def worst(self) -> dict[str, tuple[str | None, Worst]]:
        """State -> the category that measured worst, and the interval of the highest true rate."""
        return {state: worst_category(report) for state, report in self.reports.items()}

    @cached_property
    def no_finding(self) -> dict[str, dict[str, Rate]]:
        """State -> category -> rate, where the judge gave no finding on some answer to a harmful prompt."""
        found = {
            state: {c: rate for c, rate in report.unsafe_rate.items() if rate.num_no_finding}
            for state, report in self.reports.items()
        }
        return {state: rates for state, rates in found.items() if rates}

    @cached_property
    def obstacles(self) -> list[str]:
        """Why states can't be compared prompt by prompt with the baseline; empty where all can."""
        found = []
        for state, report in self.reports.items():
            reason = obstacle(report, self.baseline)
            if reason is not None:
                found.append(f"{state} and {self.baseline_state}: {reason}")
        return found

    def category_name(self, category: str | None) -> str:
        """How a category is called; None: all of them."""
        return "all categories" if category is None else self.category_names.get(category, category)

    def decisive_checks(self, state: str) -> list[tuple[str, str]]:
        """What kept the state from a PASS, the failures first: verdict and reason; like reasons in one line."""
        like: dict[tuple[str, str, str], list[str]] = {}
        for verdict in (GateVerdict.FAIL, GateVerdict.INCONCLUSIVE):
            for check in self.gate_results[state].checks:
                if check.verdict is verdict:
                    key = (verdict.value, check.name.replace("_", " "), check.message)
                    like.setdefault(key, []).append(self.category_name(check.category))
        return [
            (verdict, f"{name}, {_listed(categories)}: {message}")
            for (verdict, name, message), categories in like.items()
        ]


def _listed(names: Sequence[str]) -> str:
    """Up to three names, and how many more."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more"


def worst_category(report: CategoryReport) -> tuple[str | None, Worst]:
    """The category that measured the highest unsafe rate, and the interval of the highest true rate."""
    rates = list(report.unsafe_rate.values())
    weights = [rate.n_effective / rate.n if rate.n else 1.0 for rate in rates]
    worst = worst_rate(
        [rate.count * weight for rate, weight in zip(rates, weights, strict=True)],
        [rate.n * weight for rate, weight in zip(rates, weights, strict=True)],
        [rate.num_no_finding * weight for rate, weight in zip(rates, weights, strict=True)],
    )
    return (None if worst.index is None else report.categories[worst.index]), worst


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and what every state answered."""

    id: str
    prompt: str
    answers: tuple[tuple[str, SampleResult], ...]
    """State -> sample."""


def examples(reports: Mapping[str, CategoryReport], suite: str) -> dict[str, list[Example]]:
    """Per category, the prompts on which the states differ most visibly, then the first ones."""
    answers: dict[str, list[tuple[str, SampleResult]]] = {}
    for state, report in reports.items():
        for sample in report.of_suite(suite):
            answers.setdefault(sample.id, []).append((state, sample))
    by_category: dict[str, list[list[tuple[str, SampleResult]]]] = {}
    for given in answers.values():
        by_category.setdefault(given[0][1].category, []).append(given)

    def num_outcomes(given: list[tuple[str, SampleResult]]) -> int:
        return len({sample.verdict if suite == HARMFUL else sample.refused for _, sample in given})

    return {
        category: [
            Example(
                given[0][1].id,
                "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in given[0][1].prompt),
                tuple(given),
            )
            for given in sorted(everything, key=num_outcomes, reverse=True)[:NUM_EXAMPLES]
        ]
        for category, everything in by_category.items()
    }


@dataclass(frozen=True, slots=True)
class PositionBias:
    """The tokens most shifted at one position."""

    position: int
    boosted: "list[TokenShift]"
    suppressed: "list[TokenShift]"


def by_position(rows: "Sequence[TokenShift]") -> list[PositionBias]:
    """The tokens with the largest share of the shift at each position, upward and downward."""
    positions: dict[int, list[TokenShift]] = {}
    for row in rows:
        positions.setdefault(row.position, []).append(row)
    return [
        PositionBias(
            position,
            sorted((row for row in here if row.share > 0), key=lambda row: -row.share)[:NUM_BIAS_TOKENS],
            sorted((row for row in here if row.share < 0), key=lambda row: row.share)[:NUM_BIAS_TOKENS],
        )
        for position, here in sorted(positions.items())
    ]
