"""Fixtures: the smallest recipe, with keys set."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from equipoise.train.recipe import RecipeError
from equipoise.train.recipe.loading import load_recipe


def _minimal(**changes: Any) -> DictConfig:
    return OmegaConf.create({"name": "mine", "stages": {"safe": {"kind": "preference"}}, **changes})


def _problems(**changes: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_minimal(**changes))
    return dict(line.strip().split(": ", 1) for line in str(caught.value).splitlines()[1:])


@pytest.fixture(scope="session")
def minimal() -> Callable[..., DictConfig]:
    """`minimal(**keys)`: a recipe of one preference stage."""
    return _minimal


@pytest.fixture(scope="session")
def minimal_problems() -> Callable[..., dict[str, str]]:
    """`minimal_problems(**keys)`: key -> reason, as the error about such a recipe lists them."""
    return _problems
