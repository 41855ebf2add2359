"""Checkpoints of a stage: written aside, hashed and renamed; the newest one that is whole is found again.

A checkpoint is a folder `checkpoint-<step>`. Its `manifest.json`, written last, has every file's size and hash and what
the checkpoint belongs to. With several ranks all of them write into one folder, on a file system that they share, and
nothing is renamed before all have written; each rank reads back its share of the files.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from equipoise.data.errors import DiskFullError
from equipoise.data.files import full_disk_named, write_aside

STATE_FILE = "category_state.json"
"""What a stage has to remember beside weights and optimizer."""
MANIFEST = "manifest.json"
KEPT = 2
"""Checkpoints; older ones are removed when a new one is in place."""

_ASIDE = ".saving"
_READ_AT_A_TIME = 2**24


def save_checkpoint(
    folder: Path, step: int, belongs_to: Mapping[str, object], write: Callable[[Path], None]
) -> None:
    """Save `checkpoint-<step>` in `folder`, whole or not at all. Collective.

    write: puts the files of a rank into the folder that it is given; called on every rank. belongs_to: see
    `training.belongs_to`. Raises DiskFullError, on all ranks: the checkpoints before are then as they were.
    """
    state = PartialState()
    target = folder / f"checkpoint-{step}"
    aside = folder / _ASIDE / target.name
    try:
        _together(target, lambda: _make_empty(aside) if state.is_main_process else None)
        _together(target, lambda: write(aside))
        hashed = gather_object([{name: _described(aside / name) for name in _share(_files(aside))}])
        files = {name: facts for share in hashed for name, facts in share.items()}
        manifest = {"step": step, **belongs_to, "files": dict(sorted(files.items()))}
        text = json.dumps(manifest, indent=1) + "\n"
        _together(target, lambda: write_aside(aside / MANIFEST, text) if state.is_main_process else None)
    except BaseException as error:
        if state.is_main_process:
            shutil.rmtree(aside.parent, ignore_errors=True)
        if not isinstance(error, DiskFullError):
            raise
        raise DiskFullError(f"{error} {_said_of_the_last(folder)}") from error
    if state.is_main_process:
        shutil.rmtree(target, ignore_errors=True)  # one that was damaged, and passed over
        aside.replace(target)
        shutil.rmtree(aside.parent)
        # What lies behind this step was passed over: the run has gone another way.
        before = [path for path in checkpoints(folder) if step_of(path) <= step][:KEPT]
        for path in checkpoints(folder):
            if path not in before:
                shutil.rmtree(path)
    state.wait_for_everyone()


def find_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, the same on all ranks; others are named and passed over. Collective."""
    found: list[Path] = broadcast_object_list([checkpoints(folder)])[0]
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        say(f"{checkpoint}: {damage}; passed over")
    if found:
        say(f"no checkpoint in {folder} is whole ({len(found)} are damaged): THE STAGE STARTS ANEW")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every file is what was written. Collective."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = next(
            (text for name in _share(files) if (text := _damage(checkpoint / name, files[name]))), None
        )
    except FileNotFoundError:
        found = f"it has no {MANIFEST} (interrupted while it was written or removed)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found = f"its {MANIFEST} cannot be read"
    return next((text for text in gather_object([found]) if text), None)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint belongs to, and its `files`: name -> size, xxh3_128."""
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first."""
    return sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint stands behind."""
    return int(checkpoint.name.split("-")[1])


def remove_checkpoints(folder: Path, *, keep_last: bool) -> None:
    """Remove the checkpoints of a finished stage, or all but the last."""
    if not keep_last:
        shutil.rmtree(folder, ignore_errors=True)
    for path in checkpoints(folder)[1:]:
        shutil.rmtree(path)


def _together(target: Path, action: Callable[[], None]) -> None:
    """Do it on every rank; where the disk of one is full all raise DiskFullError."""
    problem = None
    try:
        with full_disk_named(target):
            action()
    except DiskFullError as error:
        problem = str(error)
    if found := next((text for text in gather_object([problem]) if text), None):
        raise DiskFullError(found)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _share(files: Any) -> list[str]:
    """This rank's part of the files, every so many."""
    state = PartialState()
    return sorted(files)[state.process_index :: state.num_processes]


def _described(path: Path) -> dict[str, object]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_AT_A_TIME):
            digest.update(block)
    return {"size": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _damage(path: Path, written: Mapping[str, object]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != written["size"]:
        return f"{path.name} has {size} bytes, {written['size']} were written"
    return None if _described(path) == written else f"{path.name} is not what was written (its hash differs)"


def _said_of_the_last(folder: Path) -> str:
    last = next(iter(checkpoints(folder)), None)
    return "There is no earlier checkpoint." if last is None else f"The last one, {last}, is as it was."
