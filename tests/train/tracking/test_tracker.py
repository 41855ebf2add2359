import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.eval.report.content import ReportContent
from equipoise.train.recipe import TrackingConfig
from equipoise.train.tracking import DASHBOARDS, Tracker
from equipoise.train.tracking.dashboard import panel

ReadMetrics = Callable[[Path], list[dict[str, Any]]]
ONE = TrackingConfig(trackers=["trackio"])


def test_every_value_is_a_line_of_json_at_once(tmp_path: Path, read_metrics: ReadMetrics) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(), {})
    tracker.log({"train/loss/S1": 0.5, "train/num_pairs": 8, "note": "größer"}, step=3, stage="safe")
    (line,) = read_metrics(tmp_path / "run")  # before the file is closed
    assert line.pop("time").endswith("+00:00")
    assert line == {"stage": "safe", "step": 3, "train/loss/S1": 0.5, "train/num_pairs": 8, "note": "größer"}
    tracker.finish(4, {})
    assert read_metrics(tmp_path / "run")[1]["exit_code"] == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl"]


def test_values_that_are_not_finite_stay_readable(tmp_path: Path, read_metrics: ReadMetrics) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(), {})
    tracker.log({"a": math.nan, "b": math.inf, "c": -math.inf}, step=0, stage="safe")
    line = read_metrics(tmp_path)[0]
    assert (line["a"], line["b"], line["c"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(line["a"]))
    tracker.finish(0, {})


def test_numpy_numbers_are_numbers_and_tensors_are_refused(tmp_path: Path, read_metrics: ReadMetrics) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(), {})
    tracker.log({"a": np.float32(0.5), "b": np.int64(3)}, step=0, stage="safe")  # type: ignore[dict-item]
    assert (read_metrics(tmp_path)[0]["a"], read_metrics(tmp_path)[0]["b"]) == (0.5, 3)
    with pytest.raises(TypeError, match="found Tensor"):
        tracker.log({"a": torch.zeros(2)}, step=0, stage="safe")  # type: ignore[dict-item]
    tracker.finish(0, {})


def test_a_resumed_run_appends_and_a_torn_line_is_dropped(tmp_path: Path, read_metrics: ReadMetrics) -> None:
    first = Tracker(tmp_path, TrackingConfig(), {})
    first.log({"loss": 1.0}, step=1, stage="safe")
    first.finish(130, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "safe", "st')
    second = Tracker(tmp_path, TrackingConfig(), {})
    second.log({"loss": 0.5}, step=2, stage="safe")
    second.finish(0, {})
    assert [line.get("step") for line in read_metrics(tmp_path)] == [
        1,
        2,
        None,
    ]  # how the first ended is no news


def test_rewinding_forgets_what_will_be_done_again_and_nothing_else(
    tmp_path: Path, read_metrics: ReadMetrics
) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(), {})
    for stage, step in (("helpful", 3), ("safe", 1), ("safe", 2), ("safe", 3)):
        tracker.log({"loss": 1.0}, step=step, stage=stage)
    tracker.rewind("safe", 1)
    tracker.log({"loss": 0.5}, step=2, stage="safe")
    tracker.finish(0, {})
    steps = [(line["stage"], line.get("step"), line.get("loss")) for line in read_metrics(tmp_path)]
    assert steps == [("helpful", 3, 1.0), ("safe", 1, 1.0), ("safe", 2, 0.5), ("end", None, None)]


def test_no_package_of_a_dashboard_is_imported_before_one_is_started() -> None:
    code = (
        "import equipoise.train.tracking, sys; print({'wandb', 'tensorboard', 'trackio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "axis", "expected"),
    [
        ("train/loss/S1", "safe", "safe_train_loss/S1"),
        ("train/loss", "safe", "safe_train/loss"),
        ("tasks/score", "grpo", "grpo_tasks/score"),
        ("loss", "safe", "safe/loss"),
        ("eval/unsafe_rate/S1", "evaluations", "eval_unsafe_rate/S1"),
        ("eval/unsafe_rate", "evaluations", "eval/unsafe_rate"),
        ("gate/exit_code", "evaluations", "gate/exit_code"),
    ],
)
def test_categories_of_a_metric_are_one_group_of_panels(name: str, axis: str, expected: str) -> None:
    assert panel(name, axis) == expected


def test_dashboards_get_stages_by_step_and_evaluations_by_number(
    tmp_path: Path, recorders: list[Any]
) -> None:
    tracker = Tracker(tmp_path, ONE, {"beta": 0.1})
    tracker.log({"eval/unsafe_rate/S1": 0.9}, step=0, stage="base-0")
    tracker.log({"train/loss/S1": 1.0}, step=7, stage="safe")
    tracker.log({"eval/unsafe_rate/S1": 0.1}, step=0, stage="safe-8")
    tracker.log({"gate/exit_code": 3.0}, step=0, stage="safe-8")
    tracker.finish(3, {"rate": math.nan})
    (dashboard,) = recorders
    assert dashboard.run.recipe == {"beta": 0.1}
    assert dashboard.logged == [
        ({"eval_unsafe_rate/S1": 0.9}, 0, "evaluations"),
        ({"safe_train_loss/S1": 1.0}, 7, "safe"),
        ({"eval_unsafe_rate/S1": 0.1}, 1, "evaluations"),
        ({"gate/exit_code": 3.0}, 1, "evaluations"),
    ]
    assert dashboard.ended == (3, {"rate": "NaN"})


def test_a_resumed_run_has_its_id_counts_on_and_tells_nothing_twice(
    tmp_path: Path, recorders: list[Any]
) -> None:
    first = Tracker(tmp_path / "a", ONE, {})
    first.log({"eval/unsafe_rate": 0.9}, step=0, stage="base-0")
    first.finish(130, {})
    again = Tracker(tmp_path / "a", ONE, {})
    again.log({"eval/unsafe_rate": 0.9}, step=0, stage="base-0")
    again.log({"eval/unsafe_rate": 0.1}, step=0, stage="safe-8")
    again.finish(0, {})
    Tracker(tmp_path / "b", ONE, {}).finish(0, {})
    assert recorders[0].run.id == recorders[1].run.id != recorders[2].run.id
    assert recorders[1].logged == [({"eval/unsafe_rate": 0.1}, 1, "evaluations")]


def test_an_evaluation_is_a_table_and_plots_without_a_prompt_or_answer(
    tmp_path: Path, recorders: list[Any], contents: tuple[ReportContent, ReportContent]
) -> None:
    tracker = Tracker(tmp_path, ONE, {})
    for number, content in enumerate(contents):
        tracker.log({"eval/unsafe_rate": 0.5}, step=0, stage=content.title)
        tracker.log_evaluation(content, content.title)
        table, plots, logged_number = recorders[0].evaluations[number]
        assert logged_number == number
        assert plots.count("<svg") == 1 + number  # beside a baseline the changes too
        assert "<script" not in plots
        assert "http" not in plots.replace("http://www.w3.org/", "")
        assert "harmful answer" not in plots + repr(table)
        assert "a harmful prompt" not in plots + repr(table)
    table, _, _ = recorders[0].evaluations[1]
    row = next(r for r in table.rows if r[1:3] == ("unsafe", "S1"))
    cells = dict(zip(table.columns, row, strict=True))
    assert (cells["state"], cells["rate"], cells["n"]) == ("aligned", 0.1, 10)
    assert cells["change"] == pytest.approx(-0.8)
    tracker.finish(0, {})


def test_without_a_dashboard_nothing_is_drawn(
    tmp_path: Path, contents: tuple[ReportContent, ReportContent], monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.train import tracking

    monkeypatch.setattr(tracking, "plots_page", lambda content: pytest.fail("drawn for nobody"))
    tracker = Tracker(tmp_path, TrackingConfig(), {})
    tracker.log({"eval/unsafe_rate": 0.5}, step=0, stage="base-0")
    tracker.log_evaluation(contents[0], "base-0")
    tracker.log_promoted(tmp_path, ("promoted",), {})
    tracker.finish(0, {})


def test_a_failing_dashboard_is_left_out_and_the_others_go_on(
    tmp_path: Path, recorders: list[Any], read_metrics: ReadMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "key-0123456789")

    def run() -> None:
        tracker = Tracker(tmp_path, TrackingConfig(trackers=["wandb", "tensorboard", "trackio"]), {})
        tracker.log({"loss": 1.0}, step=1, stage="safe")
        tracker.log({"loss": 2.0}, step=2, stage="safe")
        tracker.finish(0, {})

    with pytest.warns(UserWarning, match="failed and is off from here on") as caught:
        run()
    said = [str(warning.message) for warning in caught]
    assert ["wandb" in said[0], "tensorboard" in said[1], len(said)] == [True, True, 2]
    assert all("key-0123456789" not in text and "said no to ***" in text for text in said)
    assert [values for values, _, _ in recorders[0].logged] == [{"safe/loss": 1.0}, {"safe/loss": 2.0}]
    assert [line.get("loss") for line in read_metrics(tmp_path)] == [1.0, 2.0, None]


def test_secrets_reach_neither_metrics_nor_dashboards(
    tmp_path: Path, recorders: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("JUDGE_SERVER", "plain-0123456789")  # a secret, as key_env says
    recipe = {
        "data": {"path": "hf_0123456789/x"},
        "judge": {"key_env": "JUDGE_SERVER", "model": "plain-0123456789"},
    }
    tracker = Tracker(tmp_path, ONE, recipe)
    tracker.log({"note": "Bearer 0123456789abcdef"}, step=1, stage="safe")
    tracker.log_promoted(tmp_path, ("promoted",), {"model": "https://me:pass@host/x"})
    tracker.finish(0, {"from": ["plain-0123456789"]})
    (dashboard,) = recorders
    assert dashboard.run.recipe == {
        "data": {"path": "***/x"},
        "judge": {"key_env": "JUDGE_SERVER", "model": "***"},
    }
    assert dashboard.logged[0][0] == {"safe/note": "Bearer ***"}
    assert dashboard.promoted[0][2] == {"model": "https://***@host/x"}
    assert dashboard.ended == (0, {"from": ["***"]})
    assert "0123456789" not in (tmp_path / "metrics.jsonl").read_text()


def test_every_tracker_that_a_recipe_may_name_is_there() -> None:
    from equipoise.train.recipe.checks import TRACKERS

    assert tuple(DASHBOARDS) == TRACKERS
