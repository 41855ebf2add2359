"""From judged answers to rates with intervals, paired tests, a table and a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from equipoise.data.files import write_aside
from equipoise.eval.rates import Rate
from equipoise.eval.statistics import PairedChange, holm, paired_change
from equipoise.eval.suites.base import HARMFUL, LOOKALIKE

RATES = {"unsafe": (HARMFUL, "unsafe"), "over_refusal": (LOOKALIKE, "refused")}
"""Rate -> the suite it is counted on, and the field of an answer that counts."""
TITLES = {"unsafe": "unsafe answers to harmful prompts", "over_refusal": "look-alikes refused"}


@dataclass(frozen=True)
class Point:
    """One setting of TSDI."""

    num_prompts: int
    num_positions: int
    alpha: float
    pool: str
    continuation: str
    plausibility: float

    @property
    def name(self) -> str:
        """How files and tables call it."""
        if self.alpha == 0:
            return "alpha 0"
        extra = "" if self.continuation == "random" else f", {self.continuation} continuation"
        extra += f", plausibility {self.plausibility:g}" if self.plausibility else ""
        return f"N {self.num_prompts}, L {self.num_positions}, alpha {self.alpha:g}, {self.pool}{extra}"

    @property
    def measurement(self) -> str:
        """What the token bias depends on, as a file's name."""
        return f"N{self.num_prompts}-{self.pool}-{self.continuation}"


@dataclass(frozen=True)
class Answer:
    """One judged answer."""

    point: str
    suite: str
    id: str
    category: str
    opening: str
    """Its first tokens, as many as any point corrects."""
    response: str
    unsafe: bool | None
    """None: the judge had no verdict."""
    refused: bool | None


@dataclass(frozen=True)
class PointResult:
    """What was found at one point."""

    point: str
    unsafe: Rate
    over_refusal: Rate
    change: dict[str, PairedChange] | None
    """Against alpha 0, prompt by prompt; None for alpha 0 itself."""
    p_holm: dict[str, float] | None
    """McNemar's p of every rate, adjusted for the number of points."""


def summarise(points: Sequence[Point], answers: Sequence[Answer]) -> list[PointResult]:
    """Rates with Wilson intervals; against alpha 0 the exact McNemar test with Holm's correction over the points."""
    by_point = {point.name: [a for a in answers if a.point == point.name] for point in points}
    outcomes = {
        name: {
            rate: {a.id: getattr(a, field) for a in of_point if a.suite == suite}
            for rate, (suite, field) in RATES.items()
        }
        for name, of_point in by_point.items()
    }
    before, *others = list(by_point)
    changes = {
        name: {rate: _change(outcomes[before][rate], outcomes[name][rate]) for rate in RATES}
        for name in others
    }
    adjusted = {
        rate: dict(zip(others, holm([changes[name][rate].p_value for name in others]), strict=True))
        for rate in RATES
    }
    return [
        PointResult(
            point=name,
            unsafe=Rate.of(outcomes[name]["unsafe"].values()),
            over_refusal=Rate.of(outcomes[name]["over_refusal"].values()),
            change=changes.get(name),
            p_holm={rate: adjusted[rate][name] for rate in RATES} if name in changes else None,
        )
        for name in by_point
    ]


def _change(before: dict[str, bool | None], after: dict[str, bool | None]) -> PairedChange:
    """Over the prompts with a verdict at both points."""
    both = [
        (before[prompt], outcome)
        for prompt, outcome in after.items()
        if outcome is not None and before.get(prompt) is not None
    ]
    return paired_change([bool(b) for b, _ in both], [bool(a) for _, a in both])


def write_result(
    folder: Path, points: Sequence[Point], answers: Sequence[Answer], setting: dict[str, Any]
) -> list[PointResult]:
    """Write result.json, table.md and plot.png, each aside and renamed."""
    results = summarise(points, answers)
    content = {"setting": setting, "points": [asdict(result) for result in results]}
    write_aside(folder / "result.json", json.dumps(content, indent=1) + "\n")
    head = ["setting", "unsafe", "change", "p (Holm)", "over-refusal", "change", "p (Holm)"]
    lines = [head, ["---"] * len(head), *(row(result) for result in results)]
    write_aside(folder / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    plot(results, folder / "plot.png")
    return results


def row(result: PointResult) -> list[str]:
    """A line of the table."""
    cells = [result.point]
    for rate in RATES:
        found: Rate = getattr(result, rate)
        cells.append(
            "-" if found.rate is None else f"{found.rate:.2f} [{found.low:.2f}, {found.high:.2f}] n={found.n}"
        )
        if result.change is None or result.p_holm is None:
            cells += ["", ""]
            continue
        change = result.change[rate]
        difference = "-" if change.difference is None else f"{change.difference:+.2f}"
        cells.append(f"{difference} [{change.low:+.2f}, {change.high:+.2f}]")
        cells.append(f"{result.p_holm[rate]:.2g}")
    return cells


def show(results: Sequence[PointResult], console: Console) -> None:
    """Print the table."""
    table = Table(
        "setting", *(column for rate in RATES for column in (rate.replace("_", "-"), "change", "p"))
    )
    for result in results:
        table.add_row(*row(result))
    console.print(table)
    console.print(
        "95 % Wilson intervals; changes against alpha 0 by prompt (Tango's interval, McNemar's exact p, Holm)."
    )


def plot(results: Sequence[PointResult], path: Path) -> None:
    """Both rates of every point with their intervals, one line a point."""
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(9, 1.2 + 0.3 * len(results)), layout="constrained")
        panels = figure.subplots(1, len(RATES), sharey=True)
        for axes, rate, colour in zip(panels, RATES, ("#c44e52", "#3b82d9"), strict=True):
            for line, result in enumerate(results):
                found: Rate = getattr(result, rate)
                if found.rate is not None:
                    axes.plot([found.low, found.high], [line, line], color=colour, linewidth=1.5)
                    axes.plot([found.rate], [line], "o", color=colour, markersize=5)
            first: Rate = getattr(results[0], rate)
            if first.rate is not None:
                axes.axvline(first.rate, color="#8c8c8c", linewidth=0.8, linestyle=":")
            axes.set_title(TITLES[rate], fontsize=9)
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_yticks(range(len(results)), [result.point for result in results])
        panels[0].invert_yaxis()
        aside = path.with_name(f".{path.name}")
        figure.savefig(aside, format="png", dpi=150)
        aside.replace(path)
