import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.eval.report.tables import Table
from equipoise.train.recipe import TrackingConfig
from equipoise.train.tracking import Tracker

WANDB = TrackingConfig(name="wandb", project="test", tags=["a"])


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B key, whatever this machine has."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]


class FakeRun:
    url = "https://wandb.example/run"

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        if self.fails_at == "log":
            raise OSError("the server said no to key-0123456789")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the module wandb: `run` is what `init` returns, `started` what it was given."""
    module = SimpleNamespace(run=FakeRun(), started=[], Settings=lambda **settings: settings)

    def init(**arguments: Any) -> FakeRun:
        module.started.append(arguments)
        if module.run.fails_at == "init":
            raise TimeoutError("no network")
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_every_value_is_a_line_of_json_at_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(), {})
    tracker.log({"train/loss/S1": 0.5, "train/num_pairs": 8, "note": "größer"}, step=3, stage="safe")
    (line,) = lines(tmp_path / "run")  # before the file is closed
    assert line.pop("time").endswith("+00:00")
    assert line == {"stage": "safe", "step": 3, "train/loss/S1": 0.5, "train/num_pairs": 8, "note": "größer"}
    tracker.finish(4, {})
    assert lines(tmp_path / "run")[1]["exit_code"] == 4


def test_values_that_are_not_finite_stay_readable(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(), {})
    tracker.log({"a": math.nan, "b": math.inf, "c": -math.inf}, step=0, stage="safe")
    line = lines(tmp_path)[0]
    assert (line["a"], line["b"], line["c"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(line["a"]))
    tracker.finish(0, {})


def test_numpy_numbers_are_numbers_and_tensors_are_refused(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(), {})
    tracker.log({"a": np.float32(0.5), "b": np.int64(3)}, step=0, stage="safe")  # type: ignore[dict-item]
    assert (lines(tmp_path)[0]["a"], lines(tmp_path)[0]["b"]) == (0.5, 3)
    with pytest.raises(TypeError, match="found Tensor"):
        tracker.log({"a": torch.zeros(2)}, step=0, stage="safe")  # type: ignore[dict-item]
    tracker.finish(0, {})


def test_a_resumed_run_appends_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    first = Tracker(tmp_path, TrackingConfig(), {})
    first.log({"loss": 1.0}, step=1, stage="safe")
    first.finish(130, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "safe", "st')
    second = Tracker(tmp_path, TrackingConfig(), {})
    second.log({"loss": 0.5}, step=2, stage="safe")
    second.finish(0, {})
    assert [line.get("step") for line in lines(tmp_path)] == [1, 2, None]  # how the first ended is no news


def test_rewinding_forgets_what_will_be_done_again_and_nothing_else(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(), {})
    for stage, step in (("helpful", 3), ("safe", 1), ("safe", 2), ("safe", 3)):
        tracker.log({"loss": 1.0}, step=step, stage=stage)
    tracker.rewind("safe", 1)
    tracker.log({"loss": 0.5}, step=2, stage="safe")
    tracker.finish(0, {})
    steps = [(line["stage"], line.get("step"), line.get("loss")) for line in lines(tmp_path)]
    assert steps == [("helpful", 3, 1.0), ("safe", 1, 1.0), ("safe", 2, 0.5), ("end", None, None)]


def test_without_wandb_it_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    Tracker(tmp_path, TrackingConfig(), {}).finish(0, {})


def test_wandb_gets_every_value_with_the_steps_of_its_stage(tmp_path: Path, fake: SimpleNamespace) -> None:
    tracker = Tracker(tmp_path / "tsdi" / "seed0", WANDB, {"name": "tsdi", "beta": 0.1})
    tracker.log({"loss": 1.0}, step=1, stage="helpful")
    tracker.log({"loss": 2.0}, step=1, stage="safe")
    tracker.log({"loss": 3.0}, step=2, stage="safe")
    tracker.finish(3, {"unsafe_rate": {"S1": 0.2}})
    (start,) = fake.started
    assert (start["project"], start["name"], start["tags"]) == ("test", "tsdi/seed0", ["a"])
    assert (start["mode"], start["resume"]) == ("offline", "allow")
    assert start["config"] == {"name": "tsdi", "beta": 0.1}
    assert fake.run.metrics == [("helpful/*", "helpful/step"), ("safe/*", "safe/step")]
    assert fake.run.logged[2] == {"safe/step": 2, "safe/loss": 3.0}
    assert fake.run.summary == {"unsafe_rate": {"S1": 0.2}}
    assert fake.run.exit_code == 3


def test_a_resumed_run_keeps_its_wandb_id_and_another_has_its_own(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    for run in ("a", "a", "b"):
        Tracker(tmp_path / run, WANDB, {}).finish(0, {})
    first, again, other = (start["id"] for start in fake.started)
    assert first == again != other


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "0123456789"}, "online"),
        ("auto", {"WANDB_API_KEY": "0123456789", "WANDB_MODE": "offline"}, "offline"),
        ("offline", {"WANDB_API_KEY": "0123456789"}, "offline"),
        ("online", {}, "online"),
    ],
)
def test_wandb_is_online_where_there_is_a_key(
    mode: str,
    environment: dict[str, str],
    expected: str,
    tmp_path: Path,
    fake: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Tracker(tmp_path, TrackingConfig(name="wandb", mode=mode), {}).finish(0, {})
    assert fake.started[0]["mode"] == expected


def test_a_key_that_wandb_login_has_stored_counts(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    (tmp_path / "netrc").chmod(0o600)
    Tracker(tmp_path / "a", WANDB, {}).finish(0, {})
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    Tracker(tmp_path / "b", WANDB, {}).finish(0, {})
    assert [start["mode"] for start in fake.started] == ["online", "offline"]


@pytest.mark.parametrize("fails_at", ["init", "log"])
def test_a_failing_wandb_warns_and_the_run_goes_on(
    fails_at: str, tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key-0123456789")
    fake.run.fails_at = fails_at

    def run() -> None:
        tracker = Tracker(tmp_path, WANDB, {})
        tracker.log({"loss": 1.0}, step=1, stage="safe")
        tracker.log({"loss": 2.0}, step=2, stage="safe")
        tracker.finish(0, {})

    with pytest.warns(UserWarning, match="Weights & Biases failed and is off from here on") as caught:
        run()
    assert len(caught) == 1
    assert "key-0123456789" not in str(caught[0].message)
    assert [line.get("loss") for line in lines(tmp_path)] == [1.0, 2.0, None]
    assert fake.run.exit_code is None


def test_secrets_do_not_reach_wandb(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    recipe = {"data": {"path": "https://hf_0123456789@host/x"}, "tags": ["hf_0123456789"]}
    Tracker(tmp_path, WANDB, recipe).finish(0, {"from": "hf_0123456789"})
    assert fake.started[0]["config"] == {"data": {"path": "https://***@host/x"}, "tags": ["***"]}
    assert fake.run.summary == {"from": "***"}


def test_tables_go_to_wandb_alone(tmp_path: Path, fake: SimpleNamespace) -> None:
    fake.Table = lambda columns, data: (columns, data)
    table = Table(("category", "rate"), (("S1", 0.2), ("S2", None)))
    tracker = Tracker(tmp_path / "tsdi" / "seed0", WANDB, {})
    tracker.log_table("categories", table, "safe-0")
    assert fake.run.logged == [{"safe-0/categories": (["category", "rate"], [["S1", 0.2], ["S2", None]])}]
    assert lines(tmp_path / "tsdi" / "seed0") == []
    tracker.finish(0, {})
    tracker = Tracker(tmp_path / "local", TrackingConfig(), {})
    tracker.log_table("categories", table, "safe-0")
    assert lines(tmp_path / "local") == []
    tracker.finish(0, {})


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path: Path) -> None:
    """The real package writes an offline run, twice into the same run, without a network."""
    run_dir = tmp_path / "tsdi" / "seed0"
    for step in (1, 2):
        tracker = Tracker(run_dir, TrackingConfig(name="wandb"), {"name": "tsdi"})
        tracker.log({"loss": 1.0 / step, "bad": math.nan}, step=step, stage="safe")
        tracker.log_table("categories", Table(("category", "rate"), (("S1", 0.2), ("S2", None))), "safe-0")
        tracker.finish(0, {"unsafe_rate": {"S1": 0.2}, "bad": math.nan})
    id = (run_dir / "wandb_id.txt").read_text().strip()
    assert len(list(run_dir.glob(f"wandb/offline-run-*/run-{id}.wandb"))) >= 1
    assert [line.get("loss") for line in lines(run_dir)] == [1.0, None, 0.5, None]
