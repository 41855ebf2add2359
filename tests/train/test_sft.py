import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from equipoise.data.schema import HELPFUL, PreferencePair
from equipoise.train.answers import AnswerCollator, BenignAnswers, encode_chosen
from equipoise.train.pairs import answer_sums, model_inputs
from equipoise.train.recipe import LoraConfig
from equipoise.train.recipe.stages import CategoryConfig, KLConfig, SFTStageConfig, WeightConfig
from equipoise.train.stages.log_ratios import draw
from equipoise.train.stages.sft import run_sft, safe_choices
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.completion_head import add_completion_head
from equipoise.train.training import STATE_FILE

CATEGORIES = ("S1", "S2", "S10", HELPFUL)
FULL = {"lora": LoraConfig(enabled=False)}


def make_stage(**options: Any) -> SFTStageConfig:
    """Four steps of eight answers, half of them helpful, at a constant learning rate."""
    defaults: dict[str, Any] = {
        "mixture": {"safety": 0.5, "helpful": 0.5},
        "num_steps": 4,
        "lr_scheduler": "constant",
        "warmup": 0.0,
        "learning_rate": 1e-3,
        "evaluate": False,
    }
    return SFTStageConfig(**(defaults | options))


@pytest.fixture
def train_sft(train_stage: Any) -> Any:
    return partial(train_stage, runner=run_sft)


def assert_same_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 2e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# ---- against TRL ----------------------------------------------------------------------------------------------------


def conversation(pair: PreferencePair) -> dict[str, Any]:
    """As TRL's own data preparation takes it."""
    return {
        "prompt": list(pair.prompt),
        "completion": [{"role": "assistant", "content": pair.chosen}],
    }


def trl_trainer(folder: Path, model_folder: Path, pairs: list[PreferencePair], **options: Any) -> SFTTrainer:
    """TRL's own trainer, data preparation and collator, on the pairs in their order, in full fp32 fine-tuning."""
    args = SFTConfig(
        output_dir=str(folder),
        max_length=None,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        **options,
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=args,
        train_dataset=Dataset.from_list([conversation(pair) for pair in pairs]),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )


def test_the_loss_of_a_batch_is_that_of_trl(tiny_model_folder: Path, tmp_path: Path, make_data: Any) -> None:
    pairs = make_data().safety_pairs[::5] + make_data().helpful_pairs[:2]
    pairs[2] = replace(pairs[2], chosen="No, and here is why at some length. " * 4)
    trainer = trl_trainer(tmp_path, tiny_model_folder, pairs)
    encoded = encode_chosen(pairs, AutoTokenizer.from_pretrained(tiny_model_folder), 512)
    whole = [p + a for p, a in zip(encoded.dataset["prompt_ids"], encoded.dataset["answer_ids"], strict=True)]
    assert whole == list(trainer.train_dataset["input_ids"])
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    add_completion_head(trainer.model)
    for share_rows in (True, False):
        batch = AnswerCollator(0, share_rows)(list(encoded.dataset))
        assert (batch["input_ids"].shape[0] < len(pairs)) == share_rows
        ours = (
            -answer_sums(trainer.model(**model_inputs(batch)).log_probs, batch).sum() / batch["lengths"].sum()
        )
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
        parameters = list(trainer.model.parameters())
        for mine, its in zip(
            torch.autograd.grad(ours, parameters),
            torch.autograd.grad(theirs, parameters, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-3)


def test_a_stage_trains_as_trl_does(
    train_sft: Any, make_data: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Three steps of two microbatches of unequal answers: the same weights, from the same order of answers."""
    stage = make_stage(num_steps=3, per_device_batch_size=4, gradient_accumulation_steps=2)
    ours = train_sft(stage, model=FULL)
    data = make_data()
    pairs, _ = safe_choices(stage, data)
    encoded = encode_chosen(pairs, AutoTokenizer.from_pretrained(tiny_model_folder), 512)
    rows, _, _ = draw(encoded.dataset, stage, 8, 0)
    trainer = trl_trainer(
        tmp_path / "trl",
        tiny_model_folder,
        [pairs[i] for i in rows["example"]],
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    theirs = {name: value for name, value in trainer.model.state_dict().items() if name in ours.weights}
    before = load_file(tiny_model_folder / "model.safetensors")
    assert any((theirs[name] - before[name]).abs().max() > 1e-3 for name in before)
    # Adam divides by the gradient's size: where that is nearly 0, rounding moves a weight by a share of a step of 1e-3.
    assert_same_weights(ours.weights, theirs, atol=2e-4)
    assert max(float((ours.weights[name] - theirs[name]).abs().mean()) for name in theirs) < 1e-6


# ---- a stage --------------------------------------------------------------------------------------------------------


def test_a_stage_from_folder_to_folder(train_sft: Any, make_data: Any, tiny_model_folder: Path) -> None:
    trained = train_sft(make_stage(num_steps=6))
    assert trained.series("step") == [1, 2, 3, 4, 5, 6]
    assert trained.series("train/loss")[-1] < trained.series("train/loss")[0] - 0.1
    assert trained.result.facts == {
        "num_steps": 6,
        "num_answers": 32,
        "num_draws": 48,
        "num_too_long": 0,
        "num_unsafe": 0,
        "answers_share_rows": True,
    }
    assert (trained.folder / "adapter" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(trained.result.model_folder)
    AutoTokenizer.from_pretrained(trained.result.model_folder)


def test_metrics_are_sums_over_tokens(train_sft: Any, make_data: Any, tiny_model_folder: Path) -> None:
    """Step one, by all logits of each answer alone: longer answers count more, not every answer the same."""
    first = train_sft(make_stage(num_steps=1)).metrics[0]
    stage, tokenizer = make_stage(num_steps=1), AutoTokenizer.from_pretrained(tiny_model_folder)
    pairs, _ = safe_choices(stage, make_data())
    rows, _, _ = draw(encode_chosen(pairs, tokenizer, 512).dataset, stage, 8, 0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    found: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(row["prompt_ids"])
        nll = -float(log_probs[start - 1 : -1].gather(-1, ids[0, start:, None]).sum())
        found.setdefault(row["category"], []).append((nll, len(row["answer_ids"])))
    every = [item for items in found.values() for item in items]
    assert len({length for _, length in every}) > 1
    assert first["train/num_answers"] == 8
    assert first["train/num_tokens"] == sum(n for _, n in every)
    assert first["train/loss"] == pytest.approx(sum(v for v, _ in every) / sum(n for _, n in every), abs=1e-5)
    for category, items in found.items():
        num_tokens = sum(n for _, n in items)
        assert first[f"train/num_answers/{category}"] == len(items)
        assert first[f"train/num_tokens/{category}"] == num_tokens
        assert first[f"train/loss_sum/{category}"] == pytest.approx(sum(v for v, _ in items), abs=1e-3)
        assert first[f"train/loss/{category}"] == pytest.approx(
            sum(v for v, _ in items) / num_tokens, abs=1e-5
        )
    assert {name.split("/")[-1] for name in first if name.startswith("train/num_answers/")} == set(found)


@pytest.mark.parametrize("on", ["chosen", "benign"])
def test_one_answer_eight_times_equals_eight_answers_once(on: str, train_sft: Any) -> None:
    options = {"weight": WeightConfig(mode="group_dro"), "kl": KLConfig(coef=0.5, on=on, num_benign=3)}
    whole = train_sft(make_stage(**options), run="whole")
    split = train_sft(
        make_stage(per_device_batch_size=1, gradient_accumulation_steps=8, **options), run="split"
    )
    assert whole.series("train/kl")[-1] > 1e-4
    last = whole.metrics[-1]
    of_category = [
        last[f"train/kl/{c}"] * last[f"train/num_answers/{c}"] for c in CATEGORIES if f"train/kl/{c}" in last
    ]
    assert last["train/kl"] == pytest.approx(sum(of_category) / 8) if on == "chosen" else not of_category
    for mine, theirs in zip(whole.metrics, split.metrics, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5, rel=1e-4)
    assert_same_weights(whole.weights, split.weights)


def test_a_model_without_4d_masks_trains_alike(train_sft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = train_sft(make_stage(), run="shared")
    monkeypatch.setattr("equipoise.train.training.can_share_prompt", lambda *_: False)
    apart = train_sft(make_stage(), run="apart")
    assert (shared.result.facts["answers_share_rows"], apart.result.facts["answers_share_rows"]) == (
        True,
        False,
    )
    assert any("a row of its own" in line for line in apart.said)
    assert_same_weights(shared.weights, apart.weights)


# ---- terms ----------------------------------------------------------------------------------------------------------


def test_weights_are_taken_against_tokens() -> None:
    """S1: two answers of 3 tokens, S2: one of 2. With temperature 1 either has half of the weighted tokens."""
    config = CategoryConfig(weight=WeightConfig(mode="inverse_frequency"))
    terms = CategoryTerms(config, ["S1", "S2", HELPFUL], ["S1", "S2", "S1", HELPFUL], sizes=[3, 2, 3, 50])
    _, _, weight = terms.per_pair(torch.tensor([0, 1, 2]), 1.0)
    torch.testing.assert_close(weight, torch.tensor([8 / 12, 8 / 4, 1.0]))  # 6 w_1 = 2 w_2 = 4


def test_group_dro_moves_with_the_mean_loss_of_a_token() -> None:
    config = CategoryConfig(weight=WeightConfig(mode="group_dro", eta=math.log(2)))
    terms = CategoryTerms(config, ["S1", "S2"], ["S1", "S2"], sizes=[6, 2])
    # Means a token: S1 (4 + 2) / 6 = 1, S2 0. q ~ (3/4 * 2, 1/4) = (6/7, 1/7); w = q / p.
    loss, num_tokens = torch.tensor([4.0, 2.0, 0.0]).double(), torch.tensor([2.0, 4.0, 2.0]).double()
    terms.observe_losses(torch.tensor([0, 0, 1]), loss, num_tokens)
    assert terms.state.weight.tolist() == pytest.approx([6 / 7 / (3 / 4), 1 / 7 / (1 / 4)])


@pytest.mark.parametrize("on", ["chosen", "benign"])
@pytest.mark.parametrize("model", [{}, FULL], ids=["lora", "full"])
def test_a_kl_penalty_keeps_the_policy_near_the_reference(on: str, model: Any, train_sft: Any) -> None:
    def last_kl(coef: float) -> float:
        stage = make_stage(kl=KLConfig(coef=coef, on=on), num_steps=6)
        values = train_sft(stage, run=f"kl {coef}", model=model).series("train/kl")
        assert values[0] == pytest.approx(0, abs=1e-6)
        return float(values[-1])

    assert 0 < last_kl(10.0) < 0.8 * last_kl(1e-9)


def test_benign_answers_come_pass_after_pass(make_data: Any, tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    encoded = encode_chosen(make_data(6).helpful_pairs, tokenizer, 512)
    benign = BenignAnswers(encoded.dataset, tokenizer.pad_token_id, num_answers=2, seed=3)

    def drawn(step: int, rank: int = 0, world: int = 1) -> list[int]:
        return benign.draw(step, rank, world, share_rows=True)["example"].tolist()

    first, second = ([i for step in steps for i in drawn(step)] for steps in (range(3), range(3, 6)))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert drawn(4) == drawn(4)
    assert drawn(0, 0, 2) + drawn(0, 1, 2) == drawn(0) + drawn(1)  # two ranks share the order of one


# ---- resuming, and what goes wrong ----------------------------------------------------------------------------------


def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(train_sft: Any) -> None:
    stage = make_stage(
        num_steps=6,
        save_every=2,
        lr_scheduler="cosine",
        weight=WeightConfig(mode="group_dro"),
        kl=KLConfig(coef=0.1, on="benign", num_benign=3),
    )
    whole = train_sft(stage, run="whole")
    with pytest.raises(KeyboardInterrupt):
        train_sft(stage, run="interrupted", interrupt_at=6)
    resumed = train_sft(stage, run="interrupted")
    assert resumed.started_at == 4
    assert resumed.metrics == whole.metrics[4:]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
    assert (resumed.folder / STATE_FILE).read_text() == (whole.folder / STATE_FILE).read_text()
    assert any(weight != 1 for weight in json.loads((whole.folder / STATE_FILE).read_text())["weight"])


def test_unsafe_and_long_answers_are_left_out_and_said(train_sft: Any, make_data: Any) -> None:
    data = make_data()
    data.safety_pairs[0] = replace(data.safety_pairs[0], chosen_safe=False)
    data.safety_pairs[1] = replace(data.safety_pairs[1], chosen="y" * 600)
    trained = train_sft(make_stage(num_steps=1), data=data)
    assert trained.said[:2] == [
        "safe: 1 chosen answers are labelled unsafe and left out",
        "safe: 1 of 31 answers are longer than data.max_length=512 tokens and left out "
        f"(first: {data.safety_pairs[1].id})",
    ]
    facts = trained.result.facts
    assert (facts["num_unsafe"], facts["num_too_long"], facts["num_answers"]) == (1, 1, 30)
