"""The arguments of `scripts/matrix`, and the table that comes out."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matrixing.cells import ENGINES, ONE, TRAINERS
from matrixing.comparing import TOLERANCE, compare, is_judged
from matrixing.running import Result, prepare, run_cells

from equipoise.train.locks import locked_folder

Cell = tuple[str, str]
_PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "trl", "peft")


def argument_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train each trainer under each engine in two real processes on the CPU, on a random model of "
        "30,000 parameters, and compare with one process at the same global batch: metrics, counts, category state, "
        f"multipliers, verdicts and weights, within {TOLERANCE:g} in fp32, and a run that SIGTERM to one rank has "
        "ended and the same command has continued. Exit code 1 where a cell differs or failed.",
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        metavar="TRAINER:ENGINE",
        help=f"which cells; either may be `all`. Trainers: {', '.join(TRAINERS)}; engines: {', '.join(ENGINES)}",
        default=["all:all"],
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="engines at a time (default: 1)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="in bfloat16 ranks, verdicts and resumed runs are judged; differences from one process are shown",
    )
    parser.add_argument(
        "--limit", type=float, default=600.0, metavar="SECONDS", help="of a cell (default: 600)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="keeps what is done: the same command goes on"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every cell there")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run what is missing, print the table; returns the exit code. Raises FolderInUseError."""
    cells = chosen(options.cells)
    with tempfile.TemporaryDirectory() as own:
        out = (options.out or Path(own)).resolve()
        folder = out / options.dtype
        with locked_folder(out, "Wait for it to end, or give another --out."):
            prepare(folder)
            with_one = list(dict.fromkeys([*((trainer, ONE) for trainer, _ in cells), *cells]))
            results = run_all(folder, with_one, options)
            found = {cell: judged(folder, cell, results, options.dtype) for cell in cells}
    print(table(found, options.dtype))
    if options.json:
        figures = {f"{trainer}:{engine}": figure for (trainer, engine), figure in found.items()}
        versions = {package: version(package) for package in _PACKAGES}
        text = json.dumps(
            {"versions": versions, "dtype": options.dtype, "tolerance": TOLERANCE, "cells": figures}, indent=1
        )
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(figure["passed"] for figure in found.values()) else 1


def chosen(names: Sequence[str]) -> list[Cell]:
    """The cells that `TRAINER:ENGINE` names, in the order of the table; raises SystemExit for a name that is none."""
    cells = set()
    for name in names:
        trainer, _, engine = name.partition(":")
        if (trainer not in TRAINERS and trainer != "all") or (engine not in ENGINES and engine != "all"):
            raise SystemExit(
                f"--cells: found {name!r}, expected TRAINER:ENGINE with {', '.join(TRAINERS)} or all, and "
                f"{', '.join(ENGINES)} or all"
            )
        cells |= {(t, e) for t in TRAINERS for e in ENGINES if trainer in (t, "all") and engine in (e, "all")}
    return [(t, e) for t in TRAINERS for e in ENGINES if (t, e) in cells]


def run_all(folder: Path, cells: Iterable[Cell], options: argparse.Namespace) -> dict[Cell, Result]:
    """Run the cells, `options.jobs` engines at a time; a cell that fails is recorded, and the others go on."""
    results: dict[Cell, Result] = {}

    def of_engine(engine: str, trainers: list[str]) -> None:
        def told(trainer: str, result: Result) -> None:
            said = f"{trainer}:{engine}: {result['error'] or 'ran'}, {result['seconds']:g} s"
            print(said, file=sys.stderr, flush=True)

        found = run_cells(folder, engine, trainers, options.dtype, options.limit, told)
        results.update({(trainer, engine): result for trainer, result in found.items()})

    wanted = {engine: [t for t in TRAINERS if (t, engine) in set(cells)] for engine in ENGINES}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda item: of_engine(*item), [item for item in wanted.items() if item[1]]))
    return results


def judged(folder: Path, cell: Cell, results: Mapping[Cell, Mapping[str, Any]], dtype: str) -> dict[str, Any]:
    """A cell's figures: how it ran, and where it ran, how it compares."""
    result = dict(results[cell])
    if result["error"] or results[cell[0], ONE]["error"]:
        return result | {"passed": False, "error": result["error"] or f"{cell[0]}:{ONE} failed"}
    return result | compare(folder, cell, dtype)


def table(found: Mapping[Cell, Mapping[str, Any]], dtype: str) -> str:
    """A row a trainer, a column an engine, in Markdown: the largest difference of the metrics, or what went wrong."""
    engines = [engine for engine in ENGINES if any(cell[1] == engine for cell in found)]
    lines = [f"| | {' | '.join(engines)} |", f"|---{'|---' * len(engines)}|"]
    notes: list[str] = []
    for trainer in TRAINERS:
        if any(cell[0] == trainer for cell in found):
            shown = [_shown(trainer, engine, found, dtype, notes) for engine in engines]
            lines.append(f"| {trainer} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, start=1))])


def _shown(
    trainer: str, engine: str, found: Mapping[Cell, Mapping[str, Any]], dtype: str, notes: list[str]
) -> str:
    figures = found.get((trainer, engine))
    if figures is None:
        return ""
    if figures["passed"]:
        return (
            f"{figures['metrics_max_difference']:.0e}, {figures['steps']} lines" if engine != ONE else "ran"
        )
    what = figures.get("error")
    if what is None:
        wrong = {
            name: value
            for name, value in figures.items()
            if (is_judged(name, dtype) and value > TOLERANCE)
            or (name == "counts_differ" and value and dtype == "float32")
            or (name == "ranks_differ" and value)
            or (name in ("same_verdict", "read_as_sharded") and not value)
        }
        what = "; ".join(
            f"{name}: {value[:3] if isinstance(value, list) else value}" for name, value in wrong.items()
        )
    notes.append(f"{trainer} under {engine}: {what}")
    return f"failed ({len(notes)})" if figures["error"] else f"differs ({len(notes)})"
