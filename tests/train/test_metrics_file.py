import json
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.errors import DiskFullError
from equipoise.train.metrics_file import END, MetricsFile


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert all(line.pop("time") for line in found)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def logged(path: Path, *steps: tuple[str, int]) -> MetricsFile:
    file = MetricsFile(path)
    for stage, step in steps:
        file.append({"stage": stage, "step": step, "loss": step / 4})
    return file


def test_what_an_interrupted_run_logged_is_not_logged_again(path: Path) -> None:
    logged(path, ("base-0", 0), ("safe", 1)).close()
    whole = path.read_bytes()
    again = logged(path, ("base-0", 0), ("safe", 1))
    assert path.read_bytes() == whole
    assert again.append({"stage": "safe", "step": 1, "loss": 0.5})  # another value is another line
    again.close()


def test_rewinding_keeps_the_order_of_an_uninterrupted_run(path: Path) -> None:
    """The evaluation in the middle of a stage goes, too: it is logged again behind the steps before it."""
    order = (("base-0", 0), ("safe", 1), ("safe", 2), ("safe", 3), ("safe-3", 0), ("safe", 4))
    logged(path, *order).close()
    file = MetricsFile(path)
    file.rewind("safe", 1)
    assert [(line["stage"], line["step"]) for line in lines(path)] == [("base-0", 0), ("safe", 1)]
    file.close()
    logged(path, *order).close()
    assert [(line["stage"], line["step"]) for line in lines(path)] == list(order)


def test_rewinding_to_what_is_there_changes_nothing(path: Path) -> None:
    """Every second step is logged: behind a checkpoint of step 2 comes the evaluation of step 3, then step 4."""
    file = logged(path, ("safe", 2), ("safe-3", 0))
    before = path.read_bytes()
    file.rewind("safe", 2)
    assert path.read_bytes() == before
    file.rewind("other", 0)
    assert path.read_bytes() == before
    file.close()


def test_torn_and_last_lines_of_earlier_attempts_go(path: Path) -> None:
    file = logged(path, ("safe", 1))
    file.append({"stage": END, "exit_code": 75})
    file.close()
    with path.open("a") as torn:
        torn.write('{"stage": "safe", "st')
    file = logged(path, ("safe", 2))
    file.append({"stage": END, "exit_code": 0})
    file.close()
    assert [line.get("step", line.get("exit_code")) for line in lines(path)] == [1, 2, 0]


def test_a_line_ends_at_a_line_feed_and_nowhere_else(path: Path) -> None:
    values = {"stage": "safe", "step": 1, "note": "one\u2028two\x0bthree\x85four"}
    first = MetricsFile(path)
    first.append(values)
    first.close()
    again = MetricsFile(path)
    assert not again.append(values)
    again.rewind("safe", 0)
    again.close()
    assert path.read_bytes() == b""


def test_a_full_disk_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes the first bytes of a line and refuses the rest."""
    file = logged(path, ("safe", 1))
    real = file._file

    class Full:
        tell, truncate, close = real.tell, real.truncate, real.close
        taken = False

        def write(self, line: bytes) -> int:
            if self.taken:
                raise OSError(28, "No space left on device")
            self.taken = True
            return real.write(line[:10])

    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(
        DiskFullError, match=r"metrics.jsonl could not be written: no space left \(.* MiB are free"
    ):
        file.append({"stage": "safe", "step": 2})
    file.close()
    assert [line["step"] for line in lines(path)] == [1]
