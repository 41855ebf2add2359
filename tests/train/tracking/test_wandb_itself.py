"""The real package: offline and read back, and with a server on the loopback that works, fails, hangs or is gone."""

import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from equipoise.eval.report.content import ReportContent
from equipoise.train.recipe import TrackingConfig
from equipoise.train.tracking import Tracker

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TIMEOUT = 2.0
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """Every test has a process of W&B's of its own."""
    yield
    import wandb

    wandb.teardown()


@pytest.fixture
def wandb_log(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HERE.parents[2] / "scripts")
    return importlib.import_module("wandb_log")


@pytest.fixture
def read(wandb_log: ModuleType) -> Callable[[Path], Any]:
    """`read(run_dir)`: the log as a program that has ended leaves it; its last records are written then."""

    def read(run_dir: Path) -> Any:
        import wandb

        wandb.teardown()
        return wandb_log.read_log(run_dir)

    return read


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A healthy server that W&B's client is sent to, with a key."""
    monkeypatch.syspath_prepend(HERE)
    with importlib.import_module("wandb_server").WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def start(run_dir: Path) -> Tracker:
    config = TrackingConfig(trackers=["wandb"], group="g", init_timeout=TIMEOUT, finish_timeout=TIMEOUT)
    return Tracker(run_dir, config, {"name": "tsdi", "stages": {"safe": {"beta": 0.1}}})


def log_steps(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log({"train/loss/S1": 1.0 / step, "bad": float("nan")}, step=step, stage="safe")


def end(tracker: Tracker, run_dir: Path) -> None:
    (run_dir / "summary.json").write_text("{}")
    tracker.finish(3, {"verdict": "FAIL", "promoted": "aligned", "bad": float("nan")})


def test_an_offline_run_twice_resumed_is_read_back(
    tmp_path: Path, read: Callable[[Path], Any], contents: tuple[ReportContent, ReportContent]
) -> None:
    run_dir = tmp_path / "tsdi" / "seed0"
    promoted = run_dir / "promoted"
    promoted.mkdir(parents=True)
    (promoted / "model.safetensors").write_bytes(b"weights")
    for number, content in enumerate(contents):
        tracker = start(run_dir)
        log_steps(tracker, range(1 + 2 * number, 3 + 2 * number))
        tracker.log({"eval/unsafe_rate/S1": 0.9 - number * 0.8}, step=0, stage=content.title)
        tracker.log_evaluation(content, content.title)
        if number:
            tracker.log_promoted(
                promoted, ("promoted", "aligned", "safe-3"), {"verdict": "PASS", "rate": 0.1}
            )
        end(tracker, run_dir)
    log = read(run_dir)
    assert len(log.paths) == 2
    assert len({path.name for path in log.paths}) == 1  # one id
    assert log.config["stages"] == {"safe": {"beta": 0.1}}
    curve = [(row["safe/step"], row["safe_train_loss/S1"]) for row in log.history if "safe/step" in row]
    assert curve == [(step, 1.0 / step) for step in (1, 2, 3, 4)]
    rates = [
        (row["eval/number"], row["eval_unsafe_rate/S1"])
        for row in log.history
        if "eval_unsafe_rate/S1" in row
    ]
    assert rates == [(0, 0.9), (1, pytest.approx(0.1))]
    (_, first), (_, second) = [(name, path) for name, _, path in log.media("table-file")]
    assert [len(json.loads(path.read_text())["data"]) for path in (first, second)] == [7, 7]
    assert [path.read_text().count("<svg") for _, _, path in log.media("html-file")] == [1, 2]
    model = next(artifact for artifact in log.artifacts if artifact["type"] == "model")
    assert model["aliases"] == ["aligned", "latest", "promoted", "safe-3"]
    assert model["metadata"] == {"verdict": "PASS", "rate": 0.1, "folder": str(promoted)}
    assert [(file["path"], file["size"], file["ref"]) for file in model["files"]] == [
        ("model.safetensors", 7, (promoted / "model.safetensors").as_uri())
    ]
    assert log.summary["verdict"] == "FAIL"
    assert log.exit_code == 3
    logged = "".join(
        path.read_text(errors="replace") for path in run_dir.glob("wandb/**/*") if path.is_file()
    )
    assert "a harmful" not in logged  # neither prompt nor answer

    read_wandb = _script("read_wandb")
    assert list(read_wandb.problems(log)) == []
    text = "\n".join(read_wandb.describe(log))
    assert "eval_unsafe_rate: S1" in text
    assert "unsafe rate by category, evaluation 1: S1 10%" in text
    assert "aliases aligned, latest, promoted, safe-3" in text
    # What is missing is said.
    (promoted / "model.safetensors").write_bytes(b"other weights")
    second.unlink()
    log.history = [row for row in log.history if "eval_unsafe_rate/S1" not in row]
    found = "\n".join(read_wandb.problems(log))
    for missing in ("unsafe rates by category", "model.safetensors as it was", f"{second} is not there"):
        assert missing in found
    assert len(found.splitlines()) == 3


def test_a_log_cut_off_by_a_kill_is_read_and_a_damaged_one_refused(
    tmp_path: Path, wandb_log: ModuleType, read: Callable[[Path], Any]
) -> None:
    run_dir = tmp_path / "tsdi" / "seed0"
    with pytest.raises(wandb_log.WandbLogError, match="expected wandb/"):
        wandb_log.read_log(run_dir)
    tracker = start(run_dir)
    # Over the ends of several blocks, in which records are split.
    for step in range(1, 40):
        tracker.log({"note": f"{step} " + "x" * 5000}, step=step, stage="safe")
    tracker.finish(0, {})
    (path,) = read(run_dir).paths
    whole = path.read_bytes()
    assert len(whole) > 5 * 32768
    assert [row["safe/step"] for row in wandb_log.read_log(run_dir).history] == list(range(1, 40))
    path.write_bytes(whole[: len(whole) // 2])
    torn = wandb_log.read_log(run_dir)
    assert 10 < len(torn.history) < 30
    assert torn.exit_code is None
    path.write_bytes(whole[:40_000] + bytes([whole[40_000] ^ 1]) + whole[40_001:])
    with pytest.raises(wandb_log.WandbLogError, match="damaged at byte"):
        wandb_log.read_log(run_dir)


def test_a_healthy_server_gets_everything(tmp_path: Path, server: Any) -> None:
    tracker = start(tmp_path / "tsdi" / "seed0")
    log_steps(tracker, range(1, 4))
    tracker.finish(0, {})
    upserts = [
        json.loads(body)["variables"] for path, body in server.requests if "mutation UpsertBucket" in body
    ]
    assert upserts[0]["displayName"] == "tsdi/seed0"
    assert upserts[0]["groupName"] == "g"
    sent = "".join(body for path, body in server.requests if path.endswith("file_stream"))
    assert sent.count("safe_train_loss/S1") >= 3


@pytest.mark.parametrize("mode", ["refusing", "failing", "hanging"])
def test_without_a_server_the_run_goes_on_offline(
    mode: str, tmp_path: Path, server: Any, read: Callable[[Path], Any], read_metrics: Callable[..., Any]
) -> None:
    _break(server, mode)
    run_dir = tmp_path / "tsdi" / "seed0"
    began = time.monotonic()
    with pytest.warns(UserWarning, match="so this run is recorded offline"):
        tracker = start(run_dir)
    log_steps(tracker, range(1, 4))
    tracker.finish(3, {})
    assert time.monotonic() - began < TIMEOUT + 20  # the start waits TIMEOUT, the rest is a busy machine's
    assert [row["safe/step"] for row in read(run_dir).history] == [1, 2, 3]
    assert [line.get("step") for line in read_metrics(run_dir)] == [1, 2, 3, None]


@pytest.mark.parametrize("mode", ["refusing", "failing", "hanging"])
def test_a_server_that_goes_down_delays_the_end_and_no_more(
    mode: str, tmp_path: Path, server: Any, read: Callable[[Path], Any], read_metrics: Callable[..., Any]
) -> None:
    run_dir = tmp_path / "tsdi" / "seed0"
    tracker = start(run_dir)
    log_steps(tracker, range(1, 3))
    _break(server, mode)
    began = time.monotonic()
    log_steps(tracker, range(3, 6))
    assert time.monotonic() - began < 2
    with pytest.warns(
        UserWarning, match=r"2 s were not enough to send all; `wandb sync .*run-.*` sends the rest"
    ):
        tracker.finish(3, {})
    assert TIMEOUT <= time.monotonic() - began < TIMEOUT + 10
    assert [row["safe/step"] for row in read(run_dir).history] == [1, 2, 3, 4, 5]
    assert [line.get("step") for line in read_metrics(run_dir)] == [1, 2, 3, 4, 5, None]
    assert read_metrics(run_dir)[-1]["exit_code"] == 3


def _break(server: Any, mode: str) -> None:
    if mode == "refusing":
        server.close()
    else:
        server.mode = mode


def _script(name: str) -> ModuleType:
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    path = HERE.parents[2] / "scripts" / name
    spec = spec_from_loader(name, SourceFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
