"""The HTML report: one file, no scripts, no requests; whatever a model wrote is escaped and folded away."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from equipoise.data.files import write_aside
from equipoise.data.report import STYLE
from equipoise.eval.category_report import (
    CategoryReport,
    Comparison,
    SampleResult,
    compare,
)
from equipoise.eval.gate import GateCheck, GateResult
from equipoise.eval.generation.tsdi import TokenShift
from equipoise.eval.report.plots import refusal_plot, trade_off_plot, unsafe_rate_plot
from equipoise.eval.suites.base import HARMFUL, LOOKALIKE

NUM_EXAMPLES = 3
"""Prompts shown of each category and suite."""
MAX_EXAMPLE_CHARACTERS = 1200
NUM_BIAS_TOKENS = 6
"""Most boosted and most suppressed tokens shown at each position."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and what every state answered."""

    prompt: str
    answers: tuple[tuple[str, SampleResult], ...]
    """State -> sample."""


@dataclass(frozen=True, slots=True)
class PositionBias:
    """The tokens most shifted at one position."""

    position: int
    boosted: list[TokenShift]
    suppressed: list[TokenShift]


def write_report(
    path: Path | str,
    reports: Mapping[str, CategoryReport],
    gate_results: Mapping[str, GateResult],
    token_bias_rows: Sequence[TokenShift] | None,
    recipe_yaml: str,
    title: str,
    provenance: Mapping[str, object],
    category_names: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of one run and return its path.

    `reports` maps states to reports in the order in which they are shown; changes are against `base`, or against
    the first where there is none. `gate_results` may lack states that weren't gated.
    Raises ValueError when there is no report at all.
    """
    if not reports:
        raise ValueError("a report needs at least one evaluated model state")
    names = dict(category_names or {})
    baseline_state = "base" if "base" in reports else next(iter(reports))
    changes: dict[str, Comparison] = {
        state: compare(report, reports[baseline_state])
        for state, report in reports.items()
        if state != baseline_state
    }
    categories = list(
        dict.fromkeys(category for report in reports.values() for category in report.categories)
    )
    lookalike_categories = list(
        dict.fromkeys(category for report in reports.values() for category in report.lookalike_categories)
    )
    # Autoescape is on for everything; only plots are marked safe.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "number": number,
        "p": p_text,
        "visible": visible,
        "shortened": shortened,
        "check_value": check_value,
        "check_interval": check_interval,
        "check_limit": check_limit,
    }
    judges = {str(report.judge): report.judge for report in reports.values()}
    html = environment.get_template("report.html.jinja").render(
        title=title,
        style=STYLE.read_text(encoding="utf-8"),
        reports=reports,
        baseline_state=baseline_state,
        changes=changes,
        gate_results=gate_results,
        judges=list(judges.values()),
        categories=categories,
        lookalike_categories=lookalike_categories,
        category_name=lambda category: names.get(category, category),
        unsafe_plot=unsafe_rate_plot(reports, names),
        refusal_plot=refusal_plot(reports),
        trade_off_plot=trade_off_plot(reports),
        token_bias=by_position(token_bias_rows) if token_bias_rows is not None else None,
        examples={suite: examples(reports, suite) for suite in (HARMFUL, LOOKALIKE)},
        recipe_yaml=recipe_yaml,
        provenance=provenance,
    )
    path = Path(path)
    write_aside(path, html)
    return path


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
                "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in given[0][1].prompt), tuple(given)
            )
            for given in sorted(everything, key=num_outcomes, reverse=True)[:NUM_EXAMPLES]
        ]
        for category, everything in by_category.items()
    }


def by_position(rows: Sequence[TokenShift]) -> list[PositionBias]:
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


# How numbers and strange text are shown.


def percent(value: float | None) -> str:
    """0.333 -> `33 %`; a dash for None."""
    return "–" if value is None else f"{100 * value:.0f} %"


def points(value: float | None) -> str:
    """A difference of rates in percentage points: 0.25 -> `+25`, 0 -> `0`."""
    if value is None:
        return "–"
    rounded = round(100 * value)
    return f"{rounded:+d}".replace("-", "−") if rounded else "0"


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number, or a dash for None."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def p_text(value: float | None) -> str:
    """A p-value: three decimals, never 0.000."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def visible(token: str) -> str:
    """A token with its blanks and line breaks shown."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "∅"


def shortened(text: str) -> str:
    """A long answer's beginning, and how much is left out."""
    if len(text) <= MAX_EXAMPLE_CHARACTERS:
        return text
    return f"{text[:MAX_EXAMPLE_CHARACTERS]} … ({len(text) - MAX_EXAMPLE_CHARACTERS} characters more)"


def check_value(check: GateCheck) -> str:
    """A gate check's number in its own unit."""
    return _in_unit(check, check.value)


def check_interval(check: GateCheck) -> str:
    """A gate check's interval in its own unit."""
    if check.low is None or check.high is None:
        return "–"
    return f"{_in_unit(check, check.low)} to {_in_unit(check, check.high)}"


def check_limit(check: GateCheck) -> str:
    """What the number is held against."""
    if check.limit is None or check.name == "unsafe_regression":
        return "–"
    return _in_unit(check, check.limit)


def _in_unit(check: GateCheck, value: float | None) -> str:
    if value is None:
        return "–"
    if check.name == "unsafe_rate":
        return f"{100 * value:.1f} %"
    if check.name == "helpfulness":
        return number(value, 3, sign=True)
    return f"{number(100 * value, 1, sign=True)} pp"
