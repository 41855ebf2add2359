import copy
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from equipoise.train import claim as claim_module
from equipoise.train.claim import LAUNCH_FILE, claimed, forced, recipe_digest, recipe_digests
from equipoise.train.locks import FolderInUseError
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.stages import PreferenceStageConfig


@pytest.fixture
def recipe() -> Recipe:
    stages = {
        name: PreferenceStageConfig(num_steps=4, per_device_batch_size=4) for name in ("first", "second")
    }
    return Recipe(name="test", stages=stages)


@pytest.fixture
def folder(tmp_path: Path, recipe: Recipe) -> Path:
    """A run's folder that the recipe has claimed."""
    with claimed(tmp_path / "run", recipe):
        pass
    return tmp_path / "run"


def go_on(folder: Path, recipe: Recipe, *, force: bool = False, **keys: Any) -> None:
    """With `keys`, `__` for a dot, changed."""
    other = copy.deepcopy(recipe)
    other.resume.force = force
    for key, value in keys.items():
        *parents, last = key.split("__")
        holder: Any = other
        for parent in parents:
            holder = holder[parent] if isinstance(holder, dict) else getattr(holder, parent)
        setattr(holder, last, value)
    with claimed(folder, other):
        pass


def test_the_folder_says_whose_it_is_and_how_it_was_launched(folder: Path, recipe: Recipe) -> None:
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == asdict(recipe)
    launched = json.loads((folder / LAUNCH_FILE).read_text())
    assert (launched["num_processes"], launched["engine"], launched["forced"]) == (1, "single", [])
    assert launched["versions"].keys() >= {"equipoise", "torch"}
    assert launched["recipes"] == [recipe_digest(recipe)]
    go_on(folder, recipe)


def test_killed_between_the_two_files_the_claim_is_made_again(folder: Path, recipe: Recipe) -> None:
    before = (folder / LAUNCH_FILE).read_text()
    (folder / "recipe.yaml").unlink()
    go_on(folder, recipe)
    assert (folder / LAUNCH_FILE).read_text() == before
    assert (folder / "recipe.yaml").exists()


def test_what_says_nothing_about_the_result_may_change(folder: Path, recipe: Recipe) -> None:
    go_on(folder, recipe, tracking__tags=["again"], output_dir="moved", resume__keep_last=True)
    assert forced(folder) == []
    assert recipe_digest(recipe) == recipe_digest(copy.deepcopy(recipe))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stages__second__save_every", 2),
        ("stages__second__num_steps", 8),
        ("stages__second__num_epochs", 2.0),
        ("model__gradient_checkpointing", True),
        ("evaluation__batch_size", 4),
        ("gate__every", 2),
    ],
)
def test_what_is_sound_needs_force_and_is_remembered(
    key: str, value: Any, folder: Path, recipe: Recipe
) -> None:
    dotted = key.replace("__", ".")
    before = (folder / "recipe.yaml").read_text()
    with pytest.raises(
        RecipeError, match=rf"(?s)  {dotted}: .* -> {value}\nWith resume.force=true it goes on"
    ):
        go_on(folder, recipe, **{key: value})
    assert (folder / "recipe.yaml").read_text() == before
    go_on(folder, recipe, force=True, **{key: value})
    [(changed, (then, now))] = [item for mapping in forced(folder) for item in mapping.items()]
    assert (changed, now) == (dotted, value)
    assert then != now
    go_on(folder, recipe, **{key: value})  # the folder is now that recipe's
    assert recipe_digests(folder)[0] == recipe_digest(recipe) != recipe_digests(folder)[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__id", "another"),
        ("seed", 1),
        ("data__source", "jsonl"),
        ("stages__second__beta", 0.5),
        ("stages__first__learning_rate", 1.0),
        ("evaluation__max_new_tokens", 1),
    ],
)
def test_what_makes_another_run_is_refused_even_so(
    key: str, value: Any, folder: Path, recipe: Recipe
) -> None:
    reason = rf"  {key.replace('__', '.')}: .* -> {value!r}; with it this is another run"
    with pytest.raises(RecipeError, match=rf"(?s){reason}\nGive this run another name or seed"):
        go_on(folder, recipe, force=True, **{key: value})


def test_a_step_keeps_its_examples(folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RecipeError, match=r"stages.second: a step had 4 examples and would have 2 .*; keep the product"
    ):
        go_on(folder, recipe, force=True, stages__second__per_device_batch_size=2)
    halves = {"per_device_batch_size": 2, "gradient_accumulation_steps": 2}
    go_on(folder, recipe, force=True, **{f"stages__second__{key}": value for key, value in halves.items()})

    monkeypatch.setattr(claim_module, "launch", lambda: {"num_processes": 2, "engine": "ddp"})
    with pytest.raises(
        RecipeError, match=r"(?s)num_processes: 1 -> 2\n.*stages.first: a step had 4 .* would have 8"
    ):
        go_on(folder, recipe, force=True)
    for stage in recipe.stages.values():
        stage.per_device_batch_size = 2
    with pytest.raises(RecipeError, match=r"(?s)num_processes: 1 -> 2\n.*With resume.force=true it goes on"):
        go_on(folder, recipe)
    go_on(folder, recipe, force=True)
    assert json.loads((folder / LAUNCH_FILE).read_text())["num_processes"] == 2


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_sharded_checkpoints_want_as_many_processes(
    engine: str, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "launch", lambda: {"num_processes": 2, "engine": engine})
    go_on(tmp_path / "run", recipe)
    for stage in recipe.stages.values():
        stage.per_device_batch_size = 2
    monkeypatch.setattr(claim_module, "launch", lambda: {"num_processes": 4, "engine": engine})
    with pytest.raises(
        RecipeError, match=rf"num_processes: 2 -> 4; checkpoints of {engine} are written by each process"
    ):
        go_on(tmp_path / "run", recipe, force=True)


def finish(folder: Path, stage: str, *, checkpoint: bool) -> Path:
    done = folder / "stages" / stage / "done.json"
    done.parent.mkdir(parents=True)
    done.touch()
    if checkpoint:
        (done.parent / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    return done


def test_a_finished_stage_is_trained_on_where_its_last_checkpoint_was_kept(
    folder: Path, recipe: Recipe
) -> None:
    first, second = (finish(folder, name, checkpoint=True) for name in recipe.stages)
    with pytest.raises(RecipeError, match="first is finished, and a stage behind it has begun"):
        go_on(folder, recipe, force=True, stages__first__num_steps=8)
    go_on(folder, recipe, force=True, stages__second__num_steps=8)
    assert first.exists()
    assert not second.exists()


def test_without_it_it_is_not(folder: Path, recipe: Recipe) -> None:
    done = finish(folder, "first", checkpoint=False)
    with pytest.raises(RecipeError, match=r"its last checkpoint was not kept \(resume.keep_last=true\)"):
        go_on(folder, recipe, force=True, stages__first__num_steps=8)
    assert done.exists()


def test_under_other_rules_nothing_has_passed_yet(folder: Path, recipe: Recipe) -> None:
    (folder / "gate.jsonl").write_text('{"verdict": "PASS"}\n')
    (folder / "promoted").mkdir()
    go_on(folder, recipe, force=True, gate__rules={"overall_limit": 0.01})
    assert not (folder / "promoted").exists()
    assert not (folder / "gate.jsonl").exists()
    assert (folder / "gate-before-1.jsonl").read_text() == '{"verdict": "PASS"}\n'


def test_what_a_killed_run_had_half_written_is_removed(folder: Path, recipe: Recipe) -> None:
    stage = folder / "stages" / "first"
    for path in (
        folder / ".promoted.17",
        folder / ".promoted.old.17",
        stage / ".model.17",
        stage / ".saving",
    ):
        path.mkdir(parents=True)
        (path / ".summary.json.17.part").touch()
    (folder / ".summary.json.17.part").touch()
    (stage / ".mine").touch()
    (folder / "eval" / "first-2" / ".work").mkdir(parents=True)
    go_on(folder, recipe)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith(".")}
    assert left == {".lock", "stages/first/.mine"}


def test_versions_that_changed_are_said(
    folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claim_module, "versions", lambda: {"torch": "99"})
    go_on(folder, recipe)
    assert "torch was " in (said := capsys.readouterr().out)
    assert "and is 99 now: the end may differ in the last bits" in said


def test_one_process_at_a_time_works_in_a_folder(folder: Path, recipe: Recipe, folder_in_use: Any) -> None:
    """The other one holds the lock, and loses it when it is killed."""
    with folder_in_use(folder) as other:
        with pytest.raises(FolderInUseError, match=r"is in use by process 17 on there\. Wait for it to end"):
            go_on(folder, recipe)
        other.kill()
        other.wait()
        go_on(folder, recipe)


def test_a_folder_that_the_machines_do_not_share(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a second rank, to which the first has told what it wrote."""
    monkeypatch.setattr(claim_module, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(claim_module, "gather_object", lambda mine: [None, *mine])
    monkeypatch.setattr(claim_module, "from_first", lambda make: "name: test\n")
    monkeypatch.setattr(claim_module, "SECONDS_TO_APPEAR", 0.0)
    with pytest.raises(RecipeError, match=f"is not shared: {os.uname().nodename} cannot see"):
        go_on(tmp_path, recipe)
    (tmp_path / "recipe.yaml").write_text("name: of an earlier run\n")
    with pytest.raises(RecipeError, match="is not shared"):
        go_on(tmp_path, recipe)
    monkeypatch.setattr(claim_module, "SECONDS_TO_APPEAR", 10.0)
    monkeypatch.setattr(
        claim_module.time, "sleep", lambda _: (tmp_path / "recipe.yaml").write_text("name: test\n")
    )
    go_on(tmp_path, recipe)
