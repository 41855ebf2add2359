"""What a recipe may say about its data, found before any of it is read."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import equipoise.recipes
from equipoise.data.config import DataConfig
from equipoise.data.sources import FILE_SOURCES, HUB_SOURCES
from equipoise.train.recipe import RecipeError
from equipoise.train.recipe.loading import load_recipe

OPTIONS = Path(equipoise.recipes.__path__[0]) / "data"


def loaded(option: str, **keys: Any) -> DataConfig:
    """The data of a recipe with `data=option` and some keys set."""
    data = OmegaConf.merge(OmegaConf.load(OPTIONS / f"{option}.yaml"), keys)
    stages = {"safe": {"kind": "preference"}}
    return load_recipe(OmegaConf.create({"name": "mine", "stages": stages, "data": data})).data


def problems(option: str, **keys: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        loaded(option, **keys)
    return str(caught.value)


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    (tmp_path / "pairs.jsonl").touch()
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("name", HUB_SOURCES)
def test_every_hub_source_is_an_option_of_the_group_data(name: str) -> None:
    data = loaded(name, held_out_fraction=0.1)
    assert data.source == name
    assert data.mirror is None


@pytest.mark.parametrize("name", FILE_SOURCES)
def test_every_file_source_is_an_option_that_needs_a_path(name: str, pairs_file: str) -> None:
    assert "data.path: has to be given" in problems(name)
    assert loaded(name, path=pairs_file, taxonomy="beavertails").source == name
    folder = str(Path(pairs_file).parent)
    assert loaded(name, path=folder, fields={"prompt": "a.b"}).fields == {"prompt": "a.b"}


def test_a_version_and_a_mixture_of_versions(pairs_file: str) -> None:
    assert loaded("pku_saferlhf", source="pku_saferlhf/30k").source == "pku_saferlhf/30k"
    mixture = {"hh_rlhf/harmless": 0.5, "hh_rlhf/helpful": 0.3, "jsonl": 0.2}
    assert loaded("mixture", mixture=mixture, path=pairs_file).mixture == mixture


@pytest.mark.parametrize(
    ("option", "keys", "problem"),
    [
        ("mixture", {}, "data.mixture: has to be given: data.mixture=..."),
        (
            "mixture",
            {"mixture": {"safety": 0, "helpful": 1}},
            "data.mixture.safety: found 0.0, expected a number",
        ),
        (
            "mixture",
            {"mixture": {"safety": -1}},
            "data.mixture.safety: found -1.0, expected a number above 0",
        ),
        ("mixture", {"mixture": {"safty": 1}}, "data.mixture.safty: unknown key; did you mean 'safety'?"),
        ("mixture", {"mixture": {"csv": 1}}, "data.path: has to be given with data.source=csv"),
        ("mixture", {"mixture": {"csv": 1, "jsonl": 1}, "path": "."}, "there is one data.path"),
        (
            "samples",
            {"mixture": {"safety": 1}},
            "data.mixture: found parts, but data.source=samples reads none",
        ),
        ("pku_saferlhf", {"source": "pku_saferlhf/31k"}, "did you mean 'pku_saferlhf/30k'"),
        ("pku_saferlhf", {"both_safe": "maybe"}, "data.both_safe: found 'maybe', possible: keep, drop, mark"),
        (
            "pku_saferlhf",
            {"preference": "better"},
            "data.preference: found 'better', possible: safe, helpful",
        ),
        ("pku_saferlhf", {"mirror": "/nowhere"}, "data.mirror: found '/nowhere', which is no folder"),
        ("pku_saferlhf", {"num_rows": 0}, "data.num_rows: found 0, expected at least 1"),
        ("pku_saferlhf", {"path": "."}, "data.path: found '.', but data.source=pku_saferlhf reads no file"),
        (
            "pku_saferlhf",
            {"taxonomy": "beavertails"},
            "data.taxonomy: found 'beavertails', but data.source=pku",
        ),
        (
            "jsonl",
            {"path": ".", "fields": {"answer": "a"}},
            "data.fields: found 'answer', possible: category",
        ),
        (
            "jsonl",
            {"path": ".", "taxonomy": "pku"},
            "'pku' is neither a file nor a crosswalk that is shipped",
        ),
    ],
)
def test_what_cannot_work_is_named_with_its_key(option: str, keys: dict[str, Any], problem: str) -> None:
    assert problem in problems(option, **keys)


def test_a_taxonomy_with_mistakes_is_reported_with_the_recipe(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("labels: {slander: [S99]}")
    found = problems("jsonl", path=".", taxonomy=str(own))
    assert "labels.slander: found ['S99'], expected a list of categories" in found


def test_the_readme_tells_every_source_with_its_revision() -> None:
    readme = (OPTIONS.parents[1] / "data" / "README.md").read_text()
    for name, source in HUB_SOURCES.items():
        assert f"### {name}" in readme
        for version, hub_set in source.versions.items():
            assert version in readme
            assert hub_set.repo in readme
            assert hub_set.revision in readme
    for name in FILE_SOURCES:
        assert f"data={name}" in readme


def test_categories_of_an_own_taxonomy_may_be_named_anywhere(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("categories: {brand: {name: Brand, description: Running down the company.}}")
    gate = {"rules": {"category_limits": {"brand": 0.1}}}
    stages = {"safe": {"kind": "preference", "kl": {"coef": 0.1, "per_category": {"brand": 0.2}}}}
    data = {"source": "jsonl", "path": str(tmp_path)}
    recipe = {"name": "mine", "stages": stages, "gate": gate, "data": {**data, "taxonomy": str(own)}}
    assert load_recipe(OmegaConf.create(recipe)).data.taxonomy == str(own)
    with pytest.raises(RecipeError) as caught:
        load_recipe(OmegaConf.create({**recipe, "data": data}))
    assert str(caught.value).count("unknown key; possible: S1") == 2
