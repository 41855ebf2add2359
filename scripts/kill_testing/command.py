"""Kill runs at random moments, run the same command again, and compare what is left with an uninterrupted run."""

import argparse
import gc
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from argument_types import positive
from kill_testing.attempts import Attempt, cold, forked
from kill_testing.identical import differences, num_files
from kill_testing.material import write_judge, write_model
from kill_testing.moments import Moment, drawn, where

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.train.cli import compose
from equipoise.train.locks import locked_folder

RECIPES = ("terms", "kto", "safe_rlhf", "grpo")
"""recipe/kill_<name>.yaml beside this file; one kill after the other takes the next one."""

MOST_KILLS = 4
"""Of one run; then it is left alone."""


class KillTestError(EquipoiseError):
    """The test itself cannot go on."""


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

    exit_code: int
    seconds: float
    """Of a forked process."""
    cold_seconds: float
    """Of a cold one; 0: none was started."""
    num_operations: int
    num_files: int


@dataclass
class Killed:
    """One run that was killed, maybe several times, and ended."""

    number: int
    recipe: str
    process: str
    """forked | cold."""
    kills: list[str] = field(default_factory=list)
    """When, and where that was."""
    num_attempts: int = 0
    differences: list[str] = field(default_factory=list)


def argument_parser() -> argparse.ArgumentParser:
    """Options; what is left goes to every recipe."""
    parser = argparse.ArgumentParser(prog="kill_test", description=__doc__)
    parser.add_argument("--kills", type=positive, default=50, help="runs that are killed (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="one of these; may be given again")
    parser.add_argument(
        "--cold-every", type=int, default=5, help="so many kills have one in a cold process; 0: none"
    )
    parser.add_argument(
        "--at",
        action="append",
        metavar="PATTERN",
        help="kill in front of the first such file operation (`os.rename */checkpoint-2`), a run each, "
        "instead of at random",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/kill_test"), help="folder (default %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=None, help="begin no run after these; the same command goes on"
    )
    parser.add_argument("overrides", nargs="*", help="keys for every recipe, as in stages.safe.num_steps=20")
    return parser


def run(options: argparse.Namespace) -> int:
    """Kill, resume and compare; 0 where every end is identical. What an earlier call did is kept.

    Raises FolderInUseError and KillTestError.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run that it is at ends with it
    torch.set_num_threads(1)  # before anything is computed: a pool of threads would not survive a fork
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    gc.freeze()  # what is imported: a fork that collects garbage would walk through it, and copy it
    work = options.work.resolve()
    with locked_folder(work, "Wait for it to end, or give another --work."):
        return _run(options, KillTest(work, options.overrides))


def _run(options: argparse.Namespace, test: "KillTest") -> int:
    """What `run` does in a folder that is this test's alone."""
    work = test.work
    test.claim({"seed": options.seed, "overrides": options.overrides, "cold_every": options.cold_every})
    os.environ["EQUIPOISE_CACHE"] = str(work / "cache")
    recipes = options.recipe or RECIPES
    plan = options.at or [None] * options.kills
    done = test.done()
    deadline = time.monotonic() + 60 * options.minutes if options.minutes is not None else None
    for number, pattern in enumerate(plan, start=1):
        if number in done:
            continue
        if deadline is not None and time.monotonic() > deadline:
            print(f"kill_test: {len(done)} of {len(plan)} done; the same command goes on.")
            return 0
        recipe = recipes[(number - 1) % len(recipes)]
        is_cold = pattern is None and options.cold_every > 0 and number % options.cold_every == 0
        reference = test.reference(recipe, with_cold=options.cold_every > 0)
        chance = random.Random(f"{options.seed}/{number}")
        killed = test.kill(number, recipe, reference, is_cold, chance, pattern)
        done[number] = killed
        print(row(killed, reference), flush=True)
    write_aside(work / "kills.md", table(list(done.values()), {r: test.reference(r, False) for r in recipes}))
    num_same = sum(not killed.differences for killed in done.values())
    print(f"kill_test: {num_same} of {len(done)} ends are identical; table: {work / 'kills.md'}")
    return 0 if num_same == len(done) else 1


class KillTest:
    """The work folder: `outputs/` in which every run works, `reference/<recipe>`, `kills.jsonl`, logs."""

    def __init__(self, work: Path, overrides: Sequence[str]) -> None:
        self.work, self.overrides = work, list(overrides)

    def claim(self, options: Mapping[str, Any]) -> None:
        """Make the folder, or go on with the one that was made for the same options."""
        path = self.work / "options.json"
        if path.exists() and json.loads(path.read_text()) != options:
            raise KillTestError(
                f"{self.work} holds a test with {path.read_text().strip()}; give another --work."
            )
        if not path.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            write_model(self.work / "model")
            write_judge(self.work / "judge")
            write_aside(path, json.dumps(options) + "\n")

    def done(self) -> dict[int, Killed]:
        """What earlier calls did, by number."""
        path = self.work / "kills.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {killed.number: killed for killed in (Killed(**json.loads(line)) for line in lines)}

    def reference(self, recipe: str, with_cold: bool) -> Reference:
        """The uninterrupted run; `with_cold`: compared with that of a cold process."""
        path = self.work / "reference" / f"{recipe}.json"
        if path.exists():
            return Reference(**json.loads(path.read_text()))
        kept = self.work / "reference" / recipe
        shutil.rmtree(kept, ignore_errors=True)
        self._fresh()
        # First of all the cache of reference log-probabilities is filled: the runs after it find them.
        first = self._attempt(recipe, False, None)
        self._expect_end(recipe, first)
        kept.parent.mkdir(parents=True, exist_ok=True)
        self._run_dir(recipe).rename(kept)
        second = self._attempt(recipe, with_cold, None)
        self._expect_end(recipe, second)
        if found := self._differences(recipe, with_cold):
            raise KillTestError(f"{recipe}: two uninterrupted runs differ already: {'; '.join(found[:5])}")
        reference = Reference(
            first.exit_code,
            first.seconds,
            second.seconds if with_cold else 0.0,
            first.num_operations,
            num_files(kept),
        )
        write_aside(path, json.dumps(asdict(reference)) + "\n")
        return reference

    def kill(
        self,
        number: int,
        recipe: str,
        reference: Reference,
        is_cold: bool,
        chance: random.Random,
        pattern: str | None,
    ) -> Killed:
        """Kill a run (and, one time in three, what resumes it), run the command to its end, and compare."""
        self._fresh()
        killed = Killed(number, recipe, "cold" if is_cold else "forked")
        stages = self._stages(recipe)
        moment = self._moment(reference, is_cold, chance) if pattern is None else Moment(pattern=pattern)
        while True:
            attempt = self._attempt(recipe, is_cold, moment)
            killed.num_attempts += 1
            if not attempt.killed:
                if killed.kills or pattern is not None:
                    break
                self._fresh()  # it had ended before its moment came: another one
                killed.num_attempts = 0
                moment = self._moment(reference, is_cold, chance)
                continue
            killed.kills.append(f"{moment}: {where(self._run_dir(recipe), stages)}")
            again = pattern is None and len(killed.kills) < MOST_KILLS and chance.random() < 1 / 3
            moment = self._moment(reference, is_cold, chance) if again else None
        if attempt.exit_code != reference.exit_code:
            killed.differences.append(
                f"exit code {attempt.exit_code}, expected {reference.exit_code} ({self._log(recipe)})"
            )
        killed.differences += self._differences(recipe, is_cold)
        if killed.differences:  # the evidence
            kept = self.work / "different" / str(number)
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self._run_dir(recipe), kept)
        with (self.work / "kills.jsonl").open("a") as file:
            file.write(json.dumps(asdict(killed)) + "\n")
        return killed

    def _differences(self, recipe: str, is_cold: bool) -> list[str]:
        found = differences(self.work / "reference" / recipe, self._run_dir(recipe))
        # A cold process fills its HTML reports and writes them in markdown, too.
        return [line for line in found if not (is_cold and re.match(r"[^ ]*report[.](html|md)[: ]", line))]

    @staticmethod
    def _moment(reference: Reference, is_cold: bool, chance: random.Random) -> Moment:
        if is_cold:
            return drawn(chance, reference.cold_seconds, 0)
        return drawn(chance, reference.seconds, reference.num_operations)

    def _attempt(self, recipe: str, is_cold: bool, moment: Moment | None) -> Attempt:
        arguments = self._arguments(recipe)
        if is_cold:
            return cold(arguments, self._log(recipe), moment)
        return forked(arguments, self._run_dir(recipe), self._log(recipe), moment)

    def _arguments(self, recipe: str) -> list[str]:
        return [
            *(
                "--config-dir",
                str(Path(__file__).parent),
                f"recipe=kill_{recipe}",
                f"output_dir={self.work / 'outputs'}",
            ),
            *("model=hub", f"model.id={self.work / 'model'}", "model.dtype=float32"),
            *("judge=beaver", f"judge.model={self.work / 'judge'}", "judge.dtype=float32", *self.overrides),
        ]

    def _stages(self, recipe: str) -> list[str]:
        cfg = compose(self._arguments(recipe))
        assert cfg is not None
        return list(cfg.stages)

    def _expect_end(self, recipe: str, attempt: Attempt) -> None:
        if attempt.exit_code not in (0, 3, 4):
            raise KillTestError(f"{recipe} ends with {attempt.exit_code}; see {self._log(recipe)}")

    def _fresh(self) -> None:
        shutil.rmtree(self.work / "outputs", ignore_errors=True)

    def _run_dir(self, recipe: str) -> Path:
        return self.work / "outputs" / f"kill_{recipe}" / "seed0"

    def _log(self, recipe: str) -> Path:
        return self.work / f"{recipe}.log"


def row(killed: Killed, reference: Reference) -> str:
    """One line of the table."""
    end = f"identical ({reference.num_files} files)" if not killed.differences else killed.differences[0]
    kills = "<br>".join(killed.kills) or "none: it had ended"
    return (
        f"| {killed.number} | {killed.recipe} | {killed.process} | {kills} | {killed.num_attempts} | {end} |"
    )


def table(killed: Sequence[Killed], references: Mapping[str, Reference]) -> str:
    """All kills, as markdown."""
    head = ["| no. | recipe | process | killed | attempts | end |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(row(each, references[each.recipe]) for each in killed)]) + "\n"
