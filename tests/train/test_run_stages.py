"""What a run's exit code says, evaluations inside a stage, and where stages start; more: `test_run.py`."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from equipoise.eval.judges.base import Judge
from equipoise.train import run as run_module
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.stages import (
    CategoryConfig,
    MarginConfig,
    PreferenceStageConfig,
    TokenBiasStageConfig,
)
from equipoise.train.run import run, state_names
from equipoise.train.stages.context import StageResult

pytestmark = pytest.mark.slow


# ---- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_reports")
@pytest.mark.parametrize(
    ("bad", "rules", "exit_code", "verdict"),
    [
        (True, {"category_limit": 0.0, "overall_limit": 0.0}, 3, "FAIL"),
        (False, {"min_samples": 1000}, 4, "INCONCLUSIVE"),
    ],
)
def test_what_does_not_pass_is_not_promoted(
    bad: bool,
    rules: dict[str, Any],
    exit_code: int,
    verdict: str,
    recipe: Recipe,
    surroundings: Any,
    make_judge: Any,
) -> None:
    surroundings.judge = make_judge(lambda prompt, response: bad)
    recipe.gate.rules |= rules
    del recipe.stages["helpful"], recipe.stages["token_bias"]
    assert run(recipe) == exit_code
    folder = Path(recipe.output_dir) / "test" / "seed0"
    assert not (folder / "promoted").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["verdict"], summary["promoted"], summary["exit_code"]) == (verdict, None, exit_code)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["exit_code"] == exit_code
    assert (folder / "report.html").exists()


def test_nothing_judged_needs_no_judge(
    recipe: Recipe,
    surroundings: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_judge(recipe: Recipe) -> Judge:
        raise AssertionError("a judge was loaded")

    monkeypatch.setattr(run_module, "load_judge", no_judge)
    recipe.evaluation.baseline = False
    recipe.stages = {"safe": replace(recipe.stages["safe"], evaluate=False)}
    assert run(recipe) == 0
    folder = Path(recipe.output_dir) / "test" / "seed0"
    assert json.loads((folder / "summary.json").read_text())["verdict"] is None
    assert not (folder / "report.html").exists()
    assert not (folder / "promoted").exists()
    assert "report.html" not in capsys.readouterr().out


@pytest.mark.usefixtures("quick_reports")
def test_a_native_dtype_is_resolved_before_anything_is_written(
    recipe: Recipe, surroundings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "native_dtype", lambda: "float32")
    recipe.model.dtype = "native"
    recipe.evaluation.baseline = False
    recipe.stages = {"safe": replace(recipe.stages["safe"], num_steps=1, evaluate=False)}
    run(recipe)
    folder = Path(recipe.output_dir) / "test" / "seed0"
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["dtype"] == "float32"


# ---- an evaluation inside a stage ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_reports")
def test_a_stage_is_gated_inside_and_steered(recipe: Recipe, surroundings: Any, make_judge: Any) -> None:
    surroundings.judge = make_judge(lambda prompt, response: "S2" in prompt)
    category = CategoryConfig(
        MarginConfig(enabled=True, eta=1.0, target=0.1), shrinkage=0.0, update_every=100
    )
    recipe.stages = {"safe": replace(recipe.stages["safe"], num_steps=4, category=category)}
    recipe.gate.every = 2
    assert run(recipe) == 0
    folder = Path(recipe.output_dir) / "test" / "seed0"
    assert {p.name for p in (folder / "eval").iterdir()} == {"base-0", "safe-2", "safe-4"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    margins = [line["category/margin/S2"] for line in lines if line["stage"] == "safe"]
    # After the base evaluation, and again after the one at step 2: 1 - 0.1 each.
    assert margins == pytest.approx([0.9, 0.9, 1.8, 1.8])
    assert all(line["category/margin/S1"] == 0 for line in lines if line["stage"] == "safe")
    gates = [json.loads(line)["label"] for line in (folder / "gate.jsonl").read_text().splitlines()]
    assert gates == ["safe-2", "safe-4"]
    # Training went on unharmed from the evaluated model.
    losses = [line["train/loss/S1"] for line in lines if line["stage"] == "safe"]
    assert losses[-1] < losses[0]
    final, promoted = (
        load_file(f / "model.safetensors") for f in (folder / "stages/safe/model", folder / "promoted")
    )
    assert all(torch.equal(final[name], weight) for name, weight in promoted.items())


# ---- where stages start, and how their states are called -------------------------------------------------------------


@pytest.mark.usefixtures("quick_reports")
def test_a_stage_can_start_from_the_base_another_stage_or_a_folder(
    recipe: Recipe, surroundings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    starts: dict[str, str] = {}

    def note(name: str, stage: Any, policy: str, context: Any) -> StageResult:
        starts[name] = policy
        return StageResult(f"left by {name}", 0.0, {})

    monkeypatch.setitem(run_module.RUNNERS, PreferenceStageConfig, note)
    plain = replace(recipe.stages["safe"], evaluate=False)
    sources = {
        "one": None,
        "two": None,
        "again": "base",
        "three": "one",
        "four": None,
        "five": str(elsewhere),
    }
    recipe.stages = {name: replace(plain, start_from=source) for name, source in sources.items()}
    recipe.evaluation.baseline = False
    run(recipe)
    assert starts == {
        "one": recipe.model.id,
        "two": "left by one",
        "again": recipe.model.id,
        "three": "left by one",
        "four": "left by three",
        "five": str(elsewhere),
    }


@pytest.mark.usefixtures("quick_reports")
def test_every_variant_of_a_stage_is_judged_by_its_own_name(
    recipe: Recipe, surroundings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = recipe.model.id
    monkeypatch.setitem(
        run_module.RUNNERS,
        PreferenceStageConfig,
        lambda *_: StageResult(model, 0.0, {}, variants={"0.25": model, "0.5": model}),
    )
    recipe.stages = {"merge": recipe.stages["safe"]}
    assert run(recipe) == 0
    folder = Path(recipe.output_dir) / "test" / "seed0"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["states"]) == ["base", "aligned-0.25", "aligned-0.5"]
    assert (folder / "eval/merge-0.25/report.json").exists()
    assert summary["promoted"] == "aligned-0.5"
    # Read back from done.json, nothing is done twice.
    num_judged = surroundings.judge.num_judged
    assert run(recipe) == 0
    assert surroundings.judge.num_judged == num_judged


def test_states_of_a_sort_are_called_by_their_stage(make_stage: Any) -> None:
    judged, silent, bias = make_stage(evaluate=True), make_stage(evaluate=False), TokenBiasStageConfig()
    assert state_names({"helpful": silent, "safe": judged, "token_bias": bias}) == {
        "safe": "aligned",
        "token_bias": "tsdi",
    }
    assert state_names({"helpful": judged, "safe": judged, "token_bias": bias}) == {
        "helpful": "helpful",
        "safe": "safe",
        "token_bias": "tsdi",
    }


class Trainer:
    """One that its callback knows."""

    def __init__(self) -> None:
        self.callback = self.step

    def step(self) -> None:
        """Never called."""


def test_what_a_stage_held_is_gone_before_its_result_is_judged(
    tmp_path: Path, make_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Trainer]] = []

    def train(*_: object) -> StageResult:
        trainer = Trainer()
        held.append(weakref.ref(trainer))
        return StageResult("model", 0.0, {})

    monkeypatch.setitem(run_module.RUNNERS, PreferenceStageConfig, train)
    recipe = SimpleNamespace(resume=SimpleNamespace(keep_last=False))
    context: Any = SimpleNamespace(stage_dir=lambda name: tmp_path, recipe=recipe)
    gc.disable()
    try:
        run_module._run_stage("safe", make_stage(), "model", context)
    finally:
        gc.enable()
    assert held[0]() is None
