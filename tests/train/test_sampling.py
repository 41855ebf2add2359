from collections import Counter

import pytest

from equipoise.train.recipe import RecipeError
from equipoise.train.sampling import order_pairs

SUBSETS = {"safety": range(100, 140), "helpful": range(10)}


def test_every_prefix_keeps_the_shares() -> None:
    order = order_pairs(SUBSETS, {"safety": 0.65, "helpful": 0.35}, 500, seed=0)
    for length in range(1, 501):
        helpful = sum(row < 100 for row in order[:length])
        assert abs(helpful - 0.35 * length) <= 1


def test_shares_need_not_add_up_to_one() -> None:
    assert order_pairs(SUBSETS, {"safety": 13, "helpful": 7}, 50, seed=3) == order_pairs(
        SUBSETS, {"safety": 0.65, "helpful": 0.35}, 50, seed=3
    )


def test_a_pass_takes_every_pair_once_before_any_twice() -> None:
    order = order_pairs(SUBSETS, {"safety": 0.5, "helpful": 0.5}, 80, seed=0)
    safety = [row for row in order if row >= 100]
    helpful = [row for row in order if row < 100]
    assert sorted(safety) == list(SUBSETS["safety"])
    passes = [helpful[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4  # each newly shuffled


def test_one_epoch_shows_every_pair() -> None:
    order = order_pairs(SUBSETS, {"safety": 0.8, "helpful": 0.2}, None, seed=0)
    assert len(order) == 50
    assert Counter(order).most_common(1)[0][1] == 1
    # The subset that needs most draws decides: 40 safety pairs at a share of a quarter take 160.
    order = order_pairs(SUBSETS, {"safety": 0.25, "helpful": 0.75}, None, seed=0)
    assert len(order) == 160
    assert set(SUBSETS["safety"]) <= set(order)


def test_the_seed_decides_and_nothing_else() -> None:
    mixture = {"safety": 0.5, "helpful": 0.5}
    order = order_pairs(SUBSETS, mixture, 40, seed=1)
    assert order_pairs(SUBSETS, mixture, 40, seed=1) == order
    assert order_pairs(SUBSETS, mixture, 40, seed=2) != order
    assert order_pairs(SUBSETS, mixture, 80, seed=1)[:40] == order


def test_a_subset_without_a_share_is_not_needed() -> None:
    assert sorted(order_pairs({"safety": [3, 4]}, {"safety": 1.0, "helpful": 0.0}, None, seed=0)) == [3, 4]


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"mixture: helpful has a share of 0\.5, but the data has no helpful pairs"
    ):
        order_pairs({"safety": [1], "helpful": []}, {"safety": 0.5, "helpful": 0.5}, None, seed=0)


def test_balanced_inside_each_subset_and_shares_of_the_mixture_kept() -> None:
    subsets = {"safety": range(40), "helpful": range(40, 60)}
    categories = ["S1"] * 36 + ["S2"] * 4 + ["helpful"] * 20
    order = order_pairs(subsets, {"safety": 0.5, "helpful": 0.5}, 80, 0, categories, temperature=1.0)
    assert Counter(categories[row] for row in order) == {"S1": 20, "S2": 20, "helpful": 40}
    # As often as it occurs, but evenly spread.
    order = order_pairs(subsets, {"safety": 1.0}, None, 0, categories, temperature=0.0)
    assert sorted(order) == list(range(40))
    assert [sum(row >= 36 for row in order[i : i + 10]) for i in range(0, 40, 10)] == [1, 1, 1, 1]
