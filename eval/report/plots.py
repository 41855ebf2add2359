"""The report's plots, as inline SVG that takes its ink from the page and so works on a light and on a dark one."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from equipoise.eval.category_report import CategoryReport, Rate

INK = "#010203"
"""A colour nobody else uses; replaced by the page's own text colour."""
GRID = "#010204"
STATE_COLOURS = ("#8c8c8c", "#3b82d9", "#e08214", "#2ca25f", "#b05cc6", "#c44e52")
"""First to last state; told apart by marker too, and readable on white and on near-black."""
MARKERS = "osD^vP"

_STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, read aloud, in the page's font
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def unsafe_rate_plot(reports: Mapping[str, CategoryReport], category_names: Mapping[str, str]) -> Markup:
    """Unsafe rate with its interval, per category and state; the overall rate on top."""
    categories = list(
        dict.fromkeys(category for report in reports.values() for category in report.categories)
    )
    labels = ["All categories", *(category_names.get(category, category) for category in categories)]
    rows = [
        [report.overall_unsafe_rate, *(report.unsafe_rate.get(category) for category in categories)]
        for report in reports.values()
    ]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 1.1 + 0.165 * len(labels) * (len(reports) + 0.4)), layout="constrained")
        axes = figure.subplots()
        _dodged_rates(axes, labels, list(reports), rows)
        axes.axhline(0.5, color=GRID, linewidth=1, alpha=0.4)
        axes.set_xlabel("unsafe answers to harmful prompts (95 % Wilson interval)")
        return _svg(
            figure, "unsafe", "Unsafe rate per category and model state; the figures are in the table below."
        )


def refusal_plot(reports: Mapping[str, CategoryReport]) -> Markup:
    """Compliance with harmful prompts and refusal of benign ones, over all categories."""
    labels = ["Complied with harmful prompts", "Refused benign look-alikes"]
    rows = [[report.overall_compliance_rate, report.over_refusal] for report in reports.values()]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 1.0 + 0.26 * len(labels) * (len(reports) + 0.4)), layout="constrained")
        axes = figure.subplots()
        _dodged_rates(axes, labels, list(reports), rows)
        axes.set_xlabel("share of prompts (95 % Wilson interval)")
        return _svg(
            figure,
            "refusal",
            "Compliance and over-refusal per model state; the figures are in the cards above.",
        )


def trade_off_plot(reports: Mapping[str, CategoryReport]) -> Markup:
    """Unsafe rate against over-refusal: down and to the left is better."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 4.3), layout="constrained")
        axes = figure.subplots()
        points = []
        for number, (state, report) in enumerate(reports.items()):
            x, y = report.over_refusal, report.overall_unsafe_rate
            if x.rate is None or y.rate is None:
                continue
            points.append((x.rate, y.rate))
            axes.errorbar(
                [x.rate],
                [y.rate],
                xerr=_error(x),
                yerr=_error(y),
                fmt=MARKERS[number % len(MARKERS)],
                color=STATE_COLOURS[number % len(STATE_COLOURS)],
                markersize=9,
                linewidth=1.5,
                label=state,
            )
        for (x0, y0), (x1, y1) in pairwise(points):
            axes.annotate(
                "",
                (x1, y1),
                (x0, y0),
                arrowprops={"arrowstyle": "->", "color": INK, "shrinkA": 8, "shrinkB": 8},
            )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("refused benign look-alikes")
        axes.set_ylabel("unsafe answers to harmful prompts")
        if points:
            axes.legend()
        return _svg(
            figure, "trade", "Unsafe rate against over-refusal per model state; lower left is better."
        )


def _dodged_rates(
    axes: Axes, labels: Sequence[str], states: Sequence[str], rows: Sequence[Sequence[Rate | None]]
) -> None:
    """One row a label, the states side by side in it; first label on top."""
    step = 0.7 / max(len(states), 1)
    for number, (state, rates) in enumerate(zip(states, rows, strict=True)):
        drawn = [
            (position + (number - (len(states) - 1) / 2) * step, rate.rate, rate)
            for position, rate in enumerate(rates)
            if rate is not None and rate.rate is not None
        ]
        axes.errorbar(
            [value for _, value, _ in drawn],
            [position for position, _, _ in drawn],
            xerr=[[_error(rate)[side][0] for _, _, rate in drawn] for side in (0, 1)],
            fmt=MARKERS[number % len(MARKERS)],
            color=STATE_COLOURS[number % len(STATE_COLOURS)],
            markersize=5.5,
            linewidth=2,
            label=state,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-0.01, 1.01)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if states:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(states))


def _error(rate: Rate) -> tuple[list[float], list[float]]:
    """Distances to the interval's ends as errorbar wants them; never negative for rounding."""
    assert rate.rate is not None
    return [max(rate.rate - rate.low, 0.0)], [max(rate.high - rate.rate, 0.0)]


def _svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an `<svg>` element with a description, ids of its own and the page's text colour."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(GRID, "currentColor")
    # Two plots on a page must not share ids; references are url(#id) and xlink:href="#id".
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = Markup('<svg role="img" aria-label="{}" ').format(description)
    return Markup(label + Markup(svg[len("<svg ") :]))
