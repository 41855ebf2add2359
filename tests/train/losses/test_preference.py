import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from equipoise.data.schema import PreferencePair
from equipoise.data.sources import load_samples
from equipoise.train.losses.preference import (
    MARGIN_LOSSES,
    PREFERENCE_LOSSES,
    PairLogps,
    mixed_loss,
    preference_loss,
    sft_loss,
)
from equipoise.train.pairs import PairCollator, encode_pairs, model_inputs, sum_by_sequence
from equipoise.train.trainers.completion_head import add_completion_head

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def logps(chosen_log_ratio: list[float], rejected_log_ratio: list[float], *, grad: bool = False) -> PairLogps:
    """Pairs with these log-ratios over a reference that is no round number; lengths 2 and 4."""
    num = len(chosen_log_ratio)
    chosen = (torch.tensor(chosen_log_ratio) - 3.25).requires_grad_(grad)
    rejected = (torch.tensor(rejected_log_ratio) - 5.5).requires_grad_(grad)
    return PairLogps(
        chosen,
        rejected,
        torch.full((num,), -3.25),
        torch.full((num,), -5.5),
        torch.full((num,), 2),
        torch.full((num,), 4),
    )


@pytest.mark.parametrize(
    ("name", "beta", "options", "expected"),
    [
        # h = 1 - (-1) = 2, and 0 - 2 = -2; with beta = ln(3) / 2 sigmoid(beta h) = 3/4, 1/4.
        ("sigmoid", LN3 / 2, {}, [math.log(4 / 3), LN4]),
        # beta h - delta = 0, and -2 ln 3: sigmoid 1/2, 1/10.
        ("sigmoid", LN3 / 2, {"margin": LN3}, [LN2, math.log(10)]),
        # eps = 1/4: (-(3/4) log s + (1/4) log(1 - s)) / (1/2)
        (
            "robust",
            LN3 / 2,
            {"label_smoothing": 0.25},
            [1.5 * math.log(4 / 3) - 0.5 * LN4, 1.5 * LN4 - 0.5 * math.log(4 / 3)],
        ),
        ("robust", LN3 / 2, {}, [math.log(4 / 3), LN4]),
        ("hinge", 0.25, {}, [0.5, 1.5]),
        ("hinge", 0.25, {"margin": 0.75}, [1.25, 2.25]),
        ("hinge", 1.0, {}, [0.0, 3.0]),
        # h per token: 1/2 - (-1/4) = 3/4, and 0 - 2/4 = -1/2; 1 / (2 beta) = 2.
        ("ipo", 0.25, {}, [1.25**2, 2.5**2]),
        ("ipo", 0.25, {"length_normalised": True}, [1.25**2, 2.5**2]),
        # r_w = 1, 0; r_l = -1, 2; beta = ln 3: sigmoids 3/4 and 1/4, 1/2 and 9/10.
        ("apo_zero", LN3, {}, [0.25 + 0.25, 0.5 + 0.9]),
        # beta h per token = ln 3, and -(2/3) ln 3.
        (
            "sigmoid",
            LN3 / 0.75,
            {"length_normalised": True},
            [math.log(4 / 3), math.log(1 + 3 ** (2 / 3))],
        ),
        ("hinge", 1.0, {"length_normalised": True}, [0.25, 1.5]),
    ],
)
def test_by_hand(name: str, beta: float, options: dict[str, float], expected: list[float]) -> None:
    loss = preference_loss(name, logps([1.0, 0.0], [-1.0, 2.0]), beta, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_safedpo_wants_a_safe_answer_to_win_by_delta() -> None:
    """Both safe: DPO. Only the rejected one unsafe, Delta = ln 3: beta h - Delta = 0, and -2 ln 3."""
    pair = logps([1.0, 0.0], [-1.0, 2.0])
    neither = preference_loss("safedpo", replace(pair, safety_offset=torch.zeros(2)), LN3 / 2)
    torch.testing.assert_close(neither, preference_loss("sigmoid", pair, LN3 / 2))
    offset = LN3 * torch.tensor([1, 0])  # (u_l - u_w) Delta
    mixed = preference_loss("safedpo", replace(pair, safety_offset=offset), LN3 / 2)
    torch.testing.assert_close(mixed, torch.tensor([LN2, LN4]))
    both = preference_loss("safedpo", replace(pair, safety_offset=torch.full((2,), LN3)), LN3 / 2)
    torch.testing.assert_close(both, torch.tensor([LN2, math.log(10)]))
    # On top of it a category margin, and with a length-normalised h.
    with_margin = preference_loss(
        "safedpo", replace(pair, safety_offset=torch.full((2,), LN3 / 2)), LN3 / 2, margin=LN3 / 2
    )
    torch.testing.assert_close(with_margin, both)
    per_token = preference_loss(
        "safedpo", replace(pair, safety_offset=LN3), LN3 / 0.75, length_normalised=True
    )
    torch.testing.assert_close(per_token[0], torch.tensor(LN2))


def test_safedpo_pulls_with_beta_until_a_safe_answer_is_far_enough_ahead() -> None:
    """The limits of d loss / d h: -beta far below Delta, -beta / 2 at it, 0 far above."""
    h = torch.tensor([0.0, 100.0, 400.0], requires_grad=True)
    zeros = torch.zeros(3)
    pair = PairLogps(h, zeros, zeros, zeros, zeros + 1, zeros + 1, safety_offset=10.0)
    preference_loss("safedpo", pair, 0.1).sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([-0.1, -0.05, 0.0]), atol=1e-5, rtol=0)


def test_a_mix_is_the_weighted_sum_and_the_margin_reaches_what_has_one() -> None:
    pair = logps([1.0, 0.0], [-1.0, 2.0])
    mix = mixed_loss({"sigmoid": 1.0, "apo_zero": 0.5}, pair, LN3, margin=2 * LN3)
    # beta h - delta = 0, -4 ln 3: sigmoid 1/2, 1/82; apo_zero as by hand above, without the margin.
    torch.testing.assert_close(mix, torch.tensor([LN2 + 0.25, math.log(82) + 0.7]))
    assert torch.equal(mixed_loss({"ipo": 1.0}, pair, 0.2), preference_loss("ipo", pair, 0.2))


def test_sft_is_the_mean_over_all_chosen_tokens() -> None:
    batch = PairLogps(
        torch.tensor([-4.0, -9.0]),
        torch.tensor([-1.0, -1.0]),
        torch.zeros(2),
        torch.zeros(2),
        torch.tensor([2, 8]),
        torch.tensor([1, 1]),
    )
    assert float(sft_loss(batch)) == pytest.approx(13 / 10)


def test_h_and_its_parts() -> None:
    batch = logps([1.0, 0.0], [-1.0, 2.0])
    torch.testing.assert_close(batch.chosen_log_ratio, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(batch.rejected_log_ratio, torch.tensor([-1.0, 2.0]))
    torch.testing.assert_close(batch.h, torch.tensor([2.0, -2.0]))
    torch.testing.assert_close(batch.per_token().h, torch.tensor([0.75, -0.5]))


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_descent_raises_h(name: str, length_normalised: bool) -> None:
    batch = logps([0.1, -0.5, 0.4], [0.2, 0.3, -0.1], grad=True)
    preference_loss(
        name, batch, 0.5, label_smoothing=0.1, length_normalised=length_normalised
    ).sum().backward()
    assert batch.chosen.grad is not None
    assert batch.rejected.grad is not None
    assert bool((batch.chosen.grad < 0).all())
    assert bool((batch.rejected.grad > 0).all())


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_beta_for_every_pair(name: str) -> None:
    batch = logps([1.0, 0.0, -0.3], [-1.0, 2.0, 0.2])
    together = preference_loss(name, batch, torch.tensor([0.1, 0.5, 2.0]), label_smoothing=0.1)
    for i, beta in enumerate([0.1, 0.5, 2.0]):
        assert together[i] == preference_loss(name, batch, beta, label_smoothing=0.1)[i]


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_a_margin_for_every_pair_shifts_beta_h(name: str) -> None:
    margin = torch.tensor([0.0, 0.5, 2.0])
    with_margin = preference_loss(name, logps([1.0] * 3, [0.0] * 3), 0.5, margin=margin, label_smoothing=0.1)
    shifted = preference_loss(name, logps((1 - margin / 0.5).tolist(), [0.0] * 3), 0.5, label_smoothing=0.1)
    torch.testing.assert_close(with_margin, shifted)
    assert bool((with_margin.diff() > 0).all())


# ---- against TRL ----------------------------------------------------------------------------------------------------


TRL_LOSSES = [
    ("sigmoid", {}, "sigmoid"),
    ("ipo", {}, "ipo"),
    ("hinge", {}, "hinge"),
    ("robust", {"label_smoothing": 0.2}, "robust"),
    ("apo_zero", {}, "apo_zero"),
    ("sigmoid", {"length_normalised": True}, "sigmoid_norm"),
    ("sft", {}, "sft"),
    ("safedpo", {}, "sigmoid"),  # Delta = 0
]


@dataclass
class BothWays:
    """The same pairs in TRL's batch and in ours, with one policy and one reference."""

    trl: DPOTrainer
    trl_batch: dict[str, Any]
    batch: dict[str, Any]
    ref_chosen: Tensor
    ref_rejected: Tensor

    def ours(self) -> PairLogps:
        chosen, rejected = sum_by_sequence(self.trl.model(**model_inputs(self.batch)).log_probs, self.batch)
        lengths = self.batch["chosen_lengths"], self.batch["rejected_lengths"]
        return PairLogps(chosen, rejected, self.ref_chosen, self.ref_rejected, *lengths)


@pytest.fixture(scope="module")
def both_ways(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BothWays:
    """TRL's trainer, tokenisation and collator on shipped pairs; the policy is the tiny model, disturbed."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.005 * torch.randn(parameter.shape, generator=generator)
    pairs = short_pairs()
    turns = [
        {"prompt": list(p.prompt), "chosen": answer(p.chosen), "rejected": answer(p.rejected)} for p in pairs
    ]
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            beta=0.1,
            label_smoothing=0.2,
            max_length=None,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(turns),
        processing_class=tokenizer,
    )
    trl_batch = trainer.data_collator(list(trainer.train_dataset))
    batch = PairCollator(tokenizer.pad_token_id)(list(encode_pairs(pairs, tokenizer, 2000).dataset))
    for model in (policy, reference):
        add_completion_head(model)
    with torch.no_grad():
        ref = sum_by_sequence(reference(**model_inputs(batch)).log_probs, batch)
    return BothWays(trainer, trl_batch, batch, *ref)


def short_pairs() -> list[PreferencePair]:
    """Shipped pairs, cut: sums of a thousand log-probabilities would agree to 1e-4 only, as fp32 has it."""
    pairs = load_samples().safety_pairs[:60:10]
    return [replace(p, chosen=p.chosen[: 20 + 7 * i], rejected=p.rejected[:40]) for i, p in enumerate(pairs)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_tokens_are_those_of_trl(both_ways: BothWays, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ours = encode_pairs(short_pairs(), tiny_tokenizer, 2000).dataset
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(ours[name]) == list(both_ways.trl.train_dataset[name])


@pytest.mark.parametrize(("name", "options", "trl_name"), TRL_LOSSES, ids=[n for *_, n in TRL_LOSSES])
def test_loss_and_gradient_are_those_of_trl(
    name: str, options: dict[str, Any], trl_name: str, both_ways: BothWays
) -> None:
    trainer = both_ways.trl
    trainer.loss_types, trainer.loss_weights = [trl_name], [1.0]
    theirs = trainer._compute_loss(trainer.model, both_ways.trl_batch, False)
    logps = both_ways.ours()
    ours = sft_loss(logps) if name == "sft" else preference_loss(name, logps, 0.1, **options).mean()
    assert logps.h.abs().min().item() > 0.1  # or every loss would be that of h = 0
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
    parameters = list(trainer.model.parameters())
    for mine, its in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(mine, its, atol=1e-4 * float(its.abs().max()) + 1e-8, rtol=1e-3)


MIXES = [
    ({"sigmoid": 1.0, "apo_zero": 0.5}, {}, 0.0, False),
    ({"sigmoid": 0.8, "ipo": 0.2}, {}, 1.0, False),
    ({"robust": 1.0, "hinge": 0.3}, {"label_smoothing": 0.2}, 0.0, False),
    ({"sigmoid": 1.0}, {}, 0.7, True),
]


@pytest.mark.parametrize(
    ("weights", "options", "sft_coef", "length_normalised"), MIXES, ids=[str(m[0]) for m in MIXES]
)
def test_a_mix_is_that_of_trl(
    weights: dict[str, float],
    options: dict[str, float],
    sft_coef: float,
    length_normalised: bool,
    both_ways: BothWays,
) -> None:
    """TRL's `loss_type` list with its `loss_weights`."""
    trainer = both_ways.trl
    trainer.loss_types = ["sigmoid_norm" if length_normalised else name for name in weights]
    trainer.loss_weights = list(weights.values())
    if sft_coef:
        trainer.loss_types, trainer.loss_weights = (
            [*trainer.loss_types, "sft"],
            [*trainer.loss_weights, sft_coef],
        )
    theirs = trainer._compute_loss(trainer.model, both_ways.trl_batch, False)
    logps = both_ways.ours()
    ours = mixed_loss(weights, logps, 0.1, length_normalised=length_normalised, **options).mean()  # type: ignore[arg-type]
    ours = ours + sft_coef * sft_loss(logps)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
