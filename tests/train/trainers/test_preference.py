import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.train.pairs import encode_pairs
from equipoise.train.recipe import LoraConfig, LossConfig
from equipoise.train.recipe.stages import (
    CategoryConfig,
    KLConfig,
    MarginConfig,
    MultiplierConfig,
    TokenBiasPenaltyConfig,
    WeightConfig,
)
from equipoise.train.stages.log_ratios import draw
from equipoise.train.stages.preference import select_pairs
from equipoise.train.trainers.preference import PreferenceTrainer

FULL = {"lora": LoraConfig(enabled=False)}
EVERYTHING = {
    "category": CategoryConfig(
        MarginConfig(enabled=True),
        WeightConfig(mode="group_dro"),
        MultiplierConfig(enabled=True),
        update_every=2,
    ),
    "kl": KLConfig(coef=0.1),
    "token_bias": TokenBiasPenaltyConfig(coef=1.0, every=2, num_contexts=2, num_positions=3, prompt_tokens=4),
}


def assert_same_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 2e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_metrics(a: list[dict[str, float]], b: list[dict[str, float]], abs: float = 1e-5) -> None:
    assert len(a) == len(b)
    for mine, theirs in zip(a, b, strict=True):
        assert mine == pytest.approx(theirs, abs=abs, rel=1e-4)


def test_a_stage_from_folder_to_folder(train_stage: Any, make_stage: Any, tiny_model_folder: Path) -> None:
    trained = train_stage(make_stage())
    assert trained.series("step") == [1, 2, 3, 4]
    assert trained.series("train/loss")[0] == pytest.approx(math.log(2))
    assert trained.series("train/loss")[-1] < 0.65
    assert trained.series("train/accuracy")[-1] > 0.9
    assert trained.series("train/num_pairs") == [8] * 4
    assert trained.result.facts == {
        "num_steps": 4,
        "num_pairs": 32,
        "num_draws": 32,
        "num_too_long": 0,
        "one_row_a_pair": True,
        "reference_cache_hit": False,
        "beta_over_lam": 0.1,
    }
    folder = Path(trained.result.model_folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hm?"}], return_tensors="pt", return_dict=True
    )
    assert (
        model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1]
        == len(prompt["input_ids"][0]) + 3
    )
    # The adapter is merged into the linear layers; what it does not touch is the starting model's, bit by bit.
    before = load_file(tiny_model_folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], trained.weights[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_one_pair_eight_times_equals_eight_pairs_once(train_stage: Any, make_stage: Any) -> None:
    whole = train_stage(make_stage(**EVERYTHING), run="whole")
    split = train_stage(
        make_stage(per_device_batch_size=1, gradient_accumulation_steps=8, **EVERYTHING), run="split"
    )
    assert whole.series("train/token_bias")[0] == pytest.approx(0, abs=1e-6)
    assert whole.series("train/token_bias")[1] > 1e-4
    assert_same_metrics(whole.metrics, split.metrics)
    assert_same_weights(whole.weights, split.weights)


def answer_log_prob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """By all logits of one answer alone, in float64 from the logits on."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return float(logits[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None]).sum())


def test_metrics_of_a_step_equal_a_recomputation(
    train_stage: Any, make_stage: Any, make_data: Any, tiny_model_folder: Path
) -> None:
    # The model that three steps leave is the one that step four begins with.
    three, four = (train_stage(make_stage(num_steps=n), run=f"{n} steps") for n in (3, 4))
    policy = AutoModelForCausalLM.from_pretrained(three.result.model_folder).eval()
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    stage, data = make_stage(num_steps=4), make_data()
    pairs = select_pairs({"safety": data.safety_pairs, "helpful": data.helpful_pairs}, stage.mixture)
    encoded = encode_pairs(pairs, AutoTokenizer.from_pretrained(tiny_model_folder), 512)
    rows, names, _ = draw(encoded.dataset, stage, 8, 0)
    assert names == ["S1", "S2", "S10", "helpful"]
    found: dict[str, list[tuple[float, float]]] = {}
    for row in list(rows)[24:]:
        chosen, rejected = (
            answer_log_prob(policy, row["prompt_ids"], row[name])
            - answer_log_prob(reference, row["prompt_ids"], row[name])
            for name in ("chosen_ids", "rejected_ids")
        )
        found.setdefault(row["category"], []).append((chosen, rejected))
    metrics = four.metrics[3]
    losses = []
    for category, ratios in found.items():
        h = [chosen - rejected for chosen, rejected in ratios]
        loss = [math.log1p(math.exp(-0.1 * value)) for value in h]
        losses += loss
        assert metrics[f"train/num_pairs/{category}"] == len(ratios)
        assert metrics[f"train/loss_sum/{category}"] == pytest.approx(sum(loss), abs=1e-4)
        assert metrics[f"train/loss/{category}"] == pytest.approx(sum(loss) / len(loss), abs=1e-4)
        assert metrics[f"train/h/{category}"] == pytest.approx(sum(h) / len(h), abs=1e-3)
        assert metrics[f"train/accuracy/{category}"] == sum(value > 0 for value in h) / len(h)
        assert metrics[f"train/chosen_log_ratio/{category}"] == pytest.approx(
            sum(chosen for chosen, _ in ratios) / len(ratios), abs=1e-3
        )
    assert metrics["train/loss"] == pytest.approx(sum(losses) / 8, abs=1e-4)
    assert {name.split("/")[-1] for name in metrics if name.startswith("train/num_pairs/")} == set(found)


def test_two_rows_a_pair_train_alike(
    train_stage: Any, make_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = train_stage(make_stage(kl=KLConfig(coef=0.1)), run="one")
    monkeypatch.setattr("equipoise.train.training.can_share_prompt", lambda *_: False)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(one.folder / "another cache"))
    two = train_stage(make_stage(kl=KLConfig(coef=0.1)), run="two")
    assert not any("a row of its own" in line for line in one.said)
    assert any("a row of its own" in line for line in two.said)
    assert (one.result.facts["one_row_a_pair"], two.result.facts["one_row_a_pair"]) == (True, False)
    assert not two.result.facts["reference_cache_hit"]
    assert_same_metrics(one.metrics, two.metrics, abs=1e-4)
    assert_same_weights(one.weights, two.weights, atol=1e-5)


# ---- the reference --------------------------------------------------------------------------------------------------


def test_reference_log_probs_are_computed_once(train_stage: Any, make_stage: Any, make_data: Any) -> None:
    runs = {
        "first": train_stage(make_stage(), run="first"),
        "again": train_stage(make_stage(), run="again"),
        "another beta": train_stage(make_stage(beta=0.5, lam=2.0), run="beta"),
        "another order": train_stage(
            make_stage(mixture={"safety": 0.5, "helpful": 0.5}, num_steps=6), run="order"
        ),
        "a frozen copy": train_stage(make_stage(kl=KLConfig(coef=0.1)), run="copy", model=FULL),
        "other pairs": train_stage(make_stage(), run="pairs", data=make_data(7)),
    }
    hits = {name: run.result.facts["reference_cache_hit"] for name, run in runs.items()}
    assert hits == {
        "first": False,
        "again": True,
        "another beta": True,
        "another order": True,
        "a frozen copy": True,
        "other pairs": False,
    }
    assert runs["again"].metrics == runs["first"].metrics
    assert all(torch.equal(runs["again"].weights[n], w) for n, w in runs["first"].weights.items())
    assert any("reference log-probabilities" in what for _, _, what in runs["first"].done)
    assert not any("reference log-probabilities" in what for _, _, what in runs["again"].done)


@pytest.mark.parametrize("model", [None, FULL], ids=["adapter off", "frozen copy"])
def test_a_reference_that_changes_stops_the_run(
    model: Any, train_stage: Any, make_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PreferenceTrainer.training_step

    def step(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Tensor:
        reference = self.ref_model if self.ref_model is not None else self.model
        with torch.no_grad():
            next(p for n, p in reference.named_parameters() if "norm" in n).add_(1e-3)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", step)
    with pytest.raises(AssertionError, match="the reference's weights changed"):
        train_stage(make_stage(kl=KLConfig(coef=0.1)), model=model)


@pytest.mark.parametrize("kl", [0.0, 0.1], ids=["no reference in memory", "frozen copy"])
def test_full_fine_tuning(kl: float, train_stage: Any, make_stage: Any, tiny_model_folder: Path) -> None:
    trained = train_stage(make_stage(kl=KLConfig(coef=kl)), model=FULL)
    assert trained.series("train/loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert trained.series("train/loss")[-1] < 0.6
    before = load_file(tiny_model_folder / "model.safetensors")
    assert all(not torch.equal(before[name], trained.weights[name]) for name in before)
    if kl:
        assert trained.series("train/kl")[0] == pytest.approx(0, abs=1e-6)
        assert trained.series("train/kl")[-1] > 1e-4


# ---- terms of the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["forward", "reverse", "k3"])
def test_a_kl_penalty_keeps_the_policy_near_the_reference(
    estimator: str, train_stage: Any, make_stage: Any
) -> None:
    def last_kl(coef: float) -> float:
        kl = KLConfig(coef=coef, estimator=estimator)
        values = train_stage(make_stage(kl=kl, num_steps=6), run=f"kl {coef}").series("train/kl")
        assert values[0] == pytest.approx(0, abs=1e-6)
        assert min(values) >= -1e-6
        return float(values[-1])

    assert 0 < last_kl(30.0) < 0.8 * last_kl(1e-9)


def test_a_token_bias_penalty_reduces_the_shift(train_stage: Any, make_stage: Any) -> None:
    def shift(coef: float, every: int = 1) -> list[float]:
        penalty = TokenBiasPenaltyConfig(
            coef=coef, every=every, num_contexts=4, num_positions=4, prompt_tokens=8
        )
        return list(
            train_stage(make_stage(token_bias=penalty, num_steps=8), run=f"{coef} {every}").series(
                "train/token_bias"
            )
        )

    free, held = shift(1e-9), shift(30.0)
    assert free[0] == pytest.approx(0, abs=1e-6)
    assert free[-1] > 1e-3
    assert held[-1] < 0.8 * free[-1]
    assert len(shift(1.0, every=4)) == 2  # steps 1 and 5


def test_the_sft_term_raises_the_chosen_answers(train_stage: Any, make_stage: Any) -> None:
    def chosen(coef: float) -> float:
        metrics = train_stage(make_stage(loss=LossConfig(sft_coef=coef)), run=f"sft {coef}").metrics[-1]
        return float(metrics["train/chosen_log_ratio/S1"])

    assert chosen(5.0) > chosen(0.0) + 0.1


@pytest.mark.parametrize("loss", ["ipo", "hinge", "robust", "apo_zero"])
def test_every_loss_trains(loss: str, train_stage: Any, make_stage: Any) -> None:
    trained = train_stage(make_stage(loss=LossConfig(name=loss, label_smoothing=0.1)))
    assert trained.series("train/loss")[-1] < trained.series("train/loss")[0]
    assert trained.series("train/accuracy")[-1] > 0.9


# ---- category terms -------------------------------------------------------------------------------------------------


def test_an_evaluation_before_the_stage_sets_the_margins(train_stage: Any, make_stage: Any) -> None:
    category = CategoryConfig(
        MarginConfig(enabled=True, target=0.1, eta=1.0), shrinkage=0.0, update_every=100
    )
    trained = train_stage(
        make_stage(category=category), unsafe_counts={"S1": (6, 10), "S2": (1, 10), "S10": (0, 10)}
    )
    assert trained.series("category/margin/S1") == pytest.approx([0.5] * 4)
    assert trained.series("category/margin/S2") == pytest.approx([0.0] * 4)
    # -log sigmoid(0 - 0.5) before anything is learned
    assert trained.metrics[0]["train/loss/S1"] == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-5)
    assert trained.metrics[0]["train/loss/helpful"] == pytest.approx(math.log(2), abs=1e-5)
    state = json.loads((trained.folder / "category_state.json").read_text())
    assert state["margin"] == pytest.approx([0.5, 0, 0])


def test_terms_move_on_schedule(train_stage: Any, make_stage: Any) -> None:
    category = CategoryConfig(
        MarginConfig(enabled=True), WeightConfig("group_dro"), MultiplierConfig(enabled=True), update_every=3
    )
    trained = train_stage(make_stage(category=category, num_steps=7))
    margins = trained.series("category/margin/S1")
    assert [now != then for then, now in zip([0.0, *margins], margins, strict=False)] == [
        step % 3 == 0 for step in range(1, 8)
    ]
    # The first window saw ties, half an error each: at least a little over the target.
    assert margins[2] > 0
    assert trained.series("category/multiplier/S1")[2] == pytest.approx(math.exp(margins[2]))
    weights = trained.series("category/weight/S1")
    assert len(set(weights)) == 7


def test_terms_that_have_not_moved_train_plain_dpo(train_stage: Any, make_stage: Any) -> None:
    category = CategoryConfig(
        MarginConfig(enabled=True), multiplier=MultiplierConfig(enabled=True), update_every=100
    )
    plain = train_stage(make_stage(), run="plain")
    neutral = train_stage(make_stage(category=category), run="neutral")
    assert all(torch.equal(neutral.weights[name], weight) for name, weight in plain.weights.items())


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_pairs_that_are_too_long_are_told(train_stage: Any, make_stage: Any, make_data: Any) -> None:
    from dataclasses import replace

    data = make_data()
    long = replace(data.safety_pairs[3], rejected="y" * 600)
    data.safety_pairs[3] = long
    trained = train_stage(make_stage(num_steps=1), data=data)
    assert trained.result.facts["num_too_long"] == 1
    assert trained.result.facts["num_pairs"] == 31
    assert trained.said[0] == (
        f"safe: 1 of 32 pairs are longer than data.max_length=512 tokens and left out (first: {long.id})"
    )
