from dataclasses import replace
from typing import Any

import pytest

from equipoise.data.sources import SafetyData
from equipoise.train.recipe import LossConfig, Recipe, RecipeError
from equipoise.train.recipe.data_checks import check_data
from equipoise.train.recipe.stages import KLConfig, PreferenceStageConfig, SFTStageConfig, TrainingConfig

BOTH = {"safety": 0.5, "helpful": 0.5}


def problems(stage: TrainingConfig, data: SafetyData) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        check_data(Recipe(name="mine", stages={"safe": stage}), data)
    return dict(line.strip().split(": ", 1) for line in str(caught.value).splitlines()[1:])


@pytest.mark.parametrize("kind", [PreferenceStageConfig, SFTStageConfig])
def test_a_coefficient_of_a_category_that_does_not_occur(kind: Any, make_data: Any) -> None:
    data = make_data()
    check_data(
        Recipe("mine", {"safe": kind(mixture=BOTH, kl=KLConfig(per_category={"S1": 1, "helpful": 2}))}), data
    )
    found = problems(kind(kl=KLConfig(per_category={"S7": 1.0, "S1": 1.0, "helpful": 1.0})), data)
    assert found == {
        "stages.safe.kl.per_category.S7": "nothing that this stage trains on has this category; occurring: "
        "S1, S2, S10",
        "stages.safe.kl.per_category.helpful": "nothing that this stage trains on has this category; occurring: S1, "
        "S2, S10",
    }


@pytest.mark.parametrize("kind", [PreferenceStageConfig, SFTStageConfig])
def test_a_share_or_a_penalty_on_pairs_that_are_not_there(kind: Any, make_data: Any) -> None:
    data = replace(make_data(), helpful_pairs=[])
    found = problems(kind(mixture=BOTH, kl=KLConfig(coef=1.0, on="benign")), data)
    assert found == {
        "stages.safe.mixture.helpful": "found 0.5, but the data has no helpful pairs; set it to 0 or add such pairs",
        "stages.safe.kl.on": "found 'benign', but the data has no helpful pairs to take benign answers from",
    }


def test_safedpo_without_labels(make_data: Any) -> None:
    data = make_data()
    data.safety_pairs[:2] = [replace(pair, rejected_safe=None) for pair in data.safety_pairs[:2]]
    stage = PreferenceStageConfig(loss=LossConfig("sigmoid", mix={"safedpo": 0.5}))
    assert problems(stage, data)["stages.safe.loss"].startswith(
        "SafeDPO needs to know of both answers whether they are safe, and 2 of 24 pairs do not say (first: S1-0, S1-1)"
    )
    stage.loss.unlabelled = "drop"
    check_data(Recipe("mine", {"safe": stage}), data)


def test_sft_on_unsafe_answers_alone(make_data: Any) -> None:
    data = make_data()
    data.safety_pairs[:] = [replace(pair, chosen_safe=False) for pair in data.safety_pairs]
    assert (
        problems(SFTStageConfig(), data)["stages.safe.mixture"] == "all 24 chosen answers are labelled unsafe"
    )
