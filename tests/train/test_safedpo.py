import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from equipoise.data.schema import HELPFUL
from equipoise.data.sources import SafetyData
from equipoise.train.provenance import provenance
from equipoise.train.recipe import LossConfig, Recipe
from equipoise.train.recipe.stages import KLConfig

LOSS = LossConfig("safedpo", delta=2.0)


@pytest.fixture
def data(make_data: Any) -> SafetyData:
    """Of 24 safety pairs 16 as they are (rejected unsafe), three with the chosen answer unsafe, five with both."""
    data: SafetyData = make_data()
    pairs = data.safety_pairs
    pairs[:3] = [replace(pair, chosen_safe=False, rejected_safe=True) for pair in pairs[:3]]
    pairs[3:8] = [replace(pair, chosen_safe=False) for pair in pairs[3:8]]
    data.helpful_pairs[0] = replace(data.helpful_pairs[0], chosen_safe=None, rejected_safe=None)
    return data


def test_a_stage_drops_swaps_and_counts(train_stage: Any, make_stage: Any, data: SafetyData) -> None:
    trained = train_stage(make_stage(loss=LOSS, num_steps=3), data=data)
    assert trained.said[0] == (
        "safe: SafeDPO keeps 27 pairs: 3 swapped because only the chosen answer was unsafe; 5 dropped because both were"
    )
    facts = trained.result.facts
    assert facts["num_pairs"] == 27
    assert (facts["num_swapped"], facts["num_both_unsafe"], facts["num_unlabelled"]) == (3, 5, 0)
    json.dumps(facts)
    recipe = Recipe(name="mine", stages={"safe": make_stage(loss=LOSS)})
    assert f"safe: {provenance(recipe, data)['data of safe']}" == trained.said[0]
    # Before anything is learned: Delta where a safe answer meets an unsafe one, DPO where both are safe.
    first = trained.metrics[0]
    for name, loss in first.items():
        if name.startswith("train/loss/"):
            category = name.removeprefix("train/loss/")
            expected = math.log(2) if category == HELPFUL else math.log1p(math.exp(LOSS.delta))
            assert loss == pytest.approx(expected, abs=1e-5)
    assert {name for name in first if name.startswith("train/loss/")} >= {
        "train/loss/S2",
        "train/loss/helpful",
    }
    assert trained.series("train/loss")[-1] < first["train/loss"]


def test_a_stage_trains_on_the_swapped_pairs_as_on_pairs_in_order(
    train_stage: Any, make_stage: Any, data: SafetyData
) -> None:
    """The swapped and dropped data written out by hand train the same model, and share its cached reference."""
    given = train_stage(make_stage(loss=LOSS, num_steps=3), run="given", data=data)
    by_hand = [
        replace(p, chosen=p.rejected, rejected=p.chosen, chosen_safe=True, rejected_safe=False)
        for p in data.safety_pairs[:3]
    ] + data.safety_pairs[8:]
    ordered = train_stage(
        make_stage(loss=LOSS, num_steps=3), run="by hand", data=replace(data, safety_pairs=by_hand)
    )
    assert ordered.result.facts["num_swapped"] == 0
    assert ordered.metrics == given.metrics
    assert all(torch.equal(ordered.weights[name], weight) for name, weight in given.weights.items())
    assert (given.result.facts["reference_cache_hit"], ordered.result.facts["reference_cache_hit"]) == (
        False,
        True,
    )


def test_swapping_changes_the_key_of_the_cached_reference(
    train_stage: Any, make_stage: Any, data: SafetyData
) -> None:
    """The same pairs in DPO's and in SafeDPO's order: chosen and rejected must not be taken for one another."""
    data.safety_pairs[3:8] = []  # nothing to drop: the pairs differ in their order alone
    still = {"learning_rate": 1e-12}
    plain = train_stage(make_stage(**still), run="dpo", data=data)
    safe = train_stage(make_stage(loss=LossConfig("safedpo", delta=0.0), **still), run="safe", data=data)
    assert plain.result.facts["num_pairs"] == safe.result.facts["num_pairs"] == 27
    assert not safe.result.facts["reference_cache_hit"]
    # Nothing is learned, so h is 0 where the reference's values are those of the swapped answers, as S1 has them.
    assert len(safe.series("train/h/S1")) > 0
    assert safe.series("train/h/S1") == pytest.approx([0.0] * len(safe.series("train/h/S1")), abs=1e-3)


def test_a_mix_trains_on_the_sum(train_stage: Any, make_stage: Any) -> None:
    """Step one, h = 0: ln 2, apo_zero 1, hinge 1."""
    mix = {"apo_zero": 0.5, "hinge": 0.25}
    trained = train_stage(make_stage(loss=LossConfig("sigmoid", mix=mix)))
    assert trained.series("train/loss")[0] == pytest.approx(math.log(2) + 0.75, abs=1e-4)
    assert trained.series("train/loss")[-1] < trained.series("train/loss")[0] - 0.05
    heavier = train_stage(
        make_stage(num_steps=1, loss=LossConfig("sigmoid", mix={"sigmoid": 2.0})), run="two"
    )
    assert heavier.series("train/loss")[0] == pytest.approx(2 * math.log(2), abs=1e-4)


def test_benign_answers_are_drawn_once_a_step(train_stage: Any, make_stage: Any) -> None:
    """The mixture has no helpful pair, the penalty is on them all the same; 8 x 1 trains as 1 x 8."""
    options: dict[str, Any] = {
        "mixture": {"safety": 1.0},
        "kl": KLConfig(coef=5.0, on="benign", num_benign=5),
    }
    whole = train_stage(make_stage(**options), run="whole")
    split = train_stage(
        make_stage(per_device_batch_size=1, gradient_accumulation_steps=8, **options), run="split"
    )
    free = train_stage(make_stage(**(options | {"kl": KLConfig(coef=1e-9, on="benign")})), run="free")
    for mine, theirs in zip(whole.metrics, split.metrics, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    assert whole.series("train/kl")[0] == pytest.approx(0, abs=1e-6)
    assert 0 < whole.series("train/kl")[-1] < 0.8 * free.series("train/kl")[-1]
    assert not any(name.endswith("/helpful") for name in whole.metrics[0])
