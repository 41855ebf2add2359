"""A run of three stages: what it leaves, run again, refused and interrupted; others: `test_run_stages.py`."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.eval.generation.tsdi import TokenBias
from equipoise.train import run as run_module
from equipoise.train.claim import claimed
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.stages import TokenBiasStageConfig
from equipoise.train.run import run

pytestmark = pytest.mark.slow


# ---- one run, looked at from all sides ------------------------------------------------------------------------------


@dataclass
class Finished:
    recipe: Recipe
    folder: Path
    exit_code: int
    num_judged: int


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    make_run_recipe: Callable[[Path], Recipe],
    surround: Any,
) -> Finished:
    """A run of three stages that passes its gate."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_run_recipe(folder / "outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUIPOISE_CACHE", str(folder / "cache"))
        around = surround(patch)
        exit_code = run(recipe)
    return Finished(recipe, folder / "outputs" / "test" / "seed0", exit_code, around.judge.num_judged)


def files(folder: Path) -> dict[str, int]:
    """Name -> when it was written; but for the lock, which every command takes."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def test_the_folder_of_a_run(finished: Finished) -> None:
    assert finished.exit_code == 0
    written = files(finished.folder)
    found = set(written)
    assert {
        "recipe.yaml",
        "metrics.jsonl",
        "gate.jsonl",
        "summary.json",
        "report.html",
        "stages/helpful/model/model.safetensors",
        "stages/helpful/category_state.json",
        "stages/helpful/done.json",
        "stages/safe/model/model.safetensors",
        "stages/safe/category_state.json",
        "stages/safe/done.json",
        "stages/token_bias/token_bias.safetensors",
        "stages/token_bias/done.json",
        "eval/base-0/report.json",
        "eval/base-0/report.html",
        "eval/safe-2/report.json",
        "eval/safe-2/report.html",
        "eval/token_bias-0/report.json",
        "eval/token_bias-0/report.html",
        "promoted/model.safetensors",
        "promoted/token_bias.safetensors",
    } <= found
    assert written["report.html"] <= written["summary.json"]  # with a summary the run is done
    assert not [name for name in found if "checkpoint" in name or "/." in name or name.startswith(".")]
    assert yaml.safe_load((finished.folder / "recipe.yaml").read_text())["stages"]["safe"]["num_steps"] == 2


def test_what_was_logged(finished: Finished) -> None:
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line.get("step")) for line in lines] == [
        ("base-0", 0),
        ("helpful", 1),
        ("helpful", 2),
        ("safe", 1),
        ("safe", 2),
        ("safe-2", 0),
        ("safe-2", 0),  # the gate's verdict behind the rates
        ("token_bias-0", 0),
        ("token_bias-0", 0),
        ("end", None),
    ]
    assert lines[-1]["exit_code"] == 0
    assert lines[0]["eval/unsafe_rate/S1"] == 0


def test_the_summary(finished: Finished) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert list(summary["states"]) == ["base", "aligned", "tsdi"]
    for state in summary["states"].values():
        text = json.dumps(state)
        assert all(f'"{name}"' in text for name in ("S1", "S2", "S10", "rate", "n", "low", "high"))
    assert (summary["verdict"], summary["promoted"], summary["exit_code"]) == ("PASS", "tsdi", 0)
    assert {name: result["verdict"] for name, result in summary["gate"].items()} == {
        "aligned": "PASS",
        "tsdi": "PASS",
    }
    assert set(summary["seconds"]) == {
        "evaluate base",
        "helpful",
        "safe",
        "evaluate safe",
        "token_bias",
        "evaluate token_bias",
    }
    assert summary["peak_memory_bytes"] > 1e8
    assert summary["stages"]["safe"]["num_pairs"] == 32
    verdicts = [json.loads(line) for line in (finished.folder / "gate.jsonl").read_text().splitlines()]
    assert [(v["label"], v["verdict"], v["promoted"]) for v in verdicts] == [
        ("safe-2", "PASS", True),
        ("token_bias-0", "PASS", True),
    ]


def test_what_is_promoted_loads_and_answers(finished: Finished) -> None:
    promoted = finished.folder / "promoted"
    tokenizer = AutoTokenizer.from_pretrained(promoted)
    model = AutoModelForCausalLM.from_pretrained(promoted)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hm?"}], return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]
    weights = load_file(finished.folder / "stages/safe/model/model.safetensors")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())
    assert TokenBias.load(promoted / "token_bias.safetensors").bias.shape == (2, 259)


def test_each_stage_goes_on_from_the_one_before(finished: Finished, tiny_model_folder: Path) -> None:
    base, helpful, safe = (
        load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        for folder in (
            tiny_model_folder,
            finished.folder / "stages/helpful/model",
            finished.folder / "stages/safe/model",
        )
    )
    assert 0 < float((helpful - base).abs().max()) < 0.05
    assert 0 < float((safe - helpful).abs().max()) < 0.05
    assert not torch.equal(safe, base)


@pytest.mark.usefixtures("quick_reports")
def test_a_finished_run_runs_again_without_doing_anything_twice(
    finished: Finished, surroundings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(finished.folder)
    metrics = (finished.folder / "metrics.jsonl").read_text().splitlines()
    gate = (finished.folder / "gate.jsonl").read_text()
    states = json.loads((finished.folder / "summary.json").read_text())["states"]
    assert run(finished.recipe) == 0
    assert surroundings.judge.num_judged == 0
    assert capsys.readouterr().out.count("finished before, kept") == 3
    after = files(finished.folder)
    kept = {name for name in before if name.startswith("stages/") or name.endswith("report.json")}
    assert len(kept) > 10
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert (finished.folder / "metrics.jsonl").read_text().splitlines()[:-1] == metrics[
        :-1
    ]  # the last is the end
    assert (finished.folder / "gate.jsonl").read_text() == gate
    assert json.loads((finished.folder / "summary.json").read_text())["states"] == states


def test_another_recipe_in_the_folder_is_refused(finished: Finished, surroundings: Any) -> None:
    before = files(finished.folder)
    other = copy.deepcopy(finished.recipe)
    other.stages["safe"].learning_rate = 1e-5
    other.stages["more"] = other.stages.pop("token_bias")
    other.evaluation.max_new_tokens = 7
    with pytest.raises(RecipeError) as error:
        run(other)
    differs = str(error.value).splitlines()[1:-1]
    keys = ["stages.safe.learning_rate", "stages.token_bias", "stages.more", "evaluation.max_new_tokens"]
    assert [line.split(":")[0].strip() for line in differs] == keys
    assert "stages.safe.learning_rate: 0.001 -> 1e-05; with it this is another run" in differs[0]
    assert files(finished.folder) == before


def test_tracking_and_place_may_change(finished: Finished) -> None:
    other = copy.deepcopy(finished.recipe)
    other.tracking.tags, other.output_dir = ["again"], "moved"
    with claimed(finished.folder, other):
        pass


# ---- an interruption ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_reports")
def test_an_interrupted_run_goes_on_where_it_stopped(
    recipe: Recipe, surroundings: Any, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(run_module.RUNNERS, TokenBiasStageConfig, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    num_judged = surroundings.judge.num_judged
    assert run(recipe) == 0
    assert surroundings.judge.num_judged == num_judged + 12  # the last state's suites alone
    folder = Path(recipe.output_dir) / "test" / "seed0"
    stages = [json.loads(line)["stage"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert stages == [
        "base-0",
        *["helpful"] * 2,
        *["safe"] * 2,
        *["safe-2"] * 2,
        *["token_bias-0"] * 2,
        "end",  # how the first attempt ended is not kept: the file is that of an uninterrupted run
    ]
    mine, theirs = (load_file(f / "promoted/model.safetensors") for f in (folder, finished.folder))
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
