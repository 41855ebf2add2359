import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.data.sources import SafetyData
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.eval.judges.base import Judge
from equipoise.train import run as run_module
from equipoise.train.claim import claimed
from equipoise.train.recipe import EvaluationConfig, GateConfig, ModelConfig, Recipe, RecipeError
from equipoise.train.recipe.stages import (
    CategoryConfig,
    MarginConfig,
    PreferenceStageConfig,
    TokenBiasStageConfig,
)
from equipoise.train.run import run, state_names
from equipoise.train.stages.context import StageResult

pytestmark = pytest.mark.slow

# With an alpha like this two prompts a category are enough to say something.
LENIENT = {
    "category_limit": 1.0,
    "overall_limit": 1.0,
    "alpha": 0.9,
    "over_refusal_margin": 1.0,
    "helpfulness_margin": 100.0,
    "min_samples": 1,
}


def make_recipe(folder: Path, model: Path, stage: PreferenceStageConfig) -> Recipe:
    """Helpful, safe, token bias, as the recipe tsdi has them, in two steps each."""
    return Recipe(
        name="test",
        output_dir=str(folder),
        stages={
            "helpful": replace(stage, mixture={"helpful": 1.0}, num_steps=2),
            "safe": replace(stage, num_steps=2, evaluate=True),
            "token_bias": TokenBiasStageConfig(num_prompts=4, num_positions=2, prompt_tokens=4),
        },
        model=ModelConfig(id=str(model), dtype="float32"),
        evaluation=EvaluationConfig(max_new_tokens=3),
        gate=GateConfig(rules=LENIENT),
    )


@dataclass
class Surroundings:
    """What a run is given in these tests instead of the embedded judge and the shipped data."""

    patch: pytest.MonkeyPatch
    data: SafetyData
    judge: Any

    def apply(self) -> None:
        self.patch.setattr(run_module, "load_data", lambda *_: copy.deepcopy(self.data))
        self.patch.setattr(run_module, "load_judge", lambda recipe: self.judge)


@pytest.fixture
def surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_data: Callable[..., SafetyData], make_judge: Any
) -> Surroundings:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    around = Surroundings(monkeypatch, make_data(), make_judge(lambda prompt, response: False))
    around.apply()
    return around


@pytest.fixture
def quick_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTML without plots: they take a second each, and have tests of their own."""
    monkeypatch.setattr(
        "equipoise.train.gatekeeper.write_report", lambda path, *_, **__: path.write_text("<html>")
    )


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, make_stage: Any) -> Recipe:
    return make_recipe(tmp_path / "outputs", tiny_model_folder, make_stage())


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
    tiny_model_folder: Path,
    make_data: Callable[..., SafetyData],
    make_stage: Any,
    make_judge: Any,
) -> Finished:
    """A run of three stages that passes its gate."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder / "outputs", tiny_model_folder, make_stage())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUIPOISE_CACHE", str(folder / "cache"))
        around = Surroundings(patch, make_data(), make_judge(lambda prompt, response: False))
        around.apply()
        exit_code = run(recipe)
    return Finished(recipe, folder / "outputs" / "test" / "seed0", exit_code, around.judge.num_judged)


def files(folder: Path) -> dict[str, int]:
    """Name -> when it was written; but for the lock, which every command takes."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def test_the_folder_of_a_run(finished: Finished) -> None:
    assert finished.exit_code == 0
    found = set(files(finished.folder))
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
    finished: Finished, surroundings: Surroundings, capsys: pytest.CaptureFixture[str]
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


def test_another_recipe_in_the_folder_is_refused(finished: Finished, surroundings: Surroundings) -> None:
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


# ---- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_reports")
@pytest.mark.parametrize(
    ("bad", "rules", "exit_code", "verdict"),
    [
        (True, {"category_limit": 0.0, "overall_limit": 0.0, "min_samples": 1}, 3, "FAIL"),
        (False, LENIENT | {"min_samples": 1000}, 4, "INCONCLUSIVE"),
    ],
)
def test_what_does_not_pass_is_not_promoted(
    bad: bool,
    rules: dict[str, Any],
    exit_code: int,
    verdict: str,
    recipe: Recipe,
    surroundings: Surroundings,
    make_judge: Any,
) -> None:
    surroundings.judge = make_judge(lambda prompt, response: bad)
    recipe.gate.rules = rules
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
    surroundings: Surroundings,
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
    recipe: Recipe, surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "native_dtype", lambda: "float32")
    recipe.model.dtype = "native"
    recipe.evaluation.baseline = False
    recipe.stages = {"safe": replace(recipe.stages["safe"], num_steps=1, evaluate=False)}
    run(recipe)
    folder = Path(recipe.output_dir) / "test" / "seed0"
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["dtype"] == "float32"


# ---- interruptions, and evaluations inside a stage -------------------------------------------------------------------


@pytest.mark.usefixtures("quick_reports")
def test_an_interrupted_run_goes_on_where_it_stopped(
    recipe: Recipe, surroundings: Surroundings, finished: Finished, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.usefixtures("quick_reports")
def test_a_stage_is_gated_inside_and_steered(
    recipe: Recipe, surroundings: Surroundings, make_judge: Any
) -> None:
    surroundings.judge = make_judge(lambda prompt, response: "S2" in prompt)
    category = CategoryConfig(
        MarginConfig(enabled=True, eta=1.0, target=0.1), shrinkage=0.0, update_every=100
    )
    recipe.stages = {"safe": replace(recipe.stages["safe"], num_steps=4, category=category)}
    recipe.gate = GateConfig(every=2, rules=LENIENT)
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
    recipe: Recipe, surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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
    recipe: Recipe, surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
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
