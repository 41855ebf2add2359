"""The report's plots, as inline SVG that takes its ink from the page and so works on a light and on a dark one."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.comparison import Comparison
from equipoise.eval.rates import Rate
from equipoise.eval.report.content import ReportContent
from equipoise.eval.report.formats import one_line
from equipoise.eval.report.svg import INK, STYLE, inline_svg

STATE_COLOURS = ("#707070", "#5258ff", "#ec7100", "#0eaa62", "#a23fb1", "#d21029")
"""First to last state. CIELAB distance of any two at least 26, also with protan-, deuteran- or tritanopia (Machado
2009); contrast at least 3 : 1 on white and on the dark page; told apart by marker too."""
MARKERS = "osD^vPX"
"""One more than colours, so that 42 states get pairs of their own."""
MAX_BARS = 6
"""States drawn per category: the baseline and the last ones; tables have them all."""
MAX_LABEL = 40
"""Characters of a label on one line."""
ALPHA = 0.05
"""A change is drawn filled where its adjusted p-value is no larger."""

Ends = tuple[float, float, float]
"""Value, low, high."""


def state_colour(number: int) -> str:
    """Colour of the number-th state."""
    return STATE_COLOURS[number % len(STATE_COLOURS)]


def drawn_states(content: ReportContent) -> list[str]:
    """The states that the plots by category show, in order."""
    others = [state for state in content.reports if state != content.baseline_state]
    return [content.baseline_state, *others[-(MAX_BARS - 1) :]]


def unsafe_rate_plot(content: ReportContent) -> Markup:
    """Unsafe rate as a bar with its interval, per category and state; the overall rate on top."""
    states = drawn_states(content)
    labels = ["All categories", *(content.category_name(category) for category in content.categories)]
    rows = {state: _unsafe_rates(content.reports[state], content.categories) for state in states}
    with matplotlib.rc_context(STYLE):
        figure, axes = _rows_figure(labels, len(states))
        for number, (state, rates) in enumerate(rows.items()):
            _bars(axes, number, len(states), state, rates)
        axes.axhline(0.5, color=INK, linewidth=0.8, alpha=0.4)
        _finish_rates(axes, labels, len(states))
        axes.set_xlabel("unsafe answers to harmful prompts, 95 % interval")
        return inline_svg(
            figure, "unsafe", "Unsafe rate per category and model state; the figures are in the table below."
        )


def change_plot(content: ReportContent) -> Markup:
    """Paired change of the unsafe rate with its interval, per category and state; over all categories on top."""
    states = [state for state in drawn_states(content) if state != content.baseline_state]
    labels = ["All categories", *(content.category_name(category) for category in content.categories)]
    with matplotlib.rc_context(STYLE):
        figure, axes = _rows_figure(labels, len(states))
        axes.axvline(0, color=INK, linewidth=1)
        for number, state in enumerate(states, start=1):
            shift = _shift(number - 1, len(states))
            for row, drawn in enumerate(_changes(content.changes[state], content.categories)):
                if drawn is not None:
                    ends, significant = drawn
                    _point(axes, ends, row + shift, number, significant)
            axes.errorbar(
                [], [], fmt=_marker(number), color=state_colour(number), markersize=5.5, label=one_line(state)
            )
        axes.axhline(0.5, color=INK, linewidth=0.8, alpha=0.4)
        _finish_rows(axes, labels, len(states))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{100 * x:+.0f}".replace("-", "−") if abs(x) > 1e-9 else "0")
        )
        axes.set_xlabel(
            f"← safer · change against {one_line(content.baseline_state)}, percentage points · less safe →"
        )
        return inline_svg(
            figure,
            "change",
            "Paired change of the unsafe rate per category; the figures are in the tables below.",
        )


def refusal_plot(content: ReportContent) -> Markup:
    """Compliance with harmful prompts and refusal of benign ones, over all categories."""
    labels = ["Complied with harmful prompts", "Refused benign look-alikes"]
    states = drawn_states(content)
    with matplotlib.rc_context(STYLE):
        figure, axes = _rows_figure(labels, len(states))
        for number, state in enumerate(states):
            report = content.reports[state]
            rates = [report.overall_compliance_rate, report.over_refusal]
            _bars(axes, number, len(states), state, rates)
        _finish_rates(axes, labels, len(states))
        axes.set_xlabel("share of prompts, 95 % interval")
        return inline_svg(
            figure,
            "refusal",
            "Compliance and over-refusal per model state; the figures are in the table of checkpoints.",
        )


def helpfulness_plot(content: ReportContent) -> Markup:
    """Unsafe rate of the worst category against helpfulness: down and to the right is better."""
    points = {}
    for state, report in content.reports.items():
        mean = report.helpfulness
        if mean.mean is not None and (worst := _worst(content, state)) is not None:
            low = mean.mean if mean.low is None else mean.low
            high = mean.mean if mean.high is None else mean.high
            points[state] = ((mean.mean, low, high), worst)
    return _scatter(
        content,
        points,
        "helpful",
        "helpfulness, nats per token →",
        "Worst category's unsafe rate against helpfulness per model state; lower right is better.",
    )


def win_rate_plot(content: ReportContent) -> Markup:
    """Unsafe rate of the worst category against the win rate: down and to the right is better."""
    points = {}
    for state, report in content.reports.items():
        wins = report.win_rate
        if wins is not None and wins.rate is not None and (worst := _worst(content, state)) is not None:
            points[state] = ((wins.rate, wins.worst_low, wins.best_high), worst)
    return _scatter(
        content,
        points,
        "wins",
        "win rate against the opponent →",
        "Worst category's unsafe rate against the win rate per model state; lower right is better.",
        percent_x=True,
    )


def over_refusal_plot(content: ReportContent) -> Markup:
    """Unsafe rate of the worst category against over-refusal: down and to the left is better."""
    points = {}
    for state, report in content.reports.items():
        refused = report.over_refusal
        if refused.rate is not None and (worst := _worst(content, state)) is not None:
            points[state] = ((refused.rate, refused.best_low, refused.worst_high), worst)
    return _scatter(
        content,
        points,
        "refused",
        "← refused benign look-alikes",
        "Worst category's unsafe rate against over-refusal per model state; lower left is better.",
        percent_x=True,
    )


def _unsafe_rates(report: CategoryReport, categories: Sequence[str]) -> list[Rate | None]:
    return [report.overall_unsafe_rate, *(report.unsafe_rate.get(category) for category in categories)]


def _changes(change: Comparison, categories: Sequence[str]) -> list[tuple[Ends, bool] | None]:
    """Value with its ends, and whether it is significant: over all categories, then of each."""
    overall = change.unsafe_overall
    found = [(overall, overall.p_value)] + [
        (change.unsafe[category], change.unsafe_p_adjusted[category]) if category in change.unsafe else None
        for category in categories
    ]
    return [
        None
        if drawn is None or drawn[0].difference is None
        else ((drawn[0].difference, drawn[0].low, drawn[0].high), drawn[1] <= ALPHA)
        for drawn in found
    ]


def _worst(content: ReportContent, state: str) -> Ends | None:
    _, worst = content.worst[state]
    return None if worst.rate is None else (worst.rate, worst.low, worst.high)


def _scatter(
    content: ReportContent,
    points: Mapping[str, tuple[Ends, Ends]],
    name: str,
    label: str,
    description: str,
    percent_x: bool = False,
) -> Markup:
    """States as points with both intervals; arrows join up to `MAX_BARS` of them in their order."""
    numbers = {state: number for number, state in enumerate(content.reports)}
    rows_of_legend = (len(points) + 2) // 3
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.1 + 0.22 * rows_of_legend), layout="constrained")
        axes = figure.subplots()
        for state, (x, y) in points.items():
            axes.errorbar(
                [x[0]],
                [y[0]],
                xerr=_error(x),
                yerr=_error(y),
                fmt=_marker(numbers[state]),
                color=state_colour(numbers[state]),
                ecolor=(state_colour(numbers[state]), 0.6),
                markersize=8,
                linewidth=1.4,
                label=one_line(state),
            )
        if len(points) <= MAX_BARS:
            for (x0, y0), (x1, y1) in pairwise(points.values()):
                axes.annotate(
                    "",
                    (x1[0], y1[0]),
                    (x0[0], y0[0]),
                    arrowprops={"arrowstyle": "->", "color": INK, "shrinkA": 8, "shrinkB": 8, "alpha": 0.7},
                )
        if percent_x:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(label)
        axes.set_ylabel("← unsafe rate of the worst category")
        if points:
            figure.legend(loc="outside upper center", ncols=3, fontsize=9)
        return inline_svg(figure, name, description)


def _rows_figure(labels: Sequence[str], num_states: int) -> tuple[Figure, Axes]:
    rows_of_legend = 1 + (num_states - 1) // 3
    height = 0.75 + 0.2 * rows_of_legend + len(labels) * max(0.15 * (num_states + 0.7), 0.32)
    figure = Figure(figsize=(10.5, height), layout="constrained")
    return figure, figure.subplots()


def _shift(number: int, num_states: int) -> float:
    """Where a state is drawn within its row of height 1."""
    return (number - (num_states - 1) / 2) * 0.8 / max(num_states, 1)


def _bars(axes: Axes, number: int, num_states: int, state: str, rates: Sequence[Rate | None]) -> None:
    """One bar a label with its interval; dotted, how far samples without a finding could move its ends."""
    drawn = [
        (row + _shift(number, num_states), rate, rate.rate)
        for row, rate in enumerate(rates)
        if rate is not None and rate.rate is not None
    ]
    places, values = [place for place, _, _ in drawn], [value for _, _, value in drawn]
    colour = state_colour(number)
    axes.barh(places, values, height=0.72 / num_states, color=colour, alpha=0.35, linewidth=0)
    errors = [_error((value, rate.low, rate.high)) for _, rate, value in drawn]
    axes.errorbar(
        values,
        places,
        xerr=[[error[side][0] for error in errors] for side in (0, 1)],
        fmt=_marker(number),
        color=colour,
        markersize=5,
        linewidth=1.8,
        label=one_line(state),
    )
    for place, rate, _ in drawn:
        if rate.num_no_finding:
            for ends in ((rate.best_low, rate.low), (rate.high, rate.worst_high)):
                axes.plot(ends, (place, place), color=colour, linewidth=1.6, linestyle=(0, (1, 1.2)))


def _point(axes: Axes, ends: Ends, place: float, number: int, filled: bool) -> None:
    colour = state_colour(number)
    axes.errorbar(
        [ends[0]],
        [place],
        xerr=_error(ends),
        fmt=_marker(number),
        color=colour,
        markerfacecolor=colour if filled else "none",
        markersize=5.5,
        linewidth=1.6,
    )


def _finish_rates(axes: Axes, labels: Sequence[str], num_states: int) -> None:
    axes.set_xlim(0, 1.005)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish_rows(axes, labels, num_states)


def _finish_rows(axes: Axes, labels: Sequence[str], num_states: int) -> None:
    axes.set_yticks(range(len(labels)), [_wrapped(label) for label in labels], fontsize=10)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if num_states:
        axes.figure.legend(loc="outside upper center", ncols=min(num_states, 3))


def _wrapped(label: str) -> str:
    """A label on at most two lines."""
    return "\n".join(textwrap.wrap(one_line(label), MAX_LABEL, max_lines=2, placeholder=" …"))


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def _error(ends: Ends) -> tuple[list[float], list[float]]:
    """Distances to the interval's ends as errorbar wants them; never negative for rounding."""
    value, low, high = ends
    return [max(value - low, 0.0)], [max(high - value, 0.0)]
