from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

import equipoise.recipes
from equipoise.data.schema import LabelledExchange
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.data_checks import check_data
from equipoise.train.recipe.loading import load_recipe
from equipoise.train.recipe.stages import KTOStageConfig, PreferenceStageConfig

RECIPES = str(Path(next(iter(equipoise.recipes.__path__))).resolve())


def recipe(*overrides: str) -> Recipe:
    with initialize_config_dir(RECIPES, version_base=None):
        return load_recipe(compose("config", overrides=list(overrides)))


def refused(*overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        recipe(*overrides)
    return str(error.value)


def test_both_orders_of_sacpo_and_either_kind() -> None:
    helpful_first, safe_first = recipe("recipe=sacpo", "lam=10"), recipe("recipe=sacpo_safety_first")
    assert list(helpful_first.stages) == ["helpful", "safe"]
    assert list(safe_first.stages) == ["safe", "helpful"]
    for of in (helpful_first, safe_first):
        assert of.stages["safe"].beta / of.stages["safe"].lam == pytest.approx(0.01)
        assert of.stages["helpful"].beta / of.stages["helpful"].lam == 0.1
    swapped = recipe(
        "recipe=sacpo", "~stages.safe.loss", "stages.safe.kind=kto", "+stages.safe.split_pairs=true"
    )
    assert isinstance(swapped.stages["helpful"], PreferenceStageConfig)
    assert isinstance(swapped.stages["safe"], KTOStageConfig)
    assert swapped.stages["safe"].lam == 4.0


def test_a_preference_file_needs_the_flag_that_splits_pairs(tmp_path: Path) -> None:
    pairs, answers = tmp_path / "pairs.jsonl", tmp_path / "answers.jsonl"
    pairs.write_text("{}\n")
    answers.write_text("{}\n")
    preference_file = ["recipe=kto", "data=jsonl", f"data.path={pairs}"]
    problem = refused(*preference_file)
    assert "stages.safe.split_pairs: found false, but data.source=jsonl holds preference pairs" in problem
    assert "set stages.safe.split_pairs=true to split each pair in two" in problem
    assert recipe(*preference_file, "stages.safe.split_pairs=true").stages["safe"].split_pairs
    assert recipe(*preference_file, f"+data.unpaired_path={answers}").data.unpaired_path == str(answers)
    assert recipe("recipe=kto").stages["safe"].undesirable_weight is None
    assert "no kto stage without split_pairs reads it" in refused(
        "recipe=dpo", f"+data.unpaired_path={answers}"
    )
    assert "which is no file" in refused("recipe=kto", f"+data.unpaired_path={tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["recipe=kto", "stages.safe.per_device_batch_size=1"], "expected at least 2: the reference point"),
        (["recipe=kto", "stages.safe.desirable_weight=0"], "desirable_weight: found 0.0, expected a number above 0"),
        (["recipe=kto", "+stages.safe.category.margin.enabled=true"], "a margin would weaken the pull"),
        (["recipe=kto", "+stages.safe.loss.name=ipo"], "stages.safe.loss: unknown key"),
        (["recipe=p_sacpo", "stages.merged.first=saef"], "stages.merged.first: found 'saef', expected base, helpful"),
        (["recipe=p_sacpo", "stages.merged.first=safe"], "which is first too: nothing to merge"),
        (["recipe=p_sacpo", "stages.merged.first=''"], "stages.merged.first: has to be given"),
        (["recipe=p_sacpo", "+stages.merged.start_from=base"], "a merge starts from first and second; expected null"),
        (["recipe=p_sacpo", "stages.merged.second_weights=[0.5,1.5]"], "expected numbers in [0, 1]"),
        (["recipe=p_sacpo", "stages.merged.second_weights=[0.5,0.5]"], "at least one number, and none twice"),
        (["recipe=p_sacpo", "stages.merged.second_weights=[a]"], "expected a list of numbers"),
        (["recipe=p_sacpo", "stages.merged.pass_on=0.3"], "pass_on: found 0.3, expected one of second_weights"),
        (["recipe=p_sacpo", "stages.merged.of=heads"], "possible: weights, adapters"),
        (
            ["recipe=p_sacpo", "stages.merged.of=adapters", "model.lora.enabled=false"],
            "trains without an adapter (model.lora.enabled=false); set of=weights",
        ),
        (["recipe=p_sacpo", "stages.merged.of=adapters", "stages.merged.first=base"], "which has no adapter"),
        (["recipe=category_lambda", "+stages.safe.category.multiplier.initial.S99=2"], "initial.S99: unknown key"),
        (
            ["recipe=category_lambda", "+stages.safe.category.multiplier.initial.S1=20"],
            "found 20.0, expected a number in [0.135, 7.39] (max_log=2.0)",
        ),
        (["recipe=category_margin", "+stages.safe.category.margin.targets.S1=2"], "found 2.0, expected a share in"),
        (["recipe=category_lambda", "stages.safe.category.multiplier.eta=-1"], "eta: found -1.0, expected at least 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides: list[str], problem: str) -> None:
    assert problem in refused(*overrides)


def test_lambda_and_targets_of_categories_that_do_not_occur_are_refused(make_data: Any) -> None:
    data = make_data()
    given = [
        "recipe=category_lambda",
        "+stages.safe.category.multiplier.initial.S4=2",
        "+stages.safe.category.multiplier.targets.S1=0.05",
        "+stages.safe.category.margin.targets.S5=0.05",
    ]
    with pytest.raises(RecipeError) as error:
        check_data(recipe(*given), data)
    problems = str(error.value).splitlines()[1:]
    assert [problem.split(": nothing that this stage trains on")[0].strip() for problem in problems] == [
        "stages.safe.category.margin.targets.S5",
        "stages.safe.category.multiplier.initial.S4",
    ]
    assert problems[0].endswith("occurring: S1, S2, S10, helpful")


def test_a_share_of_answers_that_are_not_there_is_refused(make_data: Any, tmp_path: Path) -> None:
    data = make_data()
    data.labelled.append(LabelledExchange("x", data.safety_pairs[0].prompt, "No.", "S1", safe=True))
    check_data(recipe("recipe=kto"), data)
    with pytest.raises(RecipeError, match=r"mixture.helpful: found 0.5, but there are no helpful answers"):
        check_data(recipe("recipe=kto", "stages.safe.mixture.helpful=0.5"), data)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(RecipeError, match=r"answers.jsonl:1: desirable: is missing"):
        check_data(recipe("recipe=kto", f"+data.unpaired_path={answers}"), data)
