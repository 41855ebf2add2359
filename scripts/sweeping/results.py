"""What the points found: figures with intervals, the Pareto front, the hypervolume, and the sweep's tables."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from comparison.figures import FIGURES, Bootstrap, bootstrap, interval
from comparison.methods import BASE
from sweeping.front import hypervolume as area
from sweeping.front import on_front
from sweeping.points import Point, Sweep

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.report.content import worst_category
from equipoise.train.recipe import Recipe
from equipoise.train.redaction import key_variables, secret_values, without_secrets

NUM_REPLICATES = 2000
HELPFULNESS_BELOW_BASE = 1.0
"""The hypervolume's reference: so many nats a token below the base's helpfulness, and every answer unsafe."""


@dataclass(frozen=True)
class Outcome:
    """What a point that has ended left."""

    point: Point
    label: str
    """Of the state that was judged last, as `eval/<label>/`."""
    report: CategoryReport
    summary: Mapping[str, Any]
    trajectory: tuple[tuple[int, CategoryReport], ...]
    """(optimizer step, report) inside the stage that was judged on its way (`gate.every`), and at its end."""

    @property
    def verdict(self) -> str | None:
        """The gate's, on that state."""
        return self.summary["verdict"]

    @property
    def promoted(self) -> bool:
        """Whether the run has a model in `promoted/`, whichever of its states that is."""
        return self.summary["promoted"] is not None


def read_outcome(point: Point) -> Outcome:
    """Read a point that is `done`. Raises ReportError for a damaged report."""
    verdicts = [
        json.loads(line) for line in (point.folder / "gate.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    labels = list(dict.fromkeys(verdict["label"] for verdict in verdicts))
    steps: dict[str, dict[int, str]] = {}
    for label in labels:
        stage, _, step = label.rpartition("-")
        if step.isdigit():
            steps.setdefault(stage, {})[int(step)] = label
    longest = max(steps.values(), key=len, default={})
    return Outcome(
        point=point,
        label=labels[-1],
        report=_report(point, labels[-1]),
        summary=json.loads((point.folder / "summary.json").read_text(encoding="utf-8")),
        trajectory=tuple((step, _report(point, longest[step])) for step in sorted(longest))
        if len(longest) > 1
        else (),
    )


def _report(point: Point, label: str) -> CategoryReport:
    return CategoryReport.from_json(point.folder / "eval" / label / "report.json")


@dataclass(frozen=True)
class Setting:
    """The swept values of points that differ in their seed alone; or one point, where seeds cannot be pooled."""

    name: str
    swept: Mapping[str, str]
    outcomes: tuple[Outcome, ...]

    @property
    def recipe(self) -> Recipe:
        """Of its first point."""
        return self.outcomes[0].point.recipe

    @property
    def beta_over_lam(self) -> float:
        """The pull to the reference that SACPO's safe stage trains with."""
        return self.recipe.beta / self.recipe.lam

    @property
    def passed(self) -> tuple[int, int]:
        """Points whose last state passed the gate, of how many."""
        return sum(outcome.verdict == "PASS" for outcome in self.outcomes), len(self.outcomes)


@dataclass(frozen=True)
class Results:
    """All that is known of a sweep at this moment."""

    sweep: Sweep
    outcomes: Mapping[Point, Outcome]
    settings: tuple[Setting, ...]
    """Those that are complete."""
    drawn: Bootstrap | None
    """None where no setting is complete."""
    pooled: bool
    """False: seeds were asked different prompts, so every point is a setting of its own."""
    num_other_prompts: int
    """Points left out of the figures because they were asked other prompts than the first one."""
    failures: Mapping[Point, Mapping[str, Any]]

    @property
    def missing(self) -> list[Point]:
        """Points without an outcome, failed ones among them."""
        return [point for point in self.sweep.points if point not in self.outcomes]

    @property
    def base(self) -> CategoryReport | None:
        """The starting model's report."""
        return next(
            (found for o in self.outcomes.values() if (found := base_report(o.point)) is not None), None
        )

    def figure(self, name: str, figure: str) -> Mapping[str, Any]:
        """estimate, low, high of a setting's or the base's figure (`comparison.figures.FIGURES`)."""
        assert self.drawn is not None
        return self.drawn.methods[name][figure]

    @cached_property
    def front(self) -> dict[str, bool]:
        """Setting -> whether it is on the Pareto front of helpfulness and the worst category's unsafe rate."""
        gain, cost = self._objectives(replicates=False)
        return dict(zip(self._names, map(bool, on_front(gain, cost)[0]), strict=True))

    @cached_property
    def front_share(self) -> dict[str, float]:
        """Setting -> share of the bootstrap's replicates in which it is on the front."""
        gain, cost = self._objectives(replicates=True)
        return dict(zip(self._names, map(float, on_front(gain, cost).mean(axis=0)), strict=True))

    @cached_property
    def hypervolume(self) -> tuple[float, float, float]:
        """Dominated area, nats x rate, with its interval: basic, as a maximum of noisy points overshoots."""
        assert self.drawn is not None
        estimate = self._hypervolumes(replicates=False)[0]
        values = self._hypervolumes(replicates=True)
        low, high = interval(estimate, values, basic=True, bounds=(0.0, np.inf))
        return float(estimate), low, high

    @property
    def _names(self) -> list[str]:
        return [setting.name for setting in self.settings]

    def _values(self, name: str, figure: str, replicates: bool) -> Any:
        assert self.drawn is not None
        if replicates:
            return self.drawn.replicates[name][figure]
        return np.array([self.drawn.estimates[name][figure]])

    def _objectives(self, replicates: bool) -> tuple[Any, Any]:
        return tuple(
            np.stack([self._values(name, figure, replicates) for name in self._names], axis=-1)
            for figure in ("helpfulness", "worst_category")
        )  # type: ignore[return-value]

    def _hypervolumes(self, replicates: bool) -> Any:
        gain, cost = self._objectives(replicates)
        below = self._values(BASE, "helpfulness", replicates) - HELPFULNESS_BELOW_BASE
        return np.array([area(g, c, (r, 1.0)) for g, c, r in zip(gain, cost, below, strict=True)])


def base_report(point: Point) -> CategoryReport | None:
    """The report of the model that the point started from; None where its recipe had none (evaluation.baseline)."""
    path = point.folder / "eval" / "base-0" / "report.json"
    return CategoryReport.from_json(path) if path.exists() else None


def collect(sweep: Sweep, min_prompts: int, num_replicates: int = NUM_REPLICATES) -> Results:
    """Read what is there. Raises EquipoiseError where reports cannot be compared, or categories are too small."""
    outcomes = {point: read_outcome(point) for point in sweep.points if point.done}
    failures = {
        point: without_secrets(
            json.loads(point.failure.read_text(encoding="utf-8")),
            secret_values(key_variables(asdict(point.recipe))),
        )
        for point in sweep.points
        if point not in outcomes and point.failure.exists()
    }
    asked = {point: _asked(outcome.report) for point, outcome in outcomes.items()}
    pooled = len(set(asked.values())) <= 1
    settings: list[Setting] = []
    if pooled:
        for name in dict.fromkeys(point.setting for point in sweep.points):
            points = [point for point in sweep.points if point.setting == name]
            if all(point in outcomes for point in points):
                settings.append(Setting(name, points[0].swept, tuple(outcomes[point] for point in points)))
    else:  # the split of the data follows the seed; only points of one split can be held against each other
        first = next(iter(asked.values()))
        settings = [
            Setting(str(point), point.swept, (outcomes[point],))
            for point, ids in asked.items()
            if ids == first
        ]
    base = next((found for s in settings if (found := base_report(s.outcomes[0].point)) is not None), None)
    drawn = None
    if settings and base is not None:
        reports = {BASE: [base]} | {s.name: [o.report for o in s.outcomes] for s in settings}
        drawn = bootstrap(reports, min_prompts, num_replicates)
    return Results(
        sweep=sweep,
        outcomes=outcomes,
        settings=tuple(settings),
        drawn=drawn,
        pooled=pooled,
        num_other_prompts=0 if pooled else len(outcomes) - len(settings),
        failures=failures,
    )


def _asked(report: CategoryReport) -> tuple[tuple[str, str, str], ...]:
    return tuple((sample.suite, sample.id, sample.category) for sample in report.samples)


def table(results: Results) -> str:
    """`sweep.csv`: a row a point, with every rate's interval and n; what is not known is empty."""
    swept = list(results.sweep.swept)
    columns = [
        "setting",
        *swept,
        "seed",
        "beta_over_lam",
        "status",
        "exit_code",
        "verdict",
        "promoted",
        "on_front",
    ]
    columns += [
        f"{figure}{part}"
        for figure in ("unsafe_rate", "over_refusal")
        for part in ("", "_low", "_high", "_n")
    ]
    columns += ["worst_category", "worst_category_rate", "worst_category_low", "worst_category_high", "gap"]
    columns += ["helpfulness", "helpfulness_low", "helpfulness_high", "helpfulness_n", "seconds", "report"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    front = results.front if results.drawn is not None else {}
    for point in results.sweep.points:
        row: dict[str, Any] = {"setting": point.setting, **point.swept, "seed": point.seed}
        row["beta_over_lam"] = point.recipe.beta / point.recipe.lam
        name = point.setting if results.pooled else str(point)
        row["on_front"] = front.get(name, "")
        outcome = results.outcomes.get(point)
        if outcome is None:
            failure = results.failures.get(point)
            row["status"] = "missing" if failure is None else "failed"
            row["exit_code"] = "" if failure is None else failure["exit_code"]
        else:
            row |= _row(outcome)
        writer.writerow(row)
    return text.getvalue()


def _row(outcome: Outcome) -> dict[str, Any]:
    report, summary = outcome.report, outcome.summary
    row: dict[str, Any] = {"status": "done", "exit_code": summary["exit_code"], "verdict": outcome.verdict}
    for figure, rate in (("unsafe_rate", report.overall_unsafe_rate), ("over_refusal", report.over_refusal)):
        row |= {
            figure: rate.rate,
            f"{figure}_low": rate.low,
            f"{figure}_high": rate.high,
            f"{figure}_n": rate.n,
        }
    category, worst = worst_category(report)
    helpfulness = report.helpfulness
    return row | {
        "promoted": outcome.promoted,
        "worst_category": category,
        "worst_category_rate": worst.rate,
        "worst_category_low": worst.low,
        "worst_category_high": worst.high,
        "gap": report.gap.gap,
        "helpfulness": helpfulness.mean,
        "helpfulness_low": helpfulness.low,
        "helpfulness_high": helpfulness.high,
        "helpfulness_n": helpfulness.n,
        "seconds": round(sum(summary["seconds"].values()), 1),
        "report": str((outcome.point.folder / "report.html").relative_to(outcome.point.folder.parents[2])),
    }


def facts(results: Results) -> dict[str, Any]:
    """`results.json`: the settings with their figures, pooled over seeds, for whoever draws their own conclusions."""
    settings: Sequence[Setting] = results.settings if results.drawn is not None else ()
    return {
        "fixed": list(results.sweep.fixed),
        "seeds": list(results.sweep.seeds),
        "pooled_over_seeds": results.pooled,
        "num_points": len(results.sweep.points),
        "num_done": len(results.outcomes),
        "failed": {str(point): failure["exit_code"] for point, failure in results.failures.items()},
        "base": {figure: results.figure(BASE, figure) for figure in FIGURES} if settings else None,
        "settings": [
            {
                "name": setting.name,
                **{"swept": dict(setting.swept)},
                "num_passed": setting.passed[0],
                "num_seeds": setting.passed[1],
                "on_front": results.front[setting.name],
                "on_front_share": results.front_share[setting.name],
                **{figure: results.figure(setting.name, figure) for figure in FIGURES},
            }
            for setting in settings
        ],
        "hypervolume": dict(zip(("estimate", "low", "high"), results.hypervolume, strict=True))
        if settings
        else None,
        "hypervolume_reference": f"base helpfulness - {HELPFULNESS_BELOW_BASE:g} nats a token, worst category 100 %",
    }


def html_path(sweep: Sweep) -> Path:
    """Where the report goes."""
    return sweep.folder / "sweep.html"
