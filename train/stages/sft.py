"""Supervised fine-tuning on the chosen answers: policy folder in, policy folder out."""

import time
from dataclasses import replace

from accelerate.utils import set_seed
from trl import SFTConfig

from equipoise.data.schema import PreferencePair, UnpairedExchange
from equipoise.data.sources import SafetyData
from equipoise.data.templates import EncodingLimits
from equipoise.train.answers import chosen_answers, encode_answers
from equipoise.train.model import load_frozen, load_trainable, peft_config, uses_frozen_copy
from equipoise.train.recipe.stages import CategoryConfig, SFTStageConfig
from equipoise.train.stage_tasks import demonstrations, stage_tasks
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.stages.log_ratios import benign_answers, draw
from equipoise.train.stages.preference import select_pairs
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.sft import SupervisedTrainer
from equipoise.train.training import (
    examples_per_step,
    save_trained,
    shares_prompts,
    train,
    training_arguments,
)


def safe_choices(stage: SFTStageConfig, data: SafetyData) -> tuple[list[PreferencePair], int]:
    """The mixture's pairs whose chosen answer nobody labelled unsafe, and how many were left out because of it."""
    pairs = select_pairs({"safety": data.safety_pairs, "helpful": data.helpful_pairs}, stage.mixture)
    kept = [pair for pair in pairs if pair.chosen_safe is not False]
    return kept, len(pairs) - len(kept)


def stage_answers(stage: SFTStageConfig, context: StageContext) -> tuple[list[UnpairedExchange], int]:
    """What the stage trains on, and how many answers were left out because they are labelled unsafe."""
    if stage.tasks_of is not None:
        seed = context.recipe.seed
        tasks = stage_tasks(context.recipe.stages[stage.tasks_of], context.data, seed)
        return demonstrations(tasks, stage.abstention_rate, seed), 0
    pairs, num_unsafe = safe_choices(stage, context.data)
    return chosen_answers(pairs), num_unsafe


def run_sft(name: str, stage: SFTStageConfig, policy: str, context: StageContext) -> StageResult:
    """Train one stage from the model folder `policy`; resumes from its last complete checkpoint."""
    started = time.perf_counter()
    recipe, folder = context.recipe, context.stage_dir(name)
    set_seed(recipe.seed)  # a stage starts alike whether or not the one before ran in this process
    model, tokenizer = load_trainable(recipe.model, policy, context.say)
    exchanges, num_unsafe = stage_answers(stage, context)
    if num_unsafe:
        context.say(f"{name}: {num_unsafe} chosen answers are labelled unsafe and left out")
    limits = EncodingLimits.of(recipe.data)
    encoded = encode_answers(exchanges, tokenizer, recipe.data.max_length, limits)
    for line in encoded.left_out:
        context.say(f"{name}: {line}")
    # Tasks are drawn alike, as `draw` does with what is not helpful.
    drawn_by = replace(stage, mixture={"safety": 1.0}) if stage.tasks_of is not None else stage
    rows, names, num_steps = draw(encoded.dataset, drawn_by, examples_per_step(stage), recipe.seed)
    terms = CategoryTerms(
        CategoryConfig(weight=stage.weight),
        names,
        list(rows["category"]),
        sizes=[float(len(ids)) for ids in rows["answer_ids"]],
    )
    trainer = SupervisedTrainer(
        model=model,
        ref_model=load_frozen(recipe.model, policy)
        if stage.kl.active and uses_frozen_copy(recipe.model)
        else None,
        args=SFTConfig(
            **training_arguments(stage, recipe, folder / "checkpoints", num_steps),
            activation_checkpointing=recipe.model.gradient_checkpointing,
            max_length=None,  # the data has been cut and counted before
        ),
        dataset=rows,
        category_names=names,
        ids=encoded.ids,
        stage=stage,
        terms=terms,
        benign=benign_answers(stage.kl, tokenizer, context),
        share_rows=shares_prompts(name, model, tokenizer, policy, context),
        log=lambda metrics, step: context.log(metrics, step, name),
        processing_class=tokenizer,
        peft_config=peft_config(recipe.model),
    )
    train(trainer, name, stage, context, terms.load_state_dict)
    model_folder = save_trained(trainer, policy, recipe.model, folder)
    facts: dict[str, object] = {
        "num_steps": num_steps,
        "num_answers": len(encoded.ids),
        "num_draws": len(rows),
        "num_too_long": len(encoded.too_long),
        "num_unsafe": num_unsafe,
        "answers_share_rows": trainer.data_collator.share_rows,
    }
    return StageResult(model_folder, time.perf_counter() - started, facts)
