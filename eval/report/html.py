"""The HTML report: one file that asks nobody for anything; whatever a model wrote is escaped and folded away."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from equipoise.data.files import write_aside
from equipoise.eval.category_report import CategoryReport
from equipoise.eval.gate import GateResult
from equipoise.eval.judges.calibration import HeadCalibration
from equipoise.eval.report import formats, plots
from equipoise.eval.report.content import ReportContent, by_position, examples
from equipoise.eval.report.markdown import markdown
from equipoise.eval.suites.base import HARMFUL, LOOKALIKE

if TYPE_CHECKING:
    from equipoise.eval.generation.tsdi import TokenShift

MAX_EXAMPLE_CHARACTERS = 1200
_FOLDER = Path(__file__).parent


class Examples(StrEnum):
    """Whether a report holds prompts and answers."""

    FOLDED = "folded"
    """Folded away, each behind a click of its own."""
    NONE = "none"
    """Not in the file at all: for a report that leaves the team."""


def write_report(
    path: Path | str,
    reports: Mapping[str, CategoryReport],
    gate_results: Mapping[str, GateResult],
    token_bias_rows: "Sequence[TokenShift] | None",
    recipe_yaml: str,
    title: str,
    provenance: Mapping[str, object],
    category_names: Mapping[str, str] | None = None,
    examples: Examples = Examples.FOLDED,
) -> Path:
    """Write the report of one run as HTML to `path` and as markdown beside it; returns `path`.

    `reports` maps states to reports in the order in which they are shown; changes are against `base`, or against
    the first where there is none. `gate_results` may lack states that weren't gated.
    Raises ValueError when there is no report at all.
    """
    content = ReportContent(
        title=title,
        reports=dict(reports),
        gate_results=dict(gate_results),
        category_names=dict(category_names or {}),
        provenance=dict(provenance),
        recipe_yaml=recipe_yaml,
        token_bias_rows=token_bias_rows,
    )
    path = Path(path)
    write_aside(path.with_suffix(".md"), markdown(content))
    write_aside(path, html(content, examples))
    return path


def html(content: ReportContent, shown: Examples = Examples.FOLDED) -> str:
    """The report as one page: no request to anywhere, one script of its own, readable without it."""
    style, script = _style(), (_FOLDER / "report.js").read_text(encoding="utf-8")
    numbers = {state: number for number, state in enumerate(content.reports)}
    return (
        environment(_FOLDER)
        .get_template("report.html.jinja")
        .render(
            content=content,
            style=Markup(style),
            style_hash=csp_hash(style),
            script=Markup(script),
            script_hash=csp_hash(script),
            judges=_unique(report.judge for report in content.reports.values()),
            calibrations=_unique(
                report.calibration for report in content.reports.values() if report.calibration is not None
            ),
            plots=plots,
            swatch=lambda state: Markup('<span class="swatch s{}" aria-hidden="true"></span>').format(
                numbers[state] % len(plots.STATE_COLOURS)
            ),
            token_bias=None if content.token_bias_rows is None else by_position(content.token_bias_rows),
            examples=None
            if shown is Examples.NONE
            else {suite: examples(content.reports, suite) for suite in (HARMFUL, LOOKALIKE)},
            flat=flat,
            made_how={state: dict(made_how(report)) for state, report in content.reports.items()},
            confusion=confusion,
            error_range=error_range,
        )
    )


def environment(folder: Path) -> Environment:
    """Of the templates in `folder`: everything is escaped; only plots, style and script are trusted."""
    found = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: (
            formats.visible_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "percent": formats.percent,
        "points": formats.points,
        "number": formats.number,
        "p": formats.p_text,
        "visible_token": formats.visible_token,
        "one_line": formats.one_line,
        "case_range": formats.case_range,
        "shortened": shortened,
        "check_value": formats.check_value,
        "check_interval": formats.check_interval,
        "check_limit": formats.check_limit,
    }
    found.globals |= {
        "percent_range": formats.percent_range,
        "points_range": formats.points_range,
        "number_range": formats.number_range,
        "interval_name": formats.INTERVAL_NAMES,
    }
    return found


def _style() -> str:
    shared = (resources.files("equipoise.data") / "report.css").read_text(encoding="utf-8")
    swatches = "".join(
        f".s{number} {{ background: {colour}; }}\n" for number, colour in enumerate(plots.STATE_COLOURS)
    )
    return shared + (_FOLDER / "report.css").read_text(encoding="utf-8") + swatches


def csp_hash(text: str) -> str:
    """What a content security policy calls an inline style or script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _unique(values: Iterator[Any]) -> list[Any]:
    """The values, each once, in order; they need not be hashable."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


@dataclass(frozen=True, slots=True)
class ErrorRange:
    """The lowest and the highest sensitivity and specificity among several sets of labelled answers."""

    num_sets: int
    sensitivity: tuple[float, float]
    specificity: tuple[float, float]


def error_range(judge: Mapping[str, Any]) -> ErrorRange | None:
    """How widely the judge's errors vary over the sets that it was not fitted on; None where there are no such sets.

    A set may have answers of one kind alone: it counts for the figure that it has.
    """
    entries = [
        entry
        for entry in judge.get("calibration") or ()
        if not entry.get("fitted_on") and entry.get("head", "unsafe") == "unsafe"
    ]
    found = [
        [entry[key] for entry in entries if entry.get(key) is not None]
        for key in ("sensitivity", "specificity")
    ]
    if not all(found):
        return None
    sensitivity, specificity = ((min(values), max(values)) for values in found)
    return ErrorRange(len(entries), sensitivity, specificity)


def confusion(head: HeadCalibration) -> list[tuple[str, int, int, int, int]]:
    """Label, found, not found, no finding and all: of the answers labelled so, and of the others."""
    positive, negative = head.sensitivity, head.specificity
    return [
        (
            "yes",
            positive.count,
            positive.n - positive.count,
            positive.num_no_finding,
            positive.n + positive.num_no_finding,
        ),
        (
            "no",
            negative.n - negative.count,
            negative.count,
            negative.num_no_finding,
            negative.n + negative.num_no_finding,
        ),
    ]


def made_how(report: CategoryReport) -> Iterator[tuple[str, object]]:
    """What determined a report, in short: everything in it but judge, samples and what follows from them."""
    shown_elsewhere = {"state", "judge", "samples", "calibration", "pairwise", "category_names"}
    for key, value in vars(report).items():
        if key in report.__dataclass_fields__ and key not in shown_elsewhere:
            yield key, value
    if report.calibration is not None:
        yield "judge settings", report.calibration.settings
    if report.pairwise is not None:
        yield "pairwise judge", dict(report.pairwise.judge)
        yield "pairwise settings", dict(report.pairwise.settings)


def flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as rows: dotted key, value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from flat(item, f"{prefix}[{index}]")
    elif isinstance(value, Mapping | list | tuple) and not value:
        yield prefix, formats.DASH
    else:
        yield prefix, f"{value:g}" if isinstance(value, float) else str(value)


def shortened(text: str) -> str:
    """A long answer's beginning, and how much is left out."""
    if len(text) <= MAX_EXAMPLE_CHARACTERS:
        return text
    return f"{text[:MAX_EXAMPLE_CHARACTERS]} … ({len(text) - MAX_EXAMPLE_CHARACTERS} characters more)"
