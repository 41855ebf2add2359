import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

from equipoise.data.schema import LabelledExchange, UnpairedExchange
from equipoise.data.unpaired import from_pairs
from equipoise.train.answers import EncodedAnswers, encode_answers
from equipoise.train.recipe import LoraConfig
from equipoise.train.recipe.stages import (
    CategoryConfig,
    KLConfig,
    KTOStageConfig,
    MultiplierConfig,
    WeightConfig,
)
from equipoise.train.stages.kto import run_kto
from equipoise.train.stages.log_ratios import draw
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.kto import KTOTrainer
from equipoise.train.trainers.mismatched import passed_on, with_mismatched


def make_kto(**options: Any) -> KTOStageConfig:
    """Four steps of eight single answers, split from the data's pairs."""
    defaults: dict[str, Any] = {
        "mixture": {"safety": 0.75, "helpful": 0.25},
        "split_pairs": True,
        "num_steps": 4,
        "lr_scheduler": "constant",
        "warmup": 0.0,
        "learning_rate": 1e-3,
        "evaluate": False,
    }
    return KTOStageConfig(**(defaults | options))


@pytest.fixture
def train_kto(train_stage: Any) -> Any:
    return lambda stage, **options: train_stage(stage, runner=run_kto, **options)


# ---- the loss, against TRL's ----------------------------------------------------------------------------------------


def tiny(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def softer(folder: Path) -> Any:
    """Some way off, always the same, and less sure of everything: the reference point is above 0."""
    model, generator = tiny(folder), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
        model.lm_head.weight *= 0.9
    return model


def exchanges(make_data: Any) -> list[UnpairedExchange]:
    """Eight answers to eight prompts, four of them desirable; two desirable ones are each other's neighbours."""
    split = from_pairs(make_data().safety_pairs)
    return [split[2 * i + (i % 3 > 0)] for i in range(8)]


@pytest.mark.parametrize("which", ["mixed", "desirable", "undesirable"])
def test_loss_and_gradient_equal_trls(
    which: str, make_data: Any, tmp_path: Path, cache: Path, tiny_model_folder: Path, tiny_tokenizer: Any
) -> None:
    answers = exchanges(make_data)
    if which != "mixed":
        answers = [replace(answer, desirable=which == "desirable") for answer in answers]
    conversations = Dataset.from_list(
        [
            {
                "prompt": [dict(turn) for turn in answer.prompt],
                "completion": [{"role": "assistant", "content": answer.response}],
                "label": answer.desirable,
            }
            for answer in answers
        ]
    )
    common = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "activation_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }
    theirs = trl.KTOTrainer(
        model=softer(tiny_model_folder),
        ref_model=tiny(tiny_model_folder),
        args=trl.KTOConfig(
            **common, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, dataset_num_proc=None
        ),
        train_dataset=conversations,
        processing_class=tiny_tokenizer,
    )
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(8)])
    their_loss = theirs._compute_loss(theirs.model, batch, False)
    their_loss.backward()

    stage = make_kto(beta=0.6, lam=2.0, desirable_weight=1.2, undesirable_weight=0.7)
    encoded = encode_answers(answers, tiny_tokenizer, 512)
    rows = encoded.dataset.add_column("category_index", [0] * 8).add_column("slot", list(range(8)))
    rows, ids = with_mismatched(rows, encoded, 8, 512)
    ours = KTOTrainer(
        model=softer(tiny_model_folder),
        ref_model=tiny(tiny_model_folder),
        args=trl.DPOConfig(**common, precompute_ref_log_probs=True, max_length=None),
        dataset=rows,
        category_names=["S1"],
        pair_ids=ids,
        stage=stage,
        terms=CategoryTerms(stage.category, ["S1"], ["S1"] * 8),
        contexts=None,
        log=lambda metrics, step: None,
        processing_class=tiny_tokenizer,
    )
    ours.load_reference()
    batch = ours.data_collator([ours.train_dataset[i] for i in range(8)])
    our_loss = ours._compute_loss(ours.model, batch, False)
    our_loss.backward()
    assert float(ours._z_ref) > 0.01
    assert float(ours._z_ref) == pytest.approx(theirs._metrics["eval"]["kl"][0], abs=1e-4)
    assert float(our_loss.detach()) == pytest.approx(float(their_loss.detach()), abs=1e-5)
    for (name, mine), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: n + m)


# ---- a stage --------------------------------------------------------------------------------------------------------


def test_a_stage_from_folder_to_folder(train_kto: Any) -> None:
    trained = train_kto(make_kto(num_steps=8))
    assert trained.series("train/loss")[0] == pytest.approx(0.5)
    assert trained.series("train/z_ref")[0] == pytest.approx(0, abs=1e-5)
    assert trained.series("train/loss")[-1] < 0.49
    assert trained.series("train/desirable_log_ratio")[-1] > trained.series("train/undesirable_log_ratio")[-1]
    assert trained.series("train/accuracy")[-1] > 0.7
    assert trained.series("train/num_examples") == [8] * 8
    last = trained.metrics[-1]
    counts = {name: value for name, value in last.items() if name.startswith("train/num_examples/")}
    assert sum(counts.values()) == 8
    assert last["train/loss"] == pytest.approx(
        sum(value for name, value in last.items() if name.startswith("train/loss_sum/")) / 8
    )
    assert trained.result.facts["num_examples"] == 64
    assert (trained.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(trained.result.model_folder).num_parameters() > 0


@pytest.mark.slow
def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(train_kto: Any) -> None:
    stage = make_kto(
        save_every=2,
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        category=CategoryConfig(
            weight=WeightConfig(mode="group_dro"), multiplier=MultiplierConfig(enabled=True), update_every=3
        ),
        kl=KLConfig(coef=0.1),
    )
    whole = train_kto(stage, run="whole")
    with pytest.raises(KeyboardInterrupt):
        train_kto(stage, run="interrupted", interrupt_at=4)
    resumed = train_kto(stage, run="interrupted")
    assert resumed.started_at == 2
    assert resumed.result.facts["reference_cache_hit"]
    assert resumed.metrics == whole.metrics[2:]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
    assert any(value != 1 for name, value in whole.metrics[-1].items() if "category/weight/" in name)
    assert any(value != 1 for name, value in whole.metrics[-1].items() if "category/multiplier/" in name)
    assert whole.metrics[-1]["train/kl"] > 0


@pytest.mark.parametrize("desirable", [True, False])
def test_a_stage_with_one_side_alone_trains_and_says_so(
    desirable: bool, train_kto: Any, make_data: Any
) -> None:
    data = make_data()
    data.labelled.extend(
        LabelledExchange(p.id, p.prompt, p.chosen, p.category, safe=desirable) for p in data.safety_pairs
    )
    stage = make_kto(split_pairs=False, mixture={"safety": 1.0}, kl=KLConfig(coef=0.1))
    trained = train_kto(stage, data=data)
    which = "desirable" if desirable else "undesirable"
    assert f"safe: every answer is {which}: KTO learns from both sides" in trained.said
    assert all(math.isfinite(value) for line in trained.metrics for value in line.values())
    ratios = trained.series(f"train/{which}_log_ratio")
    assert ratios[-1] > ratios[0] if desirable else ratios[-1] < ratios[0]
    other = "undesirable" if desirable else "desirable"
    assert not any(f"train/{other}_log_ratio" in line for line in trained.metrics)
    # The KL penalty is on desirable answers; where there are none it is absent, as `train/h` of an absent category is.
    assert len(trained.series("train/kl")) == (4 if desirable else 0)


def test_a_frozen_copy_trains_as_the_adapter_switched_off_does(train_kto: Any) -> None:
    stage = make_kto(num_steps=2, kl=KLConfig(coef=0.1))
    off = train_kto(stage, run="off")
    copy = train_kto(stage, run="copy", model={"reference": "frozen_copy"})
    for mine, theirs in zip(off.metrics, copy.metrics, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    full = train_kto(make_kto(num_steps=1), run="full", model={"lora": LoraConfig(enabled=False)})
    assert not (full.folder / "adapter").exists()


# ---- the rows -------------------------------------------------------------------------------------------------------


def encoded(prompts: list[list[int]], answers: list[list[int]]) -> EncodedAnswers:
    rows = [
        {"prompt_ids": p, "answer_ids": a, "desirable": True, "category": "S1", "example": i}
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    return EncodedAnswers(Dataset.from_list(rows), [f"id{i}" for i in range(len(rows))], [])


def test_answers_are_passed_on_by_one_place_in_every_forward_pass() -> None:
    all_of = encoded([[1], [2], [3], [4], [5]], [[10], [20], [30], [40], [50]])
    rows, ids = with_mismatched(all_of.dataset, all_of, 3, 512)
    assert rows["chosen_ids"] == [[10], [20], [30], [40], [50]]
    assert rows["rejected_ids"] == [[30], [10], [20], [50], [40]]
    assert rows["pair"] == [0, 1, 2, 3, 4]
    assert ids == ["id0", "id1", "id2", "id3", "id4"]


def test_what_is_drawn_again_beside_the_same_answer_is_one_pair() -> None:
    all_of = encoded([[1], [2]], [[10], [20]])
    rows, ids = with_mismatched(all_of.dataset.select([0, 1, 0, 1, 1, 0]), all_of, 2, 512)
    assert rows["pair"] == [0, 1, 0, 1, 1, 0]
    assert ids == ["id0", "id1"]


def test_a_prompt_does_not_get_an_answer_of_its_own_where_that_can_be_avoided() -> None:
    prompts = [[1], [1], [2], [2]]  # pairs that were split stand beside one another
    assert passed_on(range(4), prompts) == [2, 3, 0, 1]
    assert passed_on(range(2), [[1], [1]]) == [1, 0]  # here it cannot
    assert passed_on([7], prompts * 2) == [7]


def test_a_long_answer_is_cut_off_behind_another_prompt() -> None:
    all_of = encoded([[1] * 6, [2]], [[10], [20] * 8])
    rows, _ = with_mismatched(all_of.dataset, all_of, 2, 9)
    assert rows["rejected_ids"] == [[20] * 3, [10]]


def test_the_last_draws_are_full_forward_passes(make_data: Any, tiny_tokenizer: Any) -> None:
    all_of = encode_answers(from_pairs(make_data().safety_pairs), tiny_tokenizer, 512)
    rows, _, num_steps = draw(all_of.dataset, make_kto(num_steps=None, mixture={"safety": 1.0}), 7, 0)
    assert len(rows) == 7 * num_steps
    assert num_steps == math.ceil(48 / 7)
