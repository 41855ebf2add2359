from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.errors import DataError
from equipoise.data.sources import SafetyData
from equipoise.train import run as run_module
from equipoise.train.planning.dry_run import plan
from equipoise.train.recipe import LoraConfig, ModelConfig, Recipe, RecipeError
from equipoise.train.recipe.stages import TokenBiasStageConfig
from equipoise.train.run import run


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, make_stage: Any) -> Recipe:
    return Recipe(
        name="test",
        output_dir=str(tmp_path / "outputs"),
        dry_run=True,
        stages={"safe": make_stage(evaluate=True), "token_bias": TokenBiasStageConfig(num_prompts=4)},
        model=ModelConfig(id=str(tiny_model_folder), dtype="float32"),
    )


def told(recipe: Recipe, data: SafetyData, capsys: pytest.CaptureFixture[str]) -> str:
    """Everything that a plan says and prints."""
    said: list[str] = []
    plan(recipe, data, recipe.model.id, said.append, lambda *call: None)
    return "\n".join([*said, capsys.readouterr().out])


def test_a_dry_run_writes_nothing(
    recipe: Recipe,
    tmp_path: Path,
    make_data: Callable[..., SafetyData],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "load_data", lambda *_: make_data())
    assert run(recipe) == 0
    assert list(tmp_path.iterdir()) == []
    assert "nothing was trained, nothing was written" in " ".join(capsys.readouterr().out.split())


def test_the_plan(
    recipe: Recipe,
    make_data: Callable[..., SafetyData],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = told(recipe, make_data(), capsys)
    assert "safe: pairs by category: S1 8, S2 8, S10 8, helpful 8" in text
    assert "token_bias" in text
    assert "3 states" in text  # base, after safe, after the token bias
    assert "0 M parameters" in text


def test_pairs_that_are_too_long_are_told(
    recipe: Recipe, make_data: Callable[..., SafetyData], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.data.max_length = 70
    assert "pairs are longer than data.max_length=70 tokens and left out" in told(recipe, make_data(), capsys)
    recipe.data.max_length = 10
    with pytest.raises(DataError, match=r"none of 32 pairs fits into data\.max_length=10"):
        told(recipe, make_data(), capsys)


def test_a_share_of_nothing_is_found(
    recipe: Recipe, make_data: Callable[..., SafetyData], capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data()
    data.helpful_pairs.clear()
    with pytest.raises(
        RecipeError, match=r"mixture: helpful has a share of 0\.25, but the data has no helpful pairs"
    ):
        told(recipe, data, capsys)


def test_full_fine_tuning_is_planned_too(
    recipe: Recipe, make_data: Callable[..., SafetyData], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.model.lora = LoraConfig(enabled=False)
    assert "GiB" in told(recipe, make_data(), capsys)
