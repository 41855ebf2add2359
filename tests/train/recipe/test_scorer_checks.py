import pytest
from hydra import compose, initialize_config_module

from equipoise.train.recipe import RecipeError
from equipoise.train.recipe.loading import load_recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.cost.mixture.safety=0", "mixture: a cost model needs safety pairs"),
        ("+stages.cost.evaluate=true", "evaluate: found True, but the stage leaves the policy as it was"),
        ("stages.cost.held_out_fraction=1", r"held_out_fraction: found 1.0, expected a share in \[0, 1\)"),
        ("stages.cost.held_out_fraction=0", "eval_every: found 10, but held_out_fraction=0 leaves no pairs"),
        ("stages.cost.regularization=-1", "regularization: found -1.0, expected at least 0"),
        ("stages.cost.weight.mode=gdro", r"weight.mode: found 'gdro', did you mean 'group_dro'\?"),
        ("+stages.cost.beta=0.1", "beta: unknown key"),
        ("+stages.cost.mixture.harmful=1", "mixture.harmful: unknown key"),
    ],
)
def test_what_cannot_work_is_said(override: str, message: str) -> None:
    with initialize_config_module("equipoise.recipes", version_base="1.3"):
        composed = compose("config", ["recipe=cost_model", override])
    with pytest.raises(RecipeError, match=rf"stages.cost.{message}"):
        load_recipe(composed)
