"""Preference training: policy folder in, better policy folder out."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback
from transformers.training_args import TrainingArguments
from trl import DPOConfig

from equipoise.data.schema import HELPFUL, PreferencePair
from equipoise.train import reference_cache
from equipoise.train.category_terms import CategoryTerms
from equipoise.train.model import load_policy, merged, peft_config, save_policy, uses_frozen_copy
from equipoise.train.pairs import EncodedPairs, encode_pairs
from equipoise.train.preference_trainer import STATE_FILE, PreferenceTrainer, TrainingError
from equipoise.train.random_contexts import RandomContexts
from equipoise.train.recipe import PreferenceStageConfig, Recipe
from equipoise.train.sampling import order_pairs
from equipoise.train.stages.context import Progress, StageContext, StageResult


def select_pairs(
    context_data: Mapping[str, list[PreferencePair]], mixture: Mapping[str, float]
) -> list[PreferencePair]:
    """The pairs of every subset with a share, one list."""
    return [pair for name, share in mixture.items() if share > 0 for pair in context_data[name]]


def draw(
    encoded: EncodedPairs, stage: PreferenceStageConfig, batch_pairs: int, seed: int
) -> tuple[Dataset, list[str], int]:
    """The training rows in order, the category names behind `category_index`, and the optimizer steps.

    batch_pairs: pairs of one optimizer step over all ranks and accumulation. The last batch is full: draws are
    rounded up to whole steps.
    """
    categories = list(encoded.dataset["category"])
    subsets = {
        "safety": [i for i, c in enumerate(categories) if c != HELPFUL],
        "helpful": [i for i, c in enumerate(categories) if c == HELPFUL],
    }
    if stage.num_steps is not None:
        num_draws = stage.num_steps * batch_pairs
    else:
        once = len(order_pairs(subsets, stage.mixture, None, seed))
        num_draws = math.ceil(once * stage.num_epochs / batch_pairs) * batch_pairs
    order = order_pairs(subsets, stage.mixture, num_draws, seed)
    names = sorted(set(categories), key=_category_order)
    index = {name: i for i, name in enumerate(names)}
    rows = encoded.dataset.select(order)
    rows = rows.add_column("category_index", [index[c] for c in rows["category"]])
    rows = rows.add_column("slot", list(range(len(order))))
    return rows, names, num_draws // batch_pairs


def run_preference(
    name: str, stage: PreferenceStageConfig, policy: str, context: StageContext
) -> StageResult:
    """Train one stage from the model folder `policy`; resumes from its last complete checkpoint."""
    started = time.perf_counter()
    recipe, folder = context.recipe, context.stage_dir(name)
    set_seed(recipe.seed)  # a stage starts alike whether or not the one before ran in this process
    model, tokenizer = load_policy(recipe.model, policy, context.say)
    pairs = select_pairs(
        {"safety": context.data.safety_pairs, "helpful": context.data.helpful_pairs}, stage.mixture
    )
    encoded = encode_pairs(pairs, tokenizer, recipe.data.max_length)
    if encoded.too_long:
        context.say(
            f"{name}: {len(encoded.too_long)} of {len(pairs)} pairs are longer than "
            f"data.max_length={recipe.data.max_length} tokens and left out (first: {', '.join(encoded.too_long[:3])})"
        )
    batch_pairs = (
        stage.per_device_batch_size * stage.gradient_accumulation_steps * PartialState().num_processes
    )
    rows, names, num_steps = draw(encoded, stage, batch_pairs, recipe.seed)
    terms = CategoryTerms(stage.category, names, list(rows["category"]))
    if context.unsafe_counts is not None:
        terms.update_from_evaluation(context.unsafe_counts)
    frozen_copy = uses_frozen_copy(recipe.model)
    reference = None
    if frozen_copy and (stage.kl.coef or any(stage.kl.per_category.values()) or stage.token_bias.coef):
        reference = _frozen(policy, recipe)
    trainer = PreferenceTrainer(
        model=model,
        ref_model=reference,
        args=_arguments(stage, recipe, folder / "checkpoints", num_steps),
        dataset=rows,
        category_names=names,
        pair_ids=encoded.ids,
        stage=stage,
        terms=terms,
        contexts=_contexts(stage, tokenizer, recipe, context),
        log=lambda metrics, step: context.log(metrics, step, name),
        warn=context.say,
        progress=lambda done, total, what: context.progress(done, total, f"{name}: {what}"),
        processing_class=tokenizer,
        peft_config=peft_config(recipe.model),
        callbacks=[_ProgressCallback(context.progress, f"{name}: training")],
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.gate.every and stage.evaluate:
        trainer.add_callback(_GateCallback(trainer, name, context))
    watched = trainer.ref_model if trainer.ref_model is not None else trainer.model
    before = reference_cache.weights_fingerprint(watched) if _is_frozen(trainer, recipe) else None
    checkpoint = _resume_from(folder / "checkpoints", trainer, context.say)
    context.rewind(name, int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if before is not None:
        after = reference_cache.weights_fingerprint(watched)
        assert after == before, "the reference's weights changed during training"
    final = merged(trainer.accelerator.unwrap_model(trainer.model))
    model_folder = folder / "model"
    if trainer.accelerator.is_main_process:
        save_policy(final, tokenizer, model_folder)
        (folder / STATE_FILE).write_text(json.dumps(terms.state_dict()) + "\n")
    trainer.accelerator.wait_for_everyone()
    seconds = time.perf_counter() - started
    facts: dict[str, object] = {
        "num_steps": num_steps,
        "num_pairs": len(encoded.ids),
        "num_draws": len(rows),
        "num_too_long": len(encoded.too_long),
        "one_row_a_pair": not trainer.data_collator.two_rows,
        "reference_cache_hit": trainer.reference_cache_hit,
        "beta_over_lam": stage.beta / stage.lam,
    }
    return StageResult(str(model_folder), seconds, facts)


def _category_order(name: str) -> tuple[bool, int, str]:
    """S2 before S10, and what is no hazard last."""
    number = name.removeprefix("S")
    return (name == HELPFUL, int(number) if number.isdigit() else 10**6, name)


def _is_frozen(trainer: PreferenceTrainer, recipe: Recipe) -> bool:
    """Whether there is a reference in memory that could change: the base under an adapter, or the frozen copy."""
    return recipe.model.lora.enabled or trainer.ref_model is not None


def _frozen(policy: str, recipe: Recipe) -> torch.nn.Module:
    model, _ = load_policy(recipe.model, policy)
    return model.requires_grad_(False)


def _contexts(
    stage: PreferenceStageConfig, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, context: StageContext
) -> RandomContexts | None:
    if not stage.token_bias.coef:
        return None
    words = [turn["content"] for pair in context.data.safety_pairs for turn in pair.prompt]
    return RandomContexts(tokenizer, stage.token_bias, words=words, seed=recipe.seed)


def _arguments(stage: PreferenceStageConfig, recipe: Recipe, folder: Path, num_steps: int) -> DPOConfig:
    on_cpu = not torch.cuda.is_available()
    return DPOConfig(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=stage.per_device_batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.lr_scheduler,
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        beta=stage.beta / stage.lam,
        # bf16 weights: activations in bf16, adapters and their optimizer in fp32.
        bf16=recipe.model.dtype == "bfloat16",
        fp16=False,
        use_cpu=on_cpu,
        activation_checkpointing=recipe.model.gradient_checkpointing,
        seed=recipe.seed,
        data_seed=recipe.seed,
        train_sampling_strategy="sequential",  # `order_pairs` has done it
        remove_unused_columns=False,
        precompute_ref_log_probs=True,
        max_length=None,
        save_strategy="steps" if stage.save_every else "no",
        save_steps=max(stage.save_every, 1),
        save_total_limit=2,
        logging_strategy="no",  # `_finish_step` writes exact metrics instead
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
    )


def _resume_from(folder: Path, trainer: PreferenceTrainer, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint, its category state loaded; incomplete ones are named and passed over."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        try:
            state = json.loads((checkpoint / STATE_FILE).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            say(f"{checkpoint} is not complete (interrupted while saving) and passed over")
            continue
        try:
            trainer.terms.load_state_dict(state)
        except ValueError as error:
            raise TrainingError(
                f"{checkpoint}: {error}; remove the folder to start the stage anew"
            ) from error
        say(f"resuming from {checkpoint}")
        return checkpoint
    return None


class _ProgressCallback(TrainerCallback):
    def __init__(self, progress: Progress, what: str) -> None:
        self._progress, self._what = progress, what

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._progress(state.global_step, state.max_steps, self._what)


class _GateCallback(TrainerCallback):
    """Judge, gate and update the category terms every `gate.every` optimizer steps."""

    def __init__(self, trainer: PreferenceTrainer, name: str, context: StageContext) -> None:
        self._trainer, self._name, self._context = trainer, name, context

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        context, trainer = self._context, self._trainer
        due = state.global_step % context.recipe.gate.every == 0 and state.global_step < state.max_steps
        if not due or context.gate_inside is None:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        context.gate_inside(self._name, state.global_step, model, trainer.processing_class)
        if context.unsafe_counts is not None:
            trainer.terms.update_from_evaluation(context.unsafe_counts)
