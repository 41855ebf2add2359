from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from datasets import Dataset

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL, PreferencePair
from equipoise.data.sources import SafetyData, normalise_prompt
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.data_checks import check_data
from equipoise.train.recipe.stages import CostModelStageConfig, RewardModelStageConfig
from equipoise.train.scorer_pairs import scorer_pairs, scorer_rows, split_by_prompt

MakeData = Callable[..., SafetyData]


def test_no_prompt_is_on_both_sides_however_it_is_written(make_data: MakeData) -> None:
    pairs = make_data().safety_pairs
    twins = [
        replace(
            p,
            id=f"{p.id}-twin",
            prompt=({"role": "user", "content": f"  {p.prompt[0]['content'].upper()}!"},),
        )
        for p in pairs
    ]
    training, held_out = split_by_prompt(pairs + twins, 0.25, seed=0)
    assert len(training) + len(held_out) == 2 * len(pairs)
    assert not {normalise_prompt(p.prompt) for p in training} & {normalise_prompt(p.prompt) for p in held_out}
    assert Counter(p.category for p in held_out) == {
        "S1": 4,
        "S2": 4,
        "S10": 4,
    }  # two of eight prompts, twice


@pytest.mark.parametrize(
    ("num", "fraction", "expected"),
    [(8, 0.0, 0), (8, 0.01, 1), (8, 0.5, 4), (8, 0.99, 7), (1, 0.5, 0), (2, 0.1, 1)],
    ids=["none", "at least one", "half", "never all", "one prompt is trained on", "one of two"],
)
def test_how_many_are_held_out(num: int, fraction: float, expected: int, make_data: MakeData) -> None:
    pairs = [pair for pair in make_data(num).safety_pairs if pair.category == "S1"]
    assert len(split_by_prompt(pairs, fraction, seed=0)[1]) == expected


def test_the_split_depends_on_seed_and_prompt_alone(make_data: MakeData) -> None:
    pairs = make_data(40).safety_pairs
    first = split_by_prompt(pairs, 0.2, seed=0)[1]
    assert {p.id for p in split_by_prompt(pairs[::-1], 0.2, seed=0)[1]} == {p.id for p in first}
    assert {p.id for p in split_by_prompt(pairs, 0.2, seed=1)[1]} != {p.id for p in first}


def test_a_prompt_of_two_categories_is_held_out_of_both(make_data: MakeData) -> None:
    pairs = [replace(p, category=c) for p in make_data().safety_pairs for c in ("S1", "S2")]
    training, held_out = split_by_prompt(pairs, 0.25, seed=0)
    assert not {p.id for p in training} & {p.id for p in held_out}
    assert len(held_out) % 2 == 0


def test_a_cost_models_pairs(make_data: MakeData) -> None:
    data = make_data()
    first, second, third, fourth, *_ = data.safety_pairs
    data.safety_pairs[:] = [
        first,
        replace(second, chosen_safe=False, rejected_safe=True),
        replace(third, chosen_safe=None),
        replace(fourth, chosen_safe=False, rejected_safe=False),
    ]
    pairs, facts = scorer_pairs(CostModelStageConfig(), data)
    assert facts == {"num_unlabelled": 1, "num_swapped": 1}
    assert [pair.id for pair in pairs] == [first.id, second.id, fourth.id]
    assert (pairs[1].chosen, pairs[1].rejected) == (second.rejected, second.chosen)
    assert (pairs[1].chosen_safe, pairs[1].rejected_safe) == (True, False)
    assert pairs[2].chosen == fourth.chosen  # both unsafe: as preferred
    assert scorer_pairs(RewardModelStageConfig(mixture={"safety": 1.0}), data) == (data.safety_pairs, {})


def test_without_labels_there_is_no_cost_model(make_data: MakeData) -> None:
    data = make_data()
    data.safety_pairs[:] = [replace(pair, chosen_safe=None) for pair in data.safety_pairs]
    message = r"none of 24 safety pairs has both labels. Add chosen_safe and rejected_safe"
    with pytest.raises(DataError, match=message):
        scorer_pairs(CostModelStageConfig(mixture={"safety": 0.5, "helpful": 0.5}), data)
    recipe = Recipe(name="x", stages={"cost": CostModelStageConfig()})
    with pytest.raises(RecipeError, match=r"stages.cost.kind: A cost model learns from (.|\n)*" + message):
        check_data(recipe, data)
    check_data(Recipe(name="x", stages={"reward": RewardModelStageConfig(mixture={"safety": 1.0})}), data)


def test_a_share_of_pairs_that_are_not_there_is_refused(make_data: MakeData) -> None:
    data = make_data()
    data.helpful_pairs.clear()
    with pytest.raises(
        RecipeError, match=r"stages.reward.mixture.helpful: found 1.0, but the data has no helpful pairs"
    ):
        check_data(Recipe(name="x", stages={"reward": RewardModelStageConfig()}), data)


def pair_row(pair: PreferencePair) -> dict[str, object]:
    ids = {"prompt_ids": [7], "chosen_ids": [5, 2, 9], "rejected_ids": [6, 2]}
    return ids | {
        "category": pair.category,
        "pair": 0,
        "chosen_safe": pair.chosen_safe,
        "rejected_safe": pair.rejected_safe,
    }


def test_rows_end_with_the_end_token_and_carry_signs(make_data: MakeData) -> None:
    data = make_data(1)
    unknown = replace(data.helpful_pairs[0], chosen_safe=None, rejected_safe=False)
    dataset = Dataset.from_list([pair_row(data.safety_pairs[0]), pair_row(unknown)])
    rows = scorer_rows(CostModelStageConfig(), dataset, {2})
    assert rows["chosen_ids"][0] == [5, 2]
    assert [(r["chosen_sign"], r["rejected_sign"], r["ordered"]) for r in rows] == [(-1, 1, 1), (-1, 1, 0)]
    assert rows["category"][1] == HELPFUL
    assert scorer_rows(RewardModelStageConfig(), dataset, {2})["ordered"][:] == [1, 1]
