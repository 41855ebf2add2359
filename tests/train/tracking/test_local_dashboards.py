"""TensorBoard and trackio themselves: what a run tells them, read back; in a process that may ask no network."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equipoise.eval.report.content import ReportContent
from equipoise.train.recipe import TrackingConfig
from equipoise.train.tracking import Tracker

pytestmark = pytest.mark.slow

TRACKERS = TrackingConfig(trackers=["tensorboard", "trackio"], group="a sweep")


def tell(run_dir: Path, content: ReportContent, steps: range) -> None:
    tracker = Tracker(run_dir, TRACKERS, {"name": "tsdi", "stages": {"safe": {"beta": 0.1}}})
    for step in steps:
        tracker.log(
            {"train/loss/S1": 1.0 / step, "bad": float("nan"), "note": "*text*"}, step=step, stage="safe"
        )
    tracker.log({"eval/unsafe_rate/S1": 0.5}, step=0, stage=content.title)
    tracker.log_evaluation(content, content.title)
    promoted = run_dir / "promoted"
    promoted.mkdir(exist_ok=True)
    (promoted / "model.safetensors").write_bytes(b"weights")
    tracker.log_promoted(promoted, ("promoted", content.title), {"verdict": "PASS"})
    tracker.finish(3, {"verdict": "FAIL"})


def refuse(*arguments: object, **options: object) -> None:
    raise AssertionError(f"a connection was asked for: {arguments}")


def main(run_dir: Path) -> None:
    """An interrupted run and its second attempt."""
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import make_contents

    socket.socket.connect = refuse  # type: ignore[assignment, method-assign]
    for number, content in enumerate(make_contents()):
        tell(run_dir, content, range(1 + 2 * number, 3 + 2 * number))


def test_a_resumed_run_on_tensorboard_and_trackio(tmp_path: Path) -> None:
    run_dir = tmp_path / "outputs" / "tsdi" / "seed0"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", __file__, run_dir],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0].startswith("trackio: project equipoise, run tsdi/seed0 ")
    assert len(done.stdout.splitlines()) == 2

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    curve = [(event.step, event.value) for event in board.Scalars("safe_train_loss/S1")]
    assert curve == [(step, pytest.approx(1.0 / step)) for step in (1, 2, 3, 4)]
    assert [event.step for event in board.Scalars("eval_unsafe_rate/S1")] == [0, 1]
    texts = {
        name: board.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for name in ("recipe", "promoted", "summary", "eval_categories/table", "safe/note")
    }
    assert "        beta: 0.1" in texts["recipe"]
    assert '"verdict": "PASS"' in texts["promoted"]
    assert '"exit_code": 3' in texts["summary"]
    assert "| aligned | unsafe | S1 | S1 | 0.1 |" in texts["eval_categories/table"]
    assert texts["safe/note"] == "    *text*"

    with sqlite3.connect(tmp_path / "trackio" / "equipoise.db") as database:
        logged = [
            (step, json.loads(text)) for step, text in database.execute("select step, metrics from metrics")
        ]
        configs = [json.loads(text) for (text,) in database.execute("select config from configs")]
        artifacts = database.execute("select name, type from artifacts").fetchall()
        aliases = {alias for (alias,) in database.execute("select alias from artifact_aliases")}
    curve = [
        (step, values["safe_train_loss/S1"]) for step, values in logged if "safe_train_loss/S1" in values
    ]
    assert sorted(curve) == [(step, 1.0 / step) for step in (1, 2, 3, 4)]
    tables = {
        step: values["eval_categories/table"] for step, values in logged if "eval_categories/table" in values
    }
    assert [len(tables[number]["_value"]) for number in (0, 1)] == [7, 7]
    assert configs[0]["stages"] == {"safe": {"beta": 0.1}}
    assert configs[0]["_Group"] == "a sweep"
    assert artifacts == [(f"model-{(run_dir / 'run_id.txt').read_text().strip()}", "model")]
    assert {"promoted", "safe-3"} <= aliases
    copies = [
        path
        for path in (tmp_path / "trackio").rglob("*")
        if path.is_file() and path.read_bytes() == b"weights"
    ]
    assert copies == []  # a reference


if __name__ == "__main__":
    main(Path(sys.argv[1]))
