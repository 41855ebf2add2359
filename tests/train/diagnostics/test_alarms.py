"""Alarms: on synthetic histories, on a resumed one, and on a run whose chosen answers truly become less likely."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.train.diagnostics.alarms import Alarms, chosen_log_ratio, robust_z
from equipoise.train.recipe import LossConfig
from equipoise.train.recipe.measuring import DiagnosticsConfig
from equipoise.train.recipe.stages import SFTStageConfig
from equipoise.train.stages.preference import run_preference
from equipoise.train.stages.sft import run_sft


class History:
    """Alarms over a file, with what they logged and said."""

    def __init__(self, path: Path, **keys: Any) -> None:
        self.path, self.lines, self.said = path, [], []
        self.alarms = Alarms(DiagnosticsConfig(**keys), path, self._log, self.said.append)

    def _log(self, metrics: Any, step: int, stage: str) -> None:
        self.lines.append({"stage": stage, "step": step, **metrics})
        with self.path.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")

    def feed(
        self, losses: list[float], stage: str = "safe", start: int = 1, **others: list[float]
    ) -> "History":
        for i, loss in enumerate(losses):
            more = {f"train/{name}": values[i] for name, values in others.items()}
            self.alarms.log({"train/loss": loss, **more}, start + i, stage)
        return self

    def steps(self, alarm: str) -> list[int]:
        return [line["step"] for line in self.lines if f"alarm/{alarm}" in line]


def noise(num: int, seed: int = 0) -> list[float]:
    """Losses that fall from 0.7 to 0.5 with a deviation of 0.02."""
    draw = random.Random(seed)
    return [0.7 - 0.2 * i / num + draw.gauss(0, 0.02) for i in range(num)]


def test_z_by_hand() -> None:
    """Median 3, deviations 2 1 0 1 2, MAD 1: (10 - 3) / 1.4826."""
    assert robust_z(10.0, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(7 / 1.4826)
    assert robust_z(0.51, [0.5] * 30) == pytest.approx(0.01 / 0.005)  # what stands still is given a hundredth


def test_a_spike_sets_off_the_alarm_once_and_says_so_once(tmp_path: Path) -> None:
    losses = noise(100)
    losses[60], losses[80] = 3.0, 3.0
    history = History(tmp_path / "metrics.jsonl").feed(losses)
    assert history.steps("loss_spike") == [61, 81]
    assert history.lines[60]["alarm/loss_spike"] > 10
    assert len(history.said) == 1
    assert history.said[0].startswith("ALARM, safe, step 61: the loss 3 lies ")


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_spike(seed: int, tmp_path: Path) -> None:
    assert History(tmp_path / "metrics.jsonl").feed(noise(200, seed)).steps("loss_spike") == []


def test_no_alarm_before_there_is_a_measure_and_none_where_it_is_off(tmp_path: Path) -> None:
    early = [*noise(19), 3.0]
    assert History(tmp_path / "early.jsonl").feed(early).said == []
    off = History(tmp_path / "off.jsonl", spike_z=0).feed([*noise(50), 3.0])
    assert off.said == []
    gone = History(tmp_path / "nan.jsonl").feed([*noise(50), math.nan, math.inf])  # the guard's business
    assert gone.said == []


def test_every_stage_begins_anew(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl").feed(noise(40)).feed([3.0] * 30, stage="sft")
    assert history.said == []


def test_an_evaluations_line_passes_through(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl").feed(noise(30))
    history.alarms.log({"eval/unsafe_rate": 0.5}, 30, "safe-30")
    history.feed([3.0], start=31)
    assert history.steps("loss_spike") == [31]


def test_a_resumed_stage_raises_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    losses = noise(60)
    losses[30], losses[45] = 3.0, 4.0
    whole = History(tmp_path / "whole.jsonl").feed(losses)
    History(tmp_path / "cut.jsonl").feed(losses[:40])
    resumed = History(tmp_path / "cut.jsonl").feed(losses[40:], start=41)
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert len(whole.said) == 1
    assert resumed.said == []  # it was said before


def test_the_chosen_mean_counts_pairs_not_categories() -> None:
    metrics = {
        "train/chosen_log_ratio/S1": -1.0,
        "train/num_pairs/S1": 6,
        "train/chosen_log_ratio/helpful": 3.0,
        "train/num_pairs/helpful": 2,
    }
    assert chosen_log_ratio(metrics) == pytest.approx((-6 + 6) / 8)
    assert chosen_log_ratio({**metrics, "train/desirable_log_ratio": -7.0}) == -7.0  # KTO has the mean itself
    assert chosen_log_ratio({"train/loss": 1.0}) is None


def test_falling_chosen_answers(tmp_path: Path) -> None:
    """A nat a step: the mean of the last ten is at -10 or below from step 15 on (-5.5, ..., -14.5)."""
    falling = [-float(i) for i in range(1, 31)]
    history = History(tmp_path / "metrics.jsonl").feed(noise(30), desirable_log_ratio=falling)
    assert history.steps("chosen_falling") == list(range(15, 31))
    assert history.lines[14]["alarm/chosen_falling"] == pytest.approx(-10.5)
    assert len(history.said) == 1
    assert "loss.sft_coef=1.0" in history.said[0]


def test_a_run_whose_chosen_answers_become_less_likely_and_the_remedy(
    train_stage: Any, make_stage: Any, make_data: Any, tmp_path: Path
) -> None:
    """Answers that the model knows by heart, told apart by one word: it can only make both less likely.

    An SFT term holds them.
    """
    data = make_data()
    alike = [replace(p, rejected=p.chosen.replace("No", "Yes")) for p in data.safety_pairs]
    data = replace(data, safety_pairs=alike)
    known = train_stage(
        SFTStageConfig(num_steps=24, learning_rate=1e-2, warmup=0.0, evaluate=False),
        runner=run_sft,
        run="known",
        data=data,
    )
    folder = known.result.model_folder

    def from_known(name: str, stage: Any, policy: str, context: Any) -> Any:
        return run_preference(name, stage, folder, context)

    said = {}
    for name, sft_coef in (("plain", 0.0), ("with_sft", 10.0)):
        stage = make_stage(
            num_steps=14, mixture={"safety": 1.0}, learning_rate=5e-3, loss=LossConfig(sft_coef=sft_coef)
        )
        run = train_stage(stage, run=name, runner=from_known, data=data)
        history = History(tmp_path / f"{name}.jsonl", falling_nats=1.0)
        for line in run.metrics:
            metrics = {key: value for key, value in line.items() if key != "step"}
            history.alarms.log(metrics, int(line["step"]), "safe")
        said[name] = history.said
    assert len(said["plain"]) == 1
    assert said["with_sft"] == []
