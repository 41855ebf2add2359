"""A run's folder belongs to one recipe and one launch: claimed by the first command, checked by those that go on."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import gather_object

from equipoise.data.files import write_aside
from equipoise.eval.cache import digest
from equipoise.eval.terminal import say
from equipoise.train.checkpoints import checkpoints
from equipoise.train.locks import locked_folder
from equipoise.train.planning.engine import Engine
from equipoise.train.ranks import from_first
from equipoise.train.recipe import Recipe, RecipeError

RECIPE_FILE = "recipe.yaml"
"""The resolved recipe; with it the folder is claimed."""
LAUNCH_FILE = "launch.json"
"""How the run was launched, with which versions, and what `resume.force` changed."""

PACKAGES = ("equipoise", "torch", "transformers", "trl", "peft", "accelerate", "datasets")

_FREE = frozenset(("tracking", "diagnostics", "profile", "resume", "dry_run", "plan", "output_dir"))
"""Top keys that say nothing about the result."""

_SOUND = frozenset(
    ("evaluation.batch_size", "judge.batch_size", "judge.concurrency", "model.gradient_checkpointing")
)
"""Keys that decide how fast, and in how much memory, the same thing is computed."""

_SOUND_IN_STAGES = frozenset(
    ("save_every", "log_every", "eval_every", "per_device_batch_size", "gradient_accumulation_steps")
)
"""The same in every stage; how many examples a step has is looked at by itself."""

SECONDS_TO_APPEAR = 60.0
"""What one machine writes another may see late: NFS keeps attributes for so long."""
_LEFT_OVER = re.compile(r"\..+\.\d+(\.part)?|\.saving|\.work")
"""What `write_aside`, `save_folder` and `save_checkpoint` write before they rename it, and what an evaluation needs."""


@contextmanager
def claimed(run_dir: Path, recipe: Recipe) -> Iterator[None]:
    """Inside the `with` this run alone works in the folder, which belongs to its recipe. Collective.

    Raises RecipeError, which names everything that differs or the machines that do not share the folder, or
    FolderInUseError, which names the process at work there.
    """
    held = ExitStack()

    def claim() -> str:
        advice = "Wait for it to end, or give this run another name or seed."
        held.enter_context(locked_folder(run_dir, advice))
        if (run_dir / RECIPE_FILE).exists():
            _go_on(run_dir, recipe)
        else:
            _write(run_dir, recipe, [])
        return (run_dir / RECIPE_FILE).read_text(encoding="utf-8")

    with held:
        _check_shared(run_dir, from_first(claim))
        yield


def _check_shared(run_dir: Path, text: str) -> None:
    """Raise RecipeError, on all ranks, where one does not see the recipe that the first has written. Collective."""
    if PartialState().num_processes == 1:
        return
    path = run_dir / RECIPE_FILE
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not (seen := path.exists() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    blind = sorted({host for host in gather_object([None if seen else os.uname().nodename]) if host})
    if blind:
        raise RecipeError(
            f"{run_dir} is not shared: {', '.join(blind)} cannot see what the first process has written there. All "
            "processes of a run read and write one folder; give it output_dir=... on a file system that its machines "
            "share."
        )


def launch() -> dict[str, object]:
    """How many processes train together, and by which engine."""
    engine = Engine.launched()
    return {"num_processes": engine.num_processes, "engine": engine.name}


def versions() -> dict[str, str]:
    """Of the packages that decide what is computed."""
    return {package: version(package) for package in PACKAGES}


def recipe_digest(recipe: Recipe) -> str:
    """Hash of every key that binds a run to its folder."""
    return digest({key: value for key, value in asdict(recipe).items() if key not in _FREE})[:16]


def recipe_digests(run_dir: Path) -> list[str]:
    """Hashes of the recipes that this folder's run has had, its own the last: `resume.force` may have changed it."""
    found: list[str] = _read_launch(run_dir).get("recipes", [])
    return found


def forced(run_dir: Path) -> list[dict[str, Any]]:
    """What `resume.force` has changed in this folder's run so far: key -> before and now, a mapping a time."""
    found: list[dict[str, Any]] = _read_launch(run_dir).get("forced", [])
    return found


def _go_on(run_dir: Path, recipe: Recipe) -> None:
    """Compare with what the folder was made for; tidy up behind an interrupted run."""
    theirs = yaml.safe_load((run_dir / RECIPE_FILE).read_text(encoding="utf-8"))
    before = _read_launch(run_dir)
    was = {key: before[key] for key in launch() if key in before}
    changed = _different(theirs, asdict(recipe)) | _different(was, launch() if was else {})
    against = {key: reason for key in changed if (reason := _against(key, recipe, run_dir, was))}
    against |= _other_steps(theirs, recipe, was)
    if against or (changed and not recipe.resume.force):
        raise RecipeError(_refusal(run_dir, changed, against))
    _tidy(run_dir)
    for package, found in versions().items():
        if (then := before.get("versions", {}).get(package, found)) != found:
            say(
                f"{package} was {then} when this run began and is {found} now: the end may differ in the last bits"
            )
    if changed:
        _force(run_dir, recipe, changed)
    say(f"{run_dir}: going on with what is there")


def _force(run_dir: Path, recipe: Recipe, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Take over what `resume.force` permits."""
    for key, (then, now) in changed.items():
        say(f"resume.force: {key} was {_short(then)} and is {_short(now)}")
        if key.endswith((".num_steps", ".num_epochs")):
            (run_dir / "stages" / key.split(".")[1] / "done.json").unlink(missing_ok=True)
    if any(key.startswith("gate.rules") for key in changed):
        # What passed other rules has not passed these: every state that is still there is decided on anew.
        shutil.rmtree(run_dir / "promoted", ignore_errors=True)
        verdicts = run_dir / "gate.jsonl"
        if verdicts.exists():
            verdicts.replace(run_dir / f"gate-before-{len(forced(run_dir)) + 1}.jsonl")
    _write(run_dir, recipe, [*forced(run_dir), {key: list(values) for key, values in changed.items()}])


def _write(run_dir: Path, recipe: Recipe, forced: list[dict[str, Any]]) -> None:
    # A kill between the two files leaves this recipe's already.
    recipes = [
        *(old for old in recipe_digests(run_dir) if old != recipe_digest(recipe)),
        recipe_digest(recipe),
    ]
    facts = {**launch(), "versions": versions(), "recipes": recipes, "forced": forced}
    write_aside(run_dir / LAUNCH_FILE, json.dumps(facts, indent=1) + "\n")
    text = yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)
    write_aside(run_dir / RECIPE_FILE, text)  # the last: with it the folder is claimed


def _read_launch(run_dir: Path) -> dict[str, Any]:
    path = run_dir / LAUNCH_FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _different(theirs: Any, mine: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (their value, mine); a key that one of them has not is None there."""
    if not (isinstance(theirs, dict) and isinstance(mine, dict)):
        return {} if theirs == mine else {prefix: (theirs, mine)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*theirs, *(key for key in mine if key not in theirs)]:
        path = f"{prefix}.{key}".lstrip(".")
        if path in _FREE:
            continue
        if key in theirs and key in mine:
            found |= _different(theirs[key], mine[key], path)
        else:
            found[path] = (theirs.get(key), mine.get(key))
    return found


def _against(key: str, recipe: Recipe, run_dir: Path, was: Mapping[str, Any]) -> str | None:
    """Why a run cannot go on with another value of `key`; None where `resume.force` may change it."""
    if key in ("num_processes", "engine"):
        sharded = [e for e in (was["engine"], launch()["engine"]) if str(e).startswith(("zero", "fsdp"))]
        return f"checkpoints of {sharded[0]} are written by each process for itself" if sharded else None
    parts = key.split(".")
    if key in _SOUND or parts[0] == "gate":
        return None
    if parts[0] == "stages" and len(parts) == 3 and parts[1] in recipe.stages:
        if parts[2] in _SOUND_IN_STAGES:
            return None
        if parts[2] in ("num_steps", "num_epochs"):
            return _against_other_length(parts[1], recipe, run_dir)
    return "with it this is another run"


def _against_other_length(stage: str, recipe: Recipe, run_dir: Path) -> str | None:
    folder = run_dir / "stages" / stage
    if not (folder / "done.json").exists():
        return None
    names = list(recipe.stages)
    if any((run_dir / "stages" / name).exists() for name in names[names.index(stage) + 1 :]):
        return f"{stage} is finished, and a stage behind it has begun"
    if not checkpoints(folder / "checkpoints"):
        return f"{stage} is finished, and its last checkpoint was not kept (resume.keep_last=true)"
    return None


def _other_steps(theirs: Mapping[str, Any], recipe: Recipe, was: Mapping[str, Any]) -> dict[str, str]:
    """Stages whose optimizer steps would have another number of examples: the order of the data would not fit."""
    found = {}
    for name, stage in asdict(recipe)["stages"].items():
        before = theirs["stages"].get(name, {})
        keys = ("per_device_batch_size", "gradient_accumulation_steps")
        if not all(key in values for key in keys for values in (before, stage)):
            continue
        then = before[keys[0]] * before[keys[1]] * was.get("num_processes", 1)
        now = stage[keys[0]] * stage[keys[1]] * int(str(launch()["num_processes"]))
        if was and then != now:
            found[f"stages.{name}"] = (
                f"a step had {then} examples and would have {now} ({' * '.join(keys)} * processes); keep the product"
            )
    return found


def _refusal(run_dir: Path, changed: Mapping[str, tuple[Any, Any]], against: Mapping[str, str]) -> str:
    lines = [f"{run_dir} holds a run of another recipe or launch. What differs:"]
    for key in [*changed, *(key for key in against if key not in changed)]:
        values = [" -> ".join(map(_short, changed[key]))] if key in changed else []
        reasons = [against[key]] if key in against else []
        lines.append(f"  {key}: {'; '.join(values + reasons)}")
    lines.append(
        "Give this run another name or seed (name=…, seed=…, output_dir=…), or remove the folder."
        if against
        else "With resume.force=true it goes on nevertheless (train/README.md, Resuming); or give it another name."
    )
    return "\n".join(lines)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tidy(run_dir: Path) -> None:
    """Remove what a killed run had half written; nobody else is at work here."""
    for path in [path for path in run_dir.rglob(".*") if _LEFT_OVER.fullmatch(path.name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have lain in a folder that is gone by now
