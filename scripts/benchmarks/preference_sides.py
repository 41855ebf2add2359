"""What `scripts/benchmark preference` compares: one draw of pairs, and the trainers that train on it."""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from equipoise.data.errors import EquipoiseError
from equipoise.data.schema import PreferencePair
from equipoise.data.sources import load_jsonl_pairs, load_samples
from equipoise.eval.models import load_model, load_tokenizer
from equipoise.train.model import peft_config
from equipoise.train.pairs import PairCollator, encode_pairs
from equipoise.train.recipe import ModelConfig
from equipoise.train.recipe.stages import (
    CategoryConfig,
    MarginConfig,
    MultiplierConfig,
    PreferenceStageConfig,
    WeightConfig,
)
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.preference import PreferenceTrainer


@dataclass
class Work:
    """What both sides train on."""

    pairs: list[PreferencePair]
    rows: Dataset
    """Our tokens, one row a pair, in training order."""
    category_names: list[str]
    batches: list[list[int]]
    """Row numbers, one list an optimizer step."""
    num_tokens: dict[str, list[int]]
    """Tokens of each batch that `trl` and `equipoise` put through the model, padding included."""

    def largest(self, side: str) -> list[int]:
        """The batch of most tokens for one side."""
        tokens = self.num_tokens[side]
        return self.batches[tokens.index(max(tokens))]

    def first(self, num_batches: int) -> "Work":
        """The same with the first batches only."""
        batches = self.batches[:num_batches]
        num_pairs = sum(map(len, batches))
        tokens = {side: values[:num_batches] for side, values in self.num_tokens.items()}
        rows = self.rows.select(range(num_pairs))
        return Work(self.pairs[:num_pairs], rows, self.category_names, batches, tokens)


class _Trl(DPOTrainer):
    """Notes how long the constructor's pass over the reference took."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        started = time.perf_counter()
        result = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds = time.perf_counter() - started
        return result


class _Ours(PreferenceTrainer):
    """Notes the same of the pass that ours makes when training begins."""

    reference_seconds = 0.0

    def load_reference(self) -> None:
        started = time.perf_counter()
        super().load_reference()
        self.reference_seconds = time.perf_counter() - started


class Side:
    """A trainer driven one optimizer step at a time, doing what `Trainer.train` does between two log lines."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        if isinstance(trainer, PreferenceTrainer):
            trainer.load_reference()

    def step(self, rows: Sequence[int]) -> tuple[float, float]:
        """(loss, seconds) of one step on these rows of the data, collating included."""
        trainer = self.trainer
        started = time.perf_counter()
        batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
        loss = float(trainer.training_step(self.model, batch))
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        trainer.state.global_step += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return loss, time.perf_counter() - started

    def adapters(self) -> dict[str, torch.Tensor]:
        """A copy of the trained weights, by name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def share_base(self, other: "Side") -> None:
        """Use the other side's frozen weights in place of equal ones: several sides, one base in memory."""
        base = dict(other.model.named_parameters())
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                assert torch.equal(parameter, base[name]), name
                parameter.data = base[name].data


def prepare(options: argparse.Namespace) -> Work:
    """Draw the pairs and cut them into batches. Raises DataError, and EquipoiseError for too few pairs."""
    if options.pairs:
        pairs = [pair for path in options.pairs for pair in load_jsonl_pairs(path)]
    else:
        samples = load_samples()
        pairs = samples.safety_pairs + samples.helpful_pairs
    random.Random(options.seed).shuffle(pairs)
    pairs = [replace(pair, id=str(i)) for i, pair in enumerate(pairs)]  # two files may use the same ids
    wanted = options.steps * options.batch_size
    tokenizer = load_tokenizer(options.model)
    encoded = encode_pairs(pairs[: 2 * wanted], tokenizer, options.max_length)
    if len(encoded.ids) < wanted:
        raise EquipoiseError(
            f"{len(encoded.ids)} pairs fit into {options.max_length} tokens; {options.steps} steps of "
            f"{options.batch_size} need {wanted}. Give more --pairs, or fewer --steps."
        )
    rows = encoded.dataset.select(range(wanted))
    names = sorted(set(rows["category"]))
    rows = rows.add_column("category_index", [names.index(category) for category in rows["category"]])
    rows = rows.add_column("slot", list(range(wanted)))
    size = options.batch_size
    batches = [list(range(start, start + size)) for start in range(0, wanted, size)]
    ours, trl = PairCollator(tokenizer.pad_token_id), DataCollatorForPreference(tokenizer.pad_token_id)
    num_tokens = {
        side: [collator([rows[i] for i in batch])["input_ids"].numel() for batch in batches]
        for side, collator in (("trl", trl), ("equipoise", ours))
    }
    return Work([pairs[int(name)] for name in encoded.ids[:wanted]], rows, names, batches, num_tokens)


def _arguments(options: argparse.Namespace, folder: Path, **more: Any) -> DPOConfig:
    """The same for both sides but for `more`; what isn't named is TRL's default."""
    on_cpu = not torch.cuda.is_available()
    return DPOConfig(
        output_dir=str(folder),
        max_steps=options.steps + 1,  # the warm-up is one
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=options.gradient_checkpointing,
        max_length=None,  # longer pairs are left out on both sides
        seed=options.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def _lora() -> LoraConfig:
    return peft_config(ModelConfig())


def trl_side(options: argparse.Namespace, work: Work, scratch: Path, *, precompute: bool = False) -> Side:
    """TRL's trainer, given the texts and tokenising them itself."""
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    texts = Dataset.from_list(
        [
            {
                "prompt": list(pair.prompt),
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            for pair in work.pairs
        ]
    )
    trainer = _Trl(
        model=model,
        args=_arguments(options, scratch / "trl", precompute_ref_log_probs=precompute),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=_lora(),
    )
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        if list(trainer.train_dataset[name]) != list(work.rows[name]):
            raise EquipoiseError(
                f"TRL and equipoise tokenise these pairs differently ({name}): nothing to compare."
            )
    return Side(trainer)


def our_side(options: argparse.Namespace, work: Work, scratch: Path) -> Side:
    """Our trainer without category terms, as TRL has none."""
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    stage = PreferenceStageConfig()
    return Side(
        _Ours(
            model=model,
            ref_model=None,
            args=_arguments(options, scratch / "equipoise", precompute_ref_log_probs=True),
            dataset=work.rows,
            category_names=work.category_names,
            pair_ids=[pair.id for pair in work.pairs],
            stage=stage,
            terms=CategoryTerms(stage.category, work.category_names, work.rows["category"]),
            contexts=None,
            log=lambda metrics, step: None,
            processing_class=tokenizer,
            peft_config=_lora(),
        )
    )


def all_terms(work: Work) -> CategoryTerms:
    """Margin, group DRO and multiplier together, moved after every step."""
    config = CategoryConfig(
        margin=MarginConfig(enabled=True),
        weight=WeightConfig(mode="group_dro"),
        multiplier=MultiplierConfig(enabled=True),
        update_every=1,
    )
    return CategoryTerms(config, work.category_names, work.rows["category"])
