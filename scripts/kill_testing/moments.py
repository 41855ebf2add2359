"""When a run is killed: after so many seconds, or in front of a chosen operation on its files."""

import fnmatch
import json
import os
import random
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OPERATIONS = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "shutil.copyfile",
)


@dataclass(frozen=True)
class Moment:
    """Of one kill; exactly one is set."""

    seconds: float | None = None
    """After the start of the process."""
    operation: int | None = None
    """In front of this one of the operations on the run's files, counted from 1."""
    pattern: str | None = None
    """In front of the first operation that looks like this (`os.rename */checkpoint-2`)."""

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.seconds:.2f} s"
        return f"file operation {self.operation}" if self.operation is not None else f"{self.pattern}"


def drawn(chance: random.Random, seconds: float, num_operations: int) -> Moment:
    """A moment somewhere in a run of that length; one of two in front of a file operation, where crashes do harm."""
    if num_operations and chance.random() < 0.5:
        return Moment(operation=chance.randint(1, num_operations))
    return Moment(seconds=chance.uniform(0.0, seconds))


class FileOperations:
    """An audit hook that counts this process' operations on the files of a folder, and kills it at a moment.

    What writes through C++ or Rust (torch.save, safetensors) is not seen; what is around it is.
    """

    def __init__(self, folder: Path, moment: Moment | None) -> None:
        self._folder, self._moment = str(folder), moment
        self.num = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See `sys.addaudithook`."""
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
                return
        elif event not in _OPERATIONS:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self._folder):
            return
        self.num += 1
        if self._moment is not None and self._is_now(event, os.fspath(path)):
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_now(self, event: str, path: str) -> bool:
        moment = self._moment
        assert moment is not None
        if moment.pattern is not None:
            return fnmatch.fnmatch(f"{event} {path}", moment.pattern)
        return self.num == moment.operation


def where(run_dir: Path, stages: Sequence[str]) -> str:
    """How far a killed run had come, by what lies in its folder."""
    if not (run_dir / "recipe.yaml").exists():
        return "before the folder was claimed"
    finished = [name for name in stages if (run_dir / "stages" / name / "done.json").exists()]
    stage = next((name for name in stages if name not in finished), None)
    found = [f"{stage}, " if stage else "behind the last stage, "]
    last = _last_line(run_dir / "metrics.jsonl")
    if stage is not None and last is not None and last["stage"] == stage:
        found.append(f"step {last['step']} logged")
    elif last is not None:
        found.append(f"{last['stage']} logged")
    else:
        found.append("nothing logged")
    folder = run_dir / "stages" / str(stage)
    for path in sorted((folder / "checkpoints" / ".saving").glob("checkpoint-*")):
        found.append(f", saving {path.name}")
    for path in sorted(folder.glob("step-*")) + sorted(folder.glob(".*.*")):
        found.append(
            f", {path.name if path.name[0] != '.' else re.sub(r'[.][0-9]+', '', path.name[1:])} there"
        )
    return "".join(found)


def _last_line(path: Path) -> dict[str, Any] | None:
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else None
