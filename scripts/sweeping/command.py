"""`scripts/sweep`: the command line, the points, and what comes of them."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from argument_types import positive
from comparison.figures import FIGURES
from comparison.methods import BASE
from rich.table import Table
from sweeping import plots
from sweeping.jobs import GRACE_SECONDS, Job
from sweeping.launchers import LAUNCHERS, cluster_settings, run_jobs, visible_gpus
from sweeping.page import page
from sweeping.points import Point, Sweep, plan
from sweeping.results import Results, collect, facts, html_path, table

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.eval.report.formats import number, number_range, one_line, percent, percent_range
from equipoise.eval.terminal import console, say
from equipoise.train.cli import EXIT_CODE_FILE

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{GRACE_SECONDS - 10:.0f}"}
"""Of a point, where it is not set. torchrun would give ranks that are told to end 30 s to save."""

DESCRIPTION = """\
Run train.py once for every combination of values, in Hydra's grammar, and hold the points against each other: the
Pareto front of helpfulness and the worst category's unsafe rate, its hypervolume, the trade-off against beta / lam.
What is done is kept: the same command runs what is missing, and more values or seeds may be added.

    scripts/sweep recipe=tsdi 'beta=0.05,0.1,0.2' 'lam=1,2,4,10' seed=1,2
    scripts/sweep recipe=sacpo 'lam=range(1,11)' --jobs 4 --gpus-per-point 2
    scripts/sweep recipe=tsdi 'lam=1,2,4' --launch 'accelerate launch --config_file recipes/accelerate/zero3.yaml'
    scripts/sweep recipe=tsdi 'lam=1,2,4' --launcher submitit --cluster recipes/cluster/slurm.yaml --jobs 8
    scripts/sweep recipe=tsdi 'beta=tag(log, interval(0.01, 0.5))' 'lam=choice(1,2,4,10)' seed=1,2 --optuna 20

Points go to <output_dir>/<name>/points/<values>/seed<seed>, a log beside each; sweep.html, sweep.csv and results.json
to <output_dir>/<name>, the recipe's name unless name=... gives another. A point that fails is recorded with the end of
its log, the others go on, and the same command tries it again. Exit codes: 0 every point has ended, 1 some failed,
2 something has to be mended, 130 interrupted (running points save a checkpoint and go on from it).
"""


def argument_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="as train.py takes them, several values where to sweep",
    )
    add("--config-dir", metavar="FOLDER", help="recipes of your own, as train.py takes it")
    add(
        "--launch",
        metavar="COMMAND",
        help="what starts a point, before train.py: 'accelerate launch --config_file ...', 'torchrun ...' or python "
        "(accelerate launch where there is a GPU, else python)",
    )
    add("--launcher", choices=LAUNCHERS, default="local", help="who runs the points (local)")
    add("--jobs", type=positive, default=1, metavar="N", help="points at a time (1)")
    add(
        "--gpus-per-point",
        type=int,
        default=0,
        metavar="K",
        help="local: GPUs for each point alone (0: all see all)",
    )
    add("--cluster", type=Path, metavar="FILE", help="submitit: its settings, as recipes/cluster/slurm.yaml")
    add("--min-prompts", type=positive, default=8, help="a category with fewer can't be the worst (8)")
    add("--optuna", type=positive, metavar="NUM_TRIALS", help="search so many settings instead of a grid")
    add("--sampler", choices=("tpe", "nsga2"), default="tpe", help="optuna: who proposes settings (tpe)")
    add(
        "--report-only",
        action="store_true",
        help="run nothing, write the tables and the report of what is there",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Run what is missing and write the report; returns 1 when a point failed. Raises EquipoiseError."""
    if options.optuna:
        from sweeping.search import search  # an extra

        sweep = search(options)
    else:
        sweep = plan(options.overrides, options.config_dir)
        with sweep.claimed(to_run=not options.report_only):
            if not options.report_only:
                run_points(sweep, options)
    results = collect(sweep, options.min_prompts)
    write_outputs(results, show=True)
    return 1 if results.missing else 0


def run_points(sweep: Sweep, options: argparse.Namespace, whole: Sweep | None = None) -> None:
    """Run every point that is not done.

    After each the report is written anew, for those who watch: of `whole`, where the points are only a part of it.
    """
    waiting = [point for point in sweep.points if not point.done]
    num_kept = len(sweep.points) - len(waiting)
    say(f"{len(sweep.points)} points in {sweep.folder}" + (f", {num_kept} done before" if num_kept else ""))
    if not waiting:
        return
    by_name = {str(point): point for point in waiting}
    num_ended = 0

    def told(name: str, code: int) -> None:
        nonlocal num_ended
        num_ended += 1
        say(f"{name}: {describe(by_name[name], code)} ({num_ended} of {len(waiting)})")
        try:
            write_outputs(collect(whole or sweep, options.min_prompts), show=False)
        except (
            EquipoiseError
        ) as error:  # the points that are running must not die of it; the last report raises it
            say(f"no report of the sweep: {error}")

    command = launch_command(options.launch)
    run_jobs(
        [job_of(point, command) for point in waiting],
        launcher=options.launcher,
        num_jobs=options.jobs,
        gpus_per_point=options.gpus_per_point,
        cluster=cluster_settings(options.cluster) if options.cluster else None,
        folder=sweep.folder,
        told=told,
    )


def describe(point: Point, code: int) -> str:
    """What became of a point, in a few words."""
    if not point.done:
        return f"failed with exit code {code}; its log is {point.log}"
    summary = json.loads((point.folder / "summary.json").read_text(encoding="utf-8"))
    return f"done, gate says {summary['verdict']}"


def launch_command(launch: str | None) -> list[str]:
    """What starts train.py; programs of this environment are taken before others of their name."""
    if launch is None:
        launch = "accelerate launch --quiet" if visible_gpus() else "python"
    program, *arguments = shlex.split(launch)
    if program in ("python", "python3"):
        return [sys.executable, *arguments, str(ROOT / "train.py")]
    beside = Path(sys.executable).parent / program
    return [str(beside) if beside.exists() else program, *arguments, str(ROOT / "train.py")]


def job_of(point: Point, command: Sequence[str]) -> Job:
    """The point as a process."""
    return Job(
        name=str(point),
        command=[*command, *point.arguments],
        log=str(point.log),
        failure=str(point.failure),
        result=str(point.folder / "summary.json"),
        exit_code_file=str(point.folder.with_name(f"{point.folder.name}.exit_code")),
        exit_code_variable=EXIT_CODE_FILE,
        environment={name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()},
    )


def write_outputs(results: Results, show: bool) -> None:
    """Write sweep.csv, results.json and sweep.html; `show`: print the table of settings and where the report is."""
    folder = results.sweep.folder
    write_aside(folder / "sweep.csv", table(results))
    write_aside(folder / "results.json", json.dumps(facts(results), indent=1) + "\n")
    write_aside(html_path(results.sweep), page(results, f"Sweep of {folder.name}"))
    if not show:
        return
    if results.drawn is not None:
        console.print(_terminal_table(results))
        estimate, low, high = results.hypervolume
        say(f"hypervolume: {number(estimate)} {number_range(low, high)} nats x rate")
    else:
        say("no setting is complete yet")
    for point in results.missing:
        failure = results.failures.get(point)
        why = (
            "not run"
            if failure is None
            else f"failed with exit code {failure['exit_code']}, log: {point.log}"
        )
        say(f"{point}: {why}")
    say(f"report: {html_path(results.sweep)}")


def _terminal_table(results: Results) -> Table:
    titles = plots.TITLES | {"gap": "worst - best"}
    shown = Table(
        "setting",
        "front",
        "passed",
        *(titles[figure] for figure in FIGURES),
        title="settings, 95 % intervals",
    )
    for name in (BASE, *(setting.name for setting in results.settings)):
        cells = []
        for figure in FIGURES:
            value = results.figure(name, figure)
            if figure == "helpfulness":
                cells.append(f"{number(value['estimate'])} {number_range(value['low'], value['high'])}")
            else:
                cells.append(f"{percent(value['estimate'])} {percent_range(value['low'], value['high'])}")
        passed = next((setting.passed for setting in results.settings if setting.name == name), None)
        shown.add_row(
            one_line(name),
            "yes" if results.front.get(name) else "",
            f"{passed[0]} of {passed[1]}" if passed else "",
            *cells,
        )
    return shown
