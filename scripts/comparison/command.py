"""`scripts/compare_methods`: the command line, the points one after the other, and what comes of them."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from argument_types import positive
from comparison.figures import compare
from comparison.methods import BASE, BASELINE, METHODS
from comparison.output import write_outputs
from comparison.pairs import prepare, write_training
from comparison.point import Point, recipe_of, remove_models, run_point

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.data.sources import SafetyData
from equipoise.eval.category_report import CategoryReport
from equipoise.eval.terminal import duration, say

DESCRIPTION = """\
Train plain DPO, DPO decoded with TSDI, and the category and token-bias methods on the same pairs, with the same number
of steps and several seeds, and judge all of them on the same held-out prompts: the shipped suites, and the held-out
prompts of the file. Prints per method, with intervals: the unsafe rate over all prompts, in the worst category and
between the worst and the best, over-refusal, helpfulness; and the differences to plain DPO.

Every point (a method and a seed) is a run of its own in a process of its own. What is done is kept: the same command
goes on where it stopped. Anything that train.py takes can be given for all methods:

    scripts/compare_methods --pairs pairs.jsonl --num-steps 60 model.dtype=float32 stages.safe.learning_rate=3e-4
    scripts/compare_methods --pairs pku.jsonl data.fields.category=category_predicted data.taxonomy=beavertails
"""


def argument_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=Path, required=True, metavar="FILE", help="JSON lines, see data/README.md")
    add("--methods", default=",".join(METHODS), help=f"comma-separated, with {BASELINE} (all)")
    add("--seeds", type=positive, default=3, help="seeds a method (3)")
    add("--num-steps", type=positive, default=60, help="optimizer steps of every training (60)")
    add("--held-out", type=_share, default=0.1, help="share of the file's prompts kept for judging (0.1)")
    add("--min-prompts", type=positive, default=8, help="a category with fewer can't be worst or best (8)")
    add("--output", type=Path, default=Path("outputs/comparison"), help="folder (outputs/comparison)")
    add("--keep-models", action="store_true", help="keep every trained model; each takes its size on disk")
    add("overrides", nargs="*", metavar="key=value", help="for every training, as train.py takes them")
    add("--point", help=argparse.SUPPRESS)  # how the program calls itself: `base`, or METHOD-seedN
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is no share in [0, 1)")
    return value


def run(options: argparse.Namespace, program: Path) -> int:
    """Run what is missing and write the comparison; returns 1 when a point failed. Raises EquipoiseError."""
    methods = _methods(options.methods)
    folder = options.output.expanduser().resolve()
    training = folder / "training_pairs.jsonl"
    overrides = [
        "data=jsonl",
        f"data.path={options.pairs.expanduser().resolve()}",
        f"data.held_out_fraction={options.held_out}",
        *options.overrides,
    ]
    points = [
        Point(BASE, None),
        *(Point(method, seed) for seed in range(options.seeds) for method in methods),
    ]
    if options.point is not None:
        point = next(point for point in points if str(point) == options.point)
        recipe = recipe_of(point, folder, options.num_steps, overrides)
        run_point(point, folder, recipe, prepare(recipe.data), training)
        return 0
    # Every recipe is composed before the first is run; the others name a model folder that is not there yet.
    recipes = [
        recipe_of(point, folder, options.num_steps, overrides)
        for point in points
        if point.method == BASE or METHODS[point.method].reuses is None
    ]
    data = prepare(recipes[0].data)
    _claim(folder, options)
    write_training(data, training)
    say(f"data: {data.summary()}")

    def write(show: bool) -> bool:
        """Write the comparison of the seeds that are complete; whether there is one."""
        result = _result(folder, methods, points, options, data)
        if result is not None:
            write_outputs(folder, result, show)
        return result is not None

    failed = run_points(folder, points, program, options.keep_models, after_each=lambda: write(show=False))
    written = write(show=True)
    for point in failed:
        say(f"{point} failed; what it said is in {point.log(folder)}")
    return 1 if failed or not written else 0


def _methods(text: str) -> list[str]:
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise EquipoiseError(f"--methods: unknown {', '.join(unknown)}; possible: {', '.join(METHODS)}")
    if BASELINE not in wanted:
        raise EquipoiseError(f"--methods: {BASELINE} is missing; every method is compared with it")
    missing = [name for name in wanted if METHODS[name].reuses not in (None, *wanted)]
    if missing:
        raise EquipoiseError(
            f"--methods: {missing[0]} starts from {METHODS[missing[0]].reuses}, which is missing"
        )
    return [name for name in METHODS if name in wanted]


def _claim(folder: Path, options: argparse.Namespace) -> None:
    """Write what the folder was made with, or refuse to go on with something else."""
    path = folder / "command.json"
    mine = {
        "pairs": str(options.pairs.expanduser().resolve()),
        "num_steps": options.num_steps,
        "held_out": options.held_out,
        "overrides": options.overrides,
    }
    if not path.exists():
        write_aside(path, json.dumps(mine, indent=1) + "\n")
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))
    if differing:
        raise EquipoiseError(
            f"{folder} holds a comparison with other settings: {', '.join(differing)} differ. Give this one another "
            "folder (--output), or remove that one."
        )


def run_points(
    folder: Path,
    points: Sequence[Point],
    program: Path,
    keep_models: bool,
    after_each: Callable[[], object],
) -> list[Point]:
    """Run every point without a report, each in its own process; returns those that failed. Raises EquipoiseError."""
    waiting = [point for point in points if not point.report(folder).exists()]
    _check_reused(folder, waiting)
    failed: list[Point] = []
    seconds = Seconds(folder / "seconds.json")
    for number, point in enumerate(waiting):
        left = seconds.expected([later.method for later in waiting[number:]])
        place = f"{len(points) - len(waiting) + number + 1} of {len(points)}"
        say(f"{point}: {place}" + (f", about {duration(left)} left" if left is not None else ""))
        reused = point.reused()
        if reused in failed:
            say(f"{point}: left out, because {reused} failed")
            failed.append(point)
            continue
        taken = _run_process(point, folder, program)
        if taken is None:
            failed.append(point)
            say(f"{point}: failed; going on with the others")
            continue
        seconds.add(point.method, taken)
        report = CategoryReport.from_json(point.report(folder))
        say(
            f"{point}: {duration(taken)}, unsafe {report.overall_unsafe_rate.rate or 0:.0%}, "
            f"over-refusal {report.over_refusal.rate or 0:.0%}"
        )
        if not keep_models:
            remove_models(folder, points)
        after_each()
    return failed


def _check_reused(folder: Path, waiting: Sequence[Point]) -> None:
    for point in waiting:
        reused = point.reused()
        if reused and reused.report(folder).exists() and not point.model(folder).exists():
            raise EquipoiseError(
                f"{point} starts from the model of {reused}, which was removed when all that needed it was done. "
                f"Remove {reused.report(folder)} to train it again."
            )


def _run_process(point: Point, folder: Path, program: Path) -> float | None:
    """Seconds that a point took in its own process; None when it left no report."""
    started = time.perf_counter()
    log = point.log(folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    # A leftover model of an interrupted call is the run's to keep or not; the arguments are this call's own.
    command = [sys.executable, str(program), "--point", str(point), *sys.argv[1:]]
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode or not point.report(folder).exists():
        return None
    return time.perf_counter() - started


class Seconds:
    """How long points took, by method, kept on disk for the estimate of a call that goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._taken: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, method: str, seconds: float) -> None:
        """Note how long a point took."""
        self._taken.setdefault(method, []).append(round(seconds, 1))
        write_aside(self._path, json.dumps(self._taken) + "\n")

    def expected(self, methods: Sequence[str]) -> float | None:
        """Seconds that points of `methods` will take, each by the mean of its method, or of all; None at first."""
        everything = [value for values in self._taken.values() for value in values]
        if not everything:
            return None
        means = {method: sum(values) / len(values) for method, values in self._taken.items()}
        return sum(means.get(method, sum(everything) / len(everything)) for method in methods)


def _result(
    folder: Path,
    methods: Sequence[str],
    points: Sequence[Point],
    options: argparse.Namespace,
    data: SafetyData,
) -> dict[str, Any] | None:
    """The comparison over the seeds that every method has; None where there is none yet."""
    seeds = [
        seed
        for seed in range(options.seeds)
        if all(point.report(folder).exists() for point in points if point.seed in (None, seed))
    ]
    if not seeds:
        return None
    base = CategoryReport.from_json(Point(BASE, None).report(folder))
    reports = {BASE: [base]} | {
        method: [CategoryReport.from_json(Point(method, seed).report(folder)) for seed in seeds]
        for method in methods
    }
    settings = {
        "pairs": options.pairs.name,
        "num_safety_pairs": len(data.safety_pairs),
        "num_helpful_pairs": len(data.helpful_pairs),
        "held_out": options.held_out,
        "num_steps": options.num_steps,
        "seeds": seeds,
        "overrides": options.overrides,
        "judge": base.judge.get("name"),
        "judge_is_stand_in": base.judge.get("stand_in"),
    }
    return {"settings": settings, **compare(reports, options.min_prompts)}
