"""metrics.jsonl: every logged value once, in the order of a run that nobody interrupted."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from equipoise.data.files import drop_torn_line, full_disk_named, write_aside

END = "end"
"""The "stage" of the line that says how a run ended."""


class MetricsFile:
    """Lines of JSON, each written through at once; what an interrupted run wrote is gone on from.

    A resumed run does again what it may have logged already: `append` leaves out what is there, `rewind` cuts off what
    comes behind the step that it goes on from.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        drop_torn_line(path)
        lines = _lines(path)
        # How an earlier attempt ended is not how the run ends.
        self._keep([line for line in lines if json.loads(line).get("stage") != END], len(lines))

    def append(self, values: Mapping[str, Any]) -> bool:
        """Write `values` (finite, of JSON) with the time; False where they are there already. Raises DiskFullError."""
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        if text in self._written:
            return False
        stamped = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}
        line = (json.dumps(stamped, ensure_ascii=False) + "\n").encode()
        start = self._file.tell()
        try:
            with full_disk_named(self.path):
                while line:  # a full disk takes a part and says nothing until the next try
                    line = line[self._file.write(line) :]
        except BaseException:
            self._file.truncate(start)
            raise
        self._written.add(text)
        return True

    def rewind(self, stage: str, step: int) -> None:
        """Forget the first line of `stage` behind `step` and all that follow it: they are about to be logged again."""
        lines = _lines(self.path)
        num_kept = next((i for i, line in enumerate(lines) if _behind(line, stage, step)), len(lines))
        self.close()
        self._keep(lines[:num_kept], len(lines))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _keep(self, lines: list[str], of: int) -> None:
        if len(lines) < of:
            write_aside(self.path, "".join(lines))
        self._written = {_without_time(line) for line in lines}
        self._file = self.path.open("ab", buffering=0)


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(
        encoding="utf-8", newline="\n"
    ) as file:  # a text may hold other separators, U+2028 among them
        return list(file)


def _behind(line: str, stage: str, step: int) -> bool:
    values = json.loads(line)
    return values.get("stage") == stage and values.get("step", 0) > step


def _without_time(line: str) -> str:
    values = {name: value for name, value in json.loads(line).items() if name != "time"}
    return json.dumps(values, ensure_ascii=False)
