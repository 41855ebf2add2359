import json
import math

import pytest
import torch
from torch import Tensor

from equipoise.train.losses.preference import PairLogps, preference_loss
from equipoise.train.recipe.stages import CategoryConfig, MarginConfig, MultiplierConfig, WeightConfig
from equipoise.train.trainers.category_terms import CategoryTerms

NAMES = ("S1", "S2", "S10", "helpful")
DRAWS = ["S1"] * 6 + ["S2"] * 3 + ["S10"] * 3 + ["helpful"] * 8
BETA = 0.3


def config(
    weight: str = "none", *, margin: bool = False, multiplier: bool = False, **options: float
) -> CategoryConfig:
    return CategoryConfig(
        MarginConfig(enabled=margin, eta=1.0, target=0.1, max=2.0),
        WeightConfig(mode=weight, eta=0.5, temperature=1.0),
        MultiplierConfig(enabled=multiplier, eta=1.0, target=0.1, max_log=2.0),
        **options,  # type: ignore[arg-type]
    )


EVERYTHING = [config("group_dro", margin=True, multiplier=True), config("none", margin=True, multiplier=True)]


def logps(h: Tensor) -> PairLogps:
    zeros, ones = torch.zeros(len(h)), torch.ones(len(h), dtype=torch.int64)
    return PairLogps(h, zeros, zeros, zeros, ones, ones)


def table(categories: list[int], h: list[float], loss: list[float] | None = None) -> dict[str, Tensor]:
    values = torch.tensor(h, dtype=torch.float64)
    losses = torch.tensor(loss, dtype=torch.float64) if loss else torch.ones_like(values)
    return {"category": torch.tensor(categories, dtype=torch.float64), "h": values, "loss": losses}


def loss_and_gradient(terms: CategoryTerms | None, category: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.linspace(-2, 3, len(category)).requires_grad_()
    beta, margin, weight = (BETA, 0.0, 1.0) if terms is None else terms.per_pair(category, BETA)
    loss = (weight * preference_loss("sigmoid", logps(h), beta, margin=margin)).mean()
    loss.backward()
    assert h.grad is not None
    return loss.detach(), h.grad


@pytest.mark.parametrize("with_terms", EVERYTHING)
def test_terms_start_as_plain_dpo_to_the_last_bit(with_terms: CategoryConfig) -> None:
    category = torch.tensor([0, 1, 2, 3, 3, 0])
    terms = CategoryTerms(with_terms, NAMES, DRAWS)
    for mine, plain in zip(
        loss_and_gradient(terms, category), loss_and_gradient(None, category), strict=True
    ):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("with_terms", EVERYTHING)
def test_categories_that_are_all_at_their_target_stay_plain_dpo(with_terms: CategoryConfig) -> None:
    terms = CategoryTerms(with_terms, NAMES, DRAWS)
    # A tenth of the pairs of each category wrong, and equal losses: nothing to even out.
    for name in range(3):
        terms.observe(table([name] * 10, [-1.0] + [1.0] * 9, [0.7] * 10))
    terms.update_from_errors()
    terms.update_from_evaluation({"S1": (1, 10), "S2": (1, 10), "S10": (1, 10)})
    category = torch.tensor([0, 1, 2, 3, 3, 0])
    for mine, plain in zip(
        loss_and_gradient(terms, category), loss_and_gradient(None, category), strict=True
    ):
        torch.testing.assert_close(mine, plain, atol=1e-7, rtol=1e-6)


def test_what_is_off_is_a_plain_number() -> None:
    assert CategoryTerms(config(), NAMES, DRAWS).per_pair(torch.tensor([0, 3]), BETA) == (BETA, 0.0, 1.0)


def test_one_category_and_a_multiplier_is_sacpo() -> None:
    terms = CategoryTerms(config(multiplier=True), ("S1", "helpful"), ["S1"] * 4 + ["helpful"])
    terms.state.log_multiplier[:] = math.log(4)
    beta, margin, weight = terms.per_pair(torch.tensor([0, 0, 1]), 0.1)
    torch.testing.assert_close(beta, torch.tensor([0.1 / 4, 0.1 / 4, 0.1]))
    assert (margin, weight) == (0.0, 1.0)
    h = torch.tensor([1.0, -2.0, 0.5])
    torch.testing.assert_close(
        preference_loss("sigmoid", logps(h), beta)[:2], preference_loss("sigmoid", logps(h), 0.1 / 4)[:2]
    )


def test_helpful_pairs_stay_neutral() -> None:
    terms = CategoryTerms(config("group_dro", margin=True, multiplier=True), NAMES, DRAWS)
    terms.observe(table([0, 1, 2, 3, 3], [-1.0, -1.0, 1.0, -1.0, -1.0], [2.0, 1.0, 0.5, 50.0, 50.0]))
    terms.update_from_errors()
    terms.update_from_evaluation({"S1": (9, 10), "S2": (1, 10), "S10": (0, 10), "helpful": (10, 10)})
    beta, margin, weight = terms.per_pair(torch.tensor([3, 0]), BETA)
    assert isinstance(beta, Tensor)
    assert isinstance(margin, Tensor)
    assert isinstance(weight, Tensor)
    torch.testing.assert_close(beta[0], torch.tensor(BETA))
    assert (margin[0], weight[0]) == (0, 1)
    assert beta[1] < BETA
    assert margin[1] > 0
    assert weight[1] > 1


def test_errors_of_a_window_by_hand() -> None:
    terms = CategoryTerms(config(margin=True, shrinkage=0.0, ema=0.5), NAMES, DRAWS)
    terms.observe(
        table([0, 0, 1, 3], [-1.0, 2.0, 1e-5, -5.0])
    )  # a tie is half an error; helpful is no part of it
    terms.observe(table([0, 0], [-1.0, 2.0]))
    terms.update_from_errors()
    torch.testing.assert_close(
        terms.state.error, torch.tensor([0.5, 0.5, float("nan")], dtype=torch.float64), equal_nan=True
    )
    torch.testing.assert_close(terms.state.margin, torch.tensor([0.4, 0.4, 0.0], dtype=torch.float64))
    terms.observe(table([0], [1.0]))  # a new window
    terms.update_from_errors()
    torch.testing.assert_close(terms.state.error[0], torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(
        terms.state.margin, torch.tensor([0.55, 0.8, 0.0], dtype=torch.float64)
    )  # S2, unseen, keeps its error and goes on moving; S10, of which nothing is known, does not


def test_an_empty_window_moves_nothing() -> None:
    terms = CategoryTerms(config(margin=True), NAMES, DRAWS)
    terms.update_from_evaluation({"S1": (9, 10), "S2": (9, 10), "S10": (9, 10)})
    before = terms.state.margin.clone()
    terms.observe(table([3, 3], [-1.0, 1.0]))
    terms.update_from_errors()
    assert torch.equal(terms.state.margin, before)


def test_an_evaluation_moves_margins_and_multipliers() -> None:
    terms = CategoryTerms(config(margin=True, multiplier=True, shrinkage=8.0), NAMES, DRAWS)
    terms.update_from_evaluation({"S1": (10, 12), "S2": (2, 12)})
    # Overall 1/2: (10 + 4) / 20, (2 + 4) / 20, 1/2; minus the target.
    moved = torch.tensor([0.6, 0.2, 0.4], dtype=torch.float64)
    torch.testing.assert_close(terms.state.margin, moved)
    torch.testing.assert_close(terms.state.log_multiplier, moved)
    metrics = terms.metrics()
    assert metrics["category/margin/S1"] == pytest.approx(0.6)
    assert metrics["category/multiplier/S2"] == pytest.approx(math.exp(0.2))
    assert metrics["category/error/S10"] == pytest.approx(0.5)


def test_group_dro_moves_at_every_step() -> None:
    terms = CategoryTerms(config("group_dro"), NAMES, DRAWS)  # p = 1/2, 1/4, 1/4
    terms.observe(table([0, 0, 1, 3], [1.0] * 4, [1.0, 3.0, 1.0, 9.0]))
    q = torch.tensor([0.5 * math.exp(1.0), 0.25 * math.exp(0.5), 0.25], dtype=torch.float64)
    q = q / q.sum()
    torch.testing.assert_close(terms.state.weight, q / torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    assert set(terms.metrics()) == {f"category/weight/{c}" for c in ("S1", "S2", "S10")}


def test_inverse_frequency_gives_every_category_the_same_total() -> None:
    terms = CategoryTerms(config("inverse_frequency"), NAMES, DRAWS)
    _, _, weight = terms.per_pair(torch.tensor([0, 1, 2, 3]), BETA)
    torch.testing.assert_close(weight, torch.tensor([12 / 18, 12 / 9, 12 / 9, 1.0]))


@pytest.mark.parametrize("weight", ["none", "group_dro", "inverse_frequency"])
def test_a_stage_of_helpful_pairs_alone(weight: str) -> None:
    terms = CategoryTerms(config(weight, margin=True, multiplier=True), ("helpful",), ["helpful"] * 3)
    terms.observe(table([0, 0], [-1.0, 1.0]))
    terms.update_from_errors()
    terms.update_from_evaluation({"S1": (5, 10)})
    category = torch.tensor([0, 0])
    for mine, plain in zip(
        loss_and_gradient(terms, category), loss_and_gradient(None, category), strict=True
    ):
        assert torch.equal(mine, plain)
    assert terms.metrics() == {}


def test_a_window_in_progress_survives_json() -> None:
    terms, again = (CategoryTerms(config(margin=True), NAMES, DRAWS) for _ in range(2))
    terms.observe(table([0, 0, 1], [-1.0, 2.0, 1.0]))
    again.load_state_dict(json.loads(json.dumps(terms.state_dict())))
    for one in (terms, again):
        one.observe(table([2, 1], [-1.0, 1.0]))
        one.update_from_errors()
    assert again.state_dict() == terms.state_dict()
