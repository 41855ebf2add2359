"""The plots of sweep.html, as inline SVG in the page's own ink; every point with its interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from comparison.methods import BASE
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sweeping.results import Results, Setting

from equipoise.eval.report.content import worst_category
from equipoise.eval.report.formats import one_line
from equipoise.eval.report.plots import MARKERS, state_colour
from equipoise.eval.report.svg import INK, STYLE, inline_svg

TITLES = {
    "unsafe_rate": "unsafe answers",
    "worst_category": "worst category",
    "over_refusal": "harmless refused",
    "helpfulness": "helpfulness, nats a token",
}
MAX_NAMED = 6
"""Settings named in a plot; beyond, the table has their names."""


def front_plot(results: Results) -> Markup:
    """Worst category's unsafe rate against helpfulness; the front is filled and joined, a ring says the gate passed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        axes = figure.subplots()
        _cross(axes, results, BASE, INK, "X", filled=True)
        axes.plot([], [], "X", color=INK, label="base")
        for setting in results.settings:
            _cross(axes, results, setting.name, state_colour(1), "o", filled=results.front[setting.name])
            if setting.passed[0] == setting.passed[1]:
                x, y = (
                    results.figure(setting.name, f)["estimate"] for f in ("helpfulness", "worst_category")
                )
                axes.plot([x], [y], "o", color=state_colour(3), markersize=13, markerfacecolor="none")
            if results.front[setting.name] or len(results.settings) <= MAX_NAMED:
                _name(axes, results, setting.name)
        stairs = sorted(
            (
                results.figure(name, "helpfulness")["estimate"],
                results.figure(name, "worst_category")["estimate"],
            )
            for name, of in results.front.items()
            if of
        )
        axes.step(*zip(*stairs, strict=True), where="pre", color=state_colour(1), linewidth=1, linestyle="--")
        axes.plot([], [], "o--", color=state_colour(1), linewidth=1, label="on the front")
        axes.plot([], [], "o", color=state_colour(1), markerfacecolor="none", label="dominated")
        axes.plot(
            [],
            [],
            "o",
            color=state_colour(3),
            markersize=11,
            markerfacecolor="none",
            label="all seeds passed",
        )
        axes.set_xlabel("helpfulness: log-probability of the reference answers, nats a token →")
        axes.set_ylabel("worst category's unsafe rate")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(bottom=0)
        _finish(axes)
        figure.legend(loc="outside upper center", ncols=4)
        return inline_svg(
            figure,
            "front",
            "Worst category's unsafe rate against helpfulness by setting; lower right is better.",
        )


def _cross(axes: Axes, results: Results, name: str, colour: str, marker: str, filled: bool) -> None:
    x, y = results.figure(name, "helpfulness"), results.figure(name, "worst_category")
    axes.errorbar(
        [x["estimate"]],
        [y["estimate"]],
        xerr=_arms(x),
        yerr=_arms(y),
        fmt=marker,
        color=colour,
        markerfacecolor=colour if filled else "none",
        markersize=6,
        linewidth=1.0,
        alpha=0.85 if filled else 0.35,
    )


def _name(axes: Axes, results: Results, name: str) -> None:
    x, y = results.figure(name, "helpfulness"), results.figure(name, "worst_category")
    axes.annotate(
        one_line(name)[:40],
        (x["estimate"], y["estimate"]),
        xytext=(7, 5),
        textcoords="offset points",
        fontsize=8.5,
        color=INK,
    )


def parallel_plot(results: Results) -> Markup:
    """Parallel coordinates: the swept keys, then the figures, each on its own axis; better is up for every figure."""
    columns = [*results.sweep.swept, "worst_category", "unsafe_rate", "over_refusal", "helpfulness"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.4), layout="constrained")
        axes = figure.subplots()
        scales = [_scale(results, column) for column in columns]
        for setting in results.settings:
            front = results.front[setting.name]
            axes.plot(
                range(len(columns)),
                [scale[setting.name] for scale, _ in scales],
                marker=MARKERS[0],
                markersize=4,
                color=state_colour(1) if front else INK,
                alpha=0.95 if front else 0.35,
                linewidth=2 if front else 1,
            )
        for place, (_, ticks) in enumerate(scales):
            axes.axvline(place, color=INK, linewidth=0.8, alpha=0.5)
            for height, label in ticks:
                axes.annotate(
                    label, (place, height), xytext=(4, 2), textcoords="offset points", fontsize=8, color=INK
                )
        axes.plot([], [], color=state_colour(1), linewidth=2, label="on the front")
        axes.plot([], [], color=INK, alpha=0.35, label="dominated")
        labels = [
            TITLES.get(column, one_line(column).rpartition(".")[2] if "." in column else column)
            for column in columns
        ]
        axes.set_xticks(range(len(columns)), labels)
        axes.set_xlim(-0.1, len(columns) - 0.5)
        axes.set_yticks([])
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2)
        return inline_svg(
            figure,
            "parallel",
            "Every setting as a line over its keys and its figures; up is better in every figure.",
        )


def _scale(results: Results, column: str) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Setting -> height in [0, 1] on one axis, and the labels of the axis."""
    if column in TITLES:
        values = {s.name: results.figure(s.name, column)["estimate"] for s in results.settings}
        low, high = min(values.values()), max(values.values())
        up = column == "helpfulness"  # the others are better when low
        heights = {
            name: _between(v, low, high) if up else 1 - _between(v, low, high) for name, v in values.items()
        }
        form = "{:.2f}" if up else "{:.0%}"
        ends = (low, high) if up else (high, low)
        return heights, [(0.0, form.format(ends[0])), (1.0, form.format(ends[1]))]
    texts = {s.name: s.swept[column] for s in results.settings}
    order = sorted(set(texts.values()), key=lambda text: (number(text) is None, number(text) or 0.0, text))
    places = {text: _between(i, 0, len(order) - 1) for i, text in enumerate(order)}
    return {name: places[text] for name, text in texts.items()}, [
        (places[t], one_line(t)[:14]) for t in order
    ]


def _between(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)


def number(text: str) -> float | None:
    """The number that an override's value is, if it is a finite one."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def trade_off_key(results: Results) -> str | None:
    """What the trade-off is drawn against: beta / lam where either is swept, else the first key of numbers."""
    swept = results.sweep.swept
    if {"beta", "lam"} & {key.lstrip("+") for key in swept}:
        return "beta / lam"
    return next(
        (key for key in swept if all(number(s.swept[key]) is not None for s in results.settings)), None
    )


def trade_off_plot(results: Results) -> Markup | None:
    """Safety, over-refusal and helpfulness against beta / lam: the paper's plot; one line a beta. None: no numbers."""
    key = trade_off_key(results)
    if key is None:
        return None
    lines: dict[str, list[tuple[float, Setting]]] = {}
    by_beta = key == "beta / lam" and "beta" in results.sweep.swept and "lam" in results.sweep.swept
    for setting in results.settings:
        x = setting.beta_over_lam if key == "beta / lam" else number(setting.swept[key]) or 0.0
        others = [f"{k} {v}" for k, v in setting.swept.items() if k not in ("beta", "lam", key)]
        label = ", ".join(([f"beta {setting.recipe.beta:g}"] if by_beta else []) + others)
        lines.setdefault(label, []).append((x, setting))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 6.0), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True).flatten()
        xs = [x for of in lines.values() for x, _ in of]
        for axes, what in zip(panels, TITLES, strict=True):
            base = results.figure(BASE, what)
            axes.axhline(base["estimate"], color=INK, linewidth=0.9, linestyle="--", alpha=0.7)
            axes.axhspan(base["low"], base["high"], color=INK, alpha=0.06, linewidth=0)
            for index, (label, of) in enumerate(lines.items(), start=1):
                points = sorted((x, setting.name) for x, setting in of)
                _line(axes, [(x, results.figure(name, what)) for x, name in points], index, label)
            _panel(axes, what)
            if min(xs) > 0 and max(xs) / min(xs) >= 4:
                axes.set_xscale("log")
                axes.set_xticks(sorted(set(xs)), [f"{x:.3g}" for x in sorted(set(xs))], rotation=45)
                axes.minorticks_off()
        for axes in panels[2:]:
            axes.set_xlabel(one_line(key))
        handles, labels = panels[0].get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4))
        return inline_svg(
            figure, "trade-off", f"Safety and helpfulness against {key}; the dashed line is the base."
        )


def iterations_plot(results: Results) -> Markup | None:
    """Safety and helpfulness against optimizer steps, where stages were judged on their way; None where none was."""
    outcomes = [outcome for outcome in results.outcomes.values() if outcome.trajectory]
    if not outcomes:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for index, outcome in enumerate(outcomes, start=1):
            worst = []
            for step, report in outcome.trajectory:
                _, of = worst_category(report)
                worst.append((step, {"estimate": of.rate, "low": of.low, "high": of.high}))
            helpful = [
                (step, {"estimate": m.mean, "low": m.low, "high": m.high})
                for step, m in ((step, report.helpfulness) for step, report in outcome.trajectory)
            ]
            label = str(outcome.point) if len(outcomes) <= MAX_NAMED else ""
            _line(panels[0], worst, index, label)
            _line(panels[1], helpful, index, label)
        for axes, what in zip(panels, ("worst_category", "helpfulness"), strict=True):
            _panel(axes, what)
            axes.set_xlabel("optimizer steps")
        handles, labels = panels[0].get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8.5)
        return inline_svg(
            figure, "iterations", "Worst category's unsafe rate and helpfulness against optimizer steps."
        )


def _line(axes: Axes, points: Sequence[tuple[float, Mapping[str, Any]]], index: int, label: str) -> None:
    known = [(x, value) for x, value in points if value["estimate"] is not None and value["low"] is not None]
    axes.errorbar(
        [x for x, _ in known],
        [value["estimate"] for _, value in known],
        yerr=[[_arms(value)[side][0] for _, value in known] for side in (0, 1)],
        fmt=f"{MARKERS[index % len(MARKERS)]}-",
        color=state_colour(index),
        markersize=5,
        linewidth=1.2,
        label=one_line(label),
    )


def _panel(axes: Axes, what: str) -> None:
    axes.set_title(TITLES[what], fontsize=10.5)
    if what != "helpfulness":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(bottom=0)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _arms(value: Mapping[str, Any]) -> list[list[float]]:
    """Lengths of the bar on either side; a basic interval may leave its estimate out, and then has one arm."""
    return [[max(value["estimate"] - value["low"], 0.0)], [max(value["high"] - value["estimate"], 0.0)]]
