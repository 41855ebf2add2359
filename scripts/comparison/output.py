"""What a comparison leaves: comparison.json, comparison.md, comparison.svg and .png, and the table in the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comparison.figures import FIGURES
from comparison.methods import BASE, BASELINE
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from equipoise.data.files import write_aside
from equipoise.eval.report.plots import MARKERS, STATE_COLOURS
from equipoise.eval.terminal import console, say

TITLES = {
    "unsafe_rate": "unsafe answers",
    "worst_category": "worst category",
    "gap": "worst minus best",
    "over_refusal": "harmless refused",
    "helpfulness": "nats a token",
}


def write_outputs(folder: Path, result: Mapping[str, Any], show: bool) -> None:
    """Write the files; `show`: print the tables too."""
    write_aside(folder / "comparison.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_aside(folder / "comparison.md", markdown(result))
    figure = plot(result)
    for suffix in ("svg", "png"):
        aside = folder / f".comparison.{suffix}"
        figure.savefig(aside, format=suffix, dpi=150)
        aside.replace(folder / f"comparison.{suffix}")
    if not show:
        return
    for title, header, rows in _tables(result):
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in _notes(result):
        say(note)
    say(f"written: {folder / 'comparison.md'}, comparison.json, comparison.svg, comparison.png")


def markdown(result: Mapping[str, Any]) -> str:
    """Both tables with what they mean."""
    parts = []
    for title, header, rows in _tables(result):
        lines = [header, ["---"] * len(header), *rows]
        parts.append("\n".join([f"{title}:", "", *("| " + " | ".join(line) + " |" for line in lines)]))
    parts.append("\n".join(f"- {note}" for note in _notes(result)))
    return "\n\n".join(parts) + "\n"


def _tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of the figures and of the differences."""
    order = [BASE, *(name for name in result["methods"] if name != BASE)]
    figures = [
        [name, *(_cell(figure, result["methods"][name][figure]) for figure in FIGURES)] for name in order
    ]
    tables = [
        (
            "Per method, in brackets 95 % intervals",
            ["method", *(TITLES[figure] for figure in FIGURES)],
            figures,
        )
    ]
    changes = [
        [name, *(_change(figure, of[figure]) for figure in FIGURES)]
        for name, of in result["differences"].items()
    ]
    if changes:
        title = "Difference to plain DPO, paired by prompt and seed; p after Holm over the methods"
        tables.append((title, ["method", *(TITLES[figure] for figure in FIGURES)], changes))
    return tables


def _cell(figure: str, value: Mapping[str, Any]) -> str:
    if figure == "helpfulness":
        return f"{value['estimate']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
    named = f" {value['category']}" if "category" in value else ""
    return f"{value['estimate']:.0%} ({100 * value['low']:.0f}–{100 * value['high']:.0f}){named}"


def _change(figure: str, value: Mapping[str, float]) -> str:
    difference, low, high = (value[name] for name in ("difference", "low", "high"))
    p = f"p {value['p_adjusted']:.2g}"
    if figure == "helpfulness":
        return f"{difference:+.2f} ({low:+.2f} to {high:+.2f}), {p}"
    return f"{100 * difference:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}), {p}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    settings, prompts = result["settings"], result["num_prompts"]
    seeds = settings["seeds"]
    notes = [
        f"{len(seeds)} seed{'s'[: len(seeds) > 1]}, {settings['num_steps']} steps each on {settings['pairs']} "
        f"({settings['num_safety_pairs']} safety and {settings['num_helpful_pairs']} helpful pairs); "
        f"judged on {prompts['harmful']} harmful, {prompts['lookalike']} look-alike and {prompts['helpful']} helpful "
        "prompts that no method trained on",
        "changed in every training: " + (" ".join(settings["overrides"]) or "nothing"),
        f"judge: {settings['judge']}{', a stand-in for a real one' if settings['judge_is_stand_in'] else ''}",
        f"intervals: {result['num_replicates']} bootstrap replicates that draw prompts (within their category)"
        + (" and seeds" if len(seeds) > 1 else "")
        + " as wholes; the worst and the best category are found in each. The largest of several noisy rates "
        "overshoots, and the interval of the worst category allows for it: it may lie mostly below its estimate; none "
        "is narrower than Wilson's over the prompts (of a difference, than Tango's where not one prompt differs)",
    ]
    if len(seeds) == 1:
        notes.append("one seed says nothing about how much another training would differ")
    if result["small_categories"]:
        small = ", ".join(f"{name} ({num})" for name, num in result["small_categories"].items())
        notes.append(f"too few prompts to be worst or best: {small}")
    for name, what in (
        ("num_unparsed", "answers that the judge could not read"),
        ("num_unscored", "unscored answers"),
    ):
        counted = {method: of[name] for method, of in result["methods"].items() if of[name]}
        if counted:
            notes.append(
                f"{what}, left out: {', '.join(f'{method} {num}' for method, num in counted.items())}"
            )
    return notes


def plot(result: Mapping[str, Any]) -> Figure:
    """One panel a figure, one line a method, with intervals; the dashed line is plain DPO."""
    names = [BASE, *(name for name in result["methods"] if name != BASE)]
    figure = Figure(figsize=(3.0 * len(FIGURES), 0.9 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(FIGURES), sharey=True)
    for axes, what in zip(panels, FIGURES, strict=True):
        for row, name in enumerate(names):
            value = result["methods"][name][what]
            axes.errorbar(
                [value["estimate"]],
                [row],
                xerr=_arms(value),
                fmt=MARKERS[row % len(MARKERS)],
                color=STATE_COLOURS[row % len(STATE_COLOURS)],
                linewidth=2,
            )
        axes.axvline(
            result["methods"][BASELINE][what]["estimate"], color="0.5", linewidth=0.8, linestyle="--"
        )
        axes.set_title(TITLES[what], fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if what != "helpfulness":
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _arms(value: Mapping[str, float]) -> list[list[float]]:
    """Lengths of the bar on either side; a basic interval may leave its estimate out, and then has one arm."""
    return [[max(value["estimate"] - value["low"], 0.0)], [max(value["high"] - value["estimate"], 0.0)]]
