"""A real run on the tiny model, tracked everywhere; W&B's server fails and quotes the key: no file has a key."""

import importlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
ENTRY = HERE.parents[1] / "sweeping" / "entry.py"

pytestmark = pytest.mark.slow

SECRETS = {
    "HF_TOKEN": "hf_planted0123456789",
    "WANDB_API_KEY": "ab12" * 10,
    "OPENAI_API_KEY": "sk-planted0123456789abcdef",
    "JUDGE_SERVER": "planted-behind-key-env",  # named by key_env alone
}


def test_a_run_with_a_failing_server_keeps_keys_to_itself(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_metrics: Callable[..., Any]
) -> None:
    monkeypatch.syspath_prepend(HERE)
    wandb_server = importlib.import_module("wandb_server")
    with wandb_server.WandbServer("failing") as server:
        server.failure = {"message": f"no such key: {SECRETS['WANDB_API_KEY']}"}
        environment = (
            os.environ
            | SECRETS
            | {
                "WANDB_BASE_URL": server.url,
                "WANDB_CACHE_DIR": str(tmp_path / "wandb-cache"),
                "TRACKIO_DIR": str(tmp_path / "trackio"),
                "EQUIPOISE_CACHE": str(tmp_path / "cache"),
            }
        )
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    ENTRY,
                    "train.py",
                    "recipe=dpo",
                    "model=hub",
                    f"model.id={tiny_model_folder}",
                ),
                *("model.dtype=float32", "stages.safe.num_steps=2", "evaluation.max_new_tokens=3"),
                *("tracking.trackers=[wandb,tensorboard,trackio]", "tracking.init_timeout=2"),
                # The judge is the entry's own; what it is asked for stands in the recipe.
                *(
                    "judge=llama_guard",
                    "judge.engine=server",
                    "judge.url=http://127.0.0.1:9/v1",
                    "judge.model=m",
                ),
                "judge.key_env=JUDGE_SERVER",
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    printed = done.stdout + done.stderr
    assert "so this run is recorded offline" in printed, printed[-2000:]
    assert "no such key: ***" in printed
    run_dir = tmp_path / "outputs" / "dpo" / "seed0"
    # The gate's exit code, as without a tracker; what was logged, too.
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (
        done.returncode
        == summary["exit_code"]
        == {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}[summary["verdict"]]
    )
    logged = [(line["stage"], line.get("step")) for line in read_metrics(run_dir)]
    assert logged == [("base-0", 0), ("safe", 1), ("safe", 2), ("safe-2", 0), ("safe-2", 0), ("end", None)]

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "summary.json", "report.html", "report.json", "metrics.jsonl", "debug.log"} <= {
        path.name for path in files
    }
    for name, secret in SECRETS.items():
        assert secret not in printed, name
        holders = [str(path.relative_to(tmp_path)) for path in files if secret.encode() in path.read_bytes()]
        assert holders == [], name

    monkeypatch.syspath_prepend(HERE.parents[2] / "scripts")
    log = importlib.import_module("wandb_log").read_log(run_dir)
    assert log.config["judge"]["key_env"] == "JUDGE_SERVER"
    assert log.exit_code == done.returncode
    losses = {line["step"]: line["train/loss"] for line in read_metrics(run_dir) if line["stage"] == "safe"}
    assert {r["safe/step"]: r["safe_train/loss"] for r in log.history if "safe_train/loss" in r} == losses
    categories = {name for row in log.history for name in row if name.startswith("eval_unsafe_rate/")}
    assert categories == {f"eval_unsafe_rate/{category}" for category in ("S1", "S2", "S10")}
    # The others have the same numbers.
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert {event.step: event.value for event in board.Scalars("safe_train/loss")} == pytest.approx(losses)
    assert "eval_categories/table/text_summary" in board.Tags()["tensors"]
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics").fetchall()
    found = [(step, json.loads(metrics)) for step, metrics in rows]
    assert {
        step: values["safe_train/loss"] for step, values in found if "safe_train/loss" in values
    } == losses
