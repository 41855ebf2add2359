"""Whether two runs left the same: every file, but for what is a time, a speed or a peak of memory."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import safe_globals

MEASURED = frozenset(
    ("time", "seconds", "phase_seconds", "num_seconds", "peak_memory_bytes", "phase_memory_bytes")
)
"""Keys of JSON that say how long something took, or how much memory."""
OF_THE_PROCESS = frozenset(("reference_cache_hit",))
"""Whether this process found what an earlier one had computed."""
SETS = frozenset(("target_modules",))
"""PEFT writes a set in the order in which Python happened to have it."""

UNREAD = frozenset((".lock", "speed.jsonl", "training_args.bin"))
"""The process that worked in the folder; how fast it was; a pickle of code (everything in it is in the recipe)."""

_SECONDS = re.compile(rb"<dt>seconds</dt><dd>[^<]*</dd>")
"""In the HTML of a report."""


def differences(expected: Path, found: Path) -> list[str]:
    """What of `found` is not as in `expected`, a line a file, in the order of their names; nothing: identical."""
    theirs, ours = _files(expected), _files(found)
    lines = [f"{name} is missing" for name in sorted(theirs - ours)]
    lines += [f"{name} should not be there" for name in sorted(ours - theirs)]
    for name in sorted(theirs & ours):
        if difference := _difference(expected / name, found / name):
            lines.append(f"{name}: {difference}")
    return lines


def num_files(folder: Path) -> int:
    """How many files are compared."""
    return len(_files(folder))


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in UNREAD
    }


def _difference(expected: Path, found: Path) -> str | None:
    if expected.suffix in (".pt", ".pth"):  # equal pickles need not be equal bytes
        return _unequal(_loaded(expected), _loaded(found))
    if expected.suffix == ".json":
        return _unequal(_json(expected.read_text()), _json(found.read_text()))
    if expected.suffix == ".jsonl":
        theirs, ours = (
            [_json(line) for line in path.read_text().split("\n")[:-1]] for path in (expected, found)
        )
        return _unequal(theirs, ours)
    theirs, ours = (_SECONDS.sub(b"", path.read_bytes()) for path in (expected, found))
    return None if theirs == ours else "other bytes"


def _loaded(path: Path) -> Any:
    with safe_globals():  # NumPy's random state
        return torch.load(path, weights_only=True)


def _json(text: str) -> Any:
    return _without_measured(json.loads(text))


def _without_measured(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_measured(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if key not in MEASURED | OF_THE_PROCESS}
    for key in SETS & kept.keys():
        kept[key] = sorted(kept[key]) if isinstance(kept[key], list) else kept[key]
    if isinstance(files := kept.get("files"), dict):  # a manifest's: pickles are compared by what is in them
        kept["files"] = {name: None if _has_no_hash(name) else facts for name, facts in files.items()}
    return {key: _without_measured(item) for key, item in kept.items()}


def _has_no_hash(name: str) -> bool:
    return name.endswith((".pt", ".pth", ".bin", "adapter_config.json"))


def _unequal(expected: Any, found: Any, path: str = "") -> str | None:
    """The first place where they differ."""
    at = path or "the whole"
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        same = (
            expected.dtype == found.dtype and expected.shape == found.shape and torch.equal(expected, found)
        )
        return None if same else f"{at} is another tensor"
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        if expected.keys() != found.keys():
            return f"{at} has other keys: {sorted(map(str, expected.keys() ^ found.keys()))[:3]}"
        items: Any = [(key, expected[key], found[key]) for key in expected]
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        if len(expected) != len(found):
            return f"{at} has {len(found)} items, expected {len(expected)}"
        items = [(i, *pair) for i, pair in enumerate(zip(expected, found, strict=True))]
    else:
        same = type(expected) is type(found) and bool(_equal(expected, found))
        return None if same else f"{at} is {str(found)[:40]!r}, expected {str(expected)[:40]!r}"
    return next((line for key, a, b in items if (line := _unequal(a, b, f"{path}/{key}"))), None)


def _equal(expected: Any, found: Any) -> Any:
    return (expected == found).all() if hasattr(expected, "dtype") else expected == found
