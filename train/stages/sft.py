"""Supervised fine-tuning on the chosen answers: policy folder in, policy folder out."""

import time

from accelerate.utils import set_seed
from trl import SFTConfig

from equipoise.data.schema import PreferencePair
from equipoise.data.sources import SafetyData
from equipoise.train.answers import encode_chosen
from equipoise.train.category_terms import CategoryTerms
from equipoise.train.model import load_policy, peft_config, uses_frozen_copy
from equipoise.train.recipe_stages import CategoryConfig, SFTStageConfig
from equipoise.train.sft_trainer import SupervisedTrainer
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.stages.log_ratios import benign_answers, draw, frozen_copy_of
from equipoise.train.stages.preference import select_pairs
from equipoise.train.training import examples_per_step, save_trained, train, training_arguments


def safe_choices(stage: SFTStageConfig, data: SafetyData) -> tuple[list[PreferencePair], int]:
    """The mixture's pairs whose chosen answer nobody labelled unsafe, and how many were left out because of it."""
    pairs = select_pairs({"safety": data.safety_pairs, "helpful": data.helpful_pairs}, stage.mixture)
    kept = [pair for pair in pairs if pair.chosen_safe is not False]
    return kept, len(pairs) - len(kept)


def run_sft(name: str, stage: SFTStageConfig, policy: str, context: StageContext) -> StageResult:
    """Train one stage from the model folder `policy`; resumes from its last complete checkpoint."""
    started = time.perf_counter()
    recipe, folder = context.recipe, context.stage_dir(name)
    set_seed(recipe.seed)  # a stage starts alike whether or not the one before ran in this process
    model, tokenizer = load_policy(recipe.model, policy, context.say)
    pairs, num_unsafe = safe_choices(stage, context.data)
    if num_unsafe:
        context.say(f"{name}: {num_unsafe} chosen answers are labelled unsafe and left out")
    encoded = encode_chosen(pairs, tokenizer, recipe.data.max_length)
    if encoded.too_long:
        context.say(
            f"{name}: {len(encoded.too_long)} of {len(pairs)} answers are longer than data.max_length="
            f"{recipe.data.max_length} tokens and left out (first: {', '.join(encoded.too_long[:3])})"
        )
    rows, names, num_steps = draw(encoded.dataset, stage, examples_per_step(stage), recipe.seed)
    terms = CategoryTerms(
        CategoryConfig(weight=stage.weight),
        names,
        list(rows["category"]),
        sizes=[float(len(ids)) for ids in rows["answer_ids"]],
    )
    trainer = SupervisedTrainer(
        model=model,
        ref_model=frozen_copy_of(policy, recipe)
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
        log=lambda metrics, step: context.log(metrics, step, name),
        warn=context.say,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.model),
    )
    train(trainer, name, stage, context, terms.load_state_dict)
    model_folder = save_trained(trainer, policy, folder)
    facts: dict[str, object] = {
        "num_steps": num_steps,
        "num_answers": len(encoded.ids),
        "num_draws": len(rows),
        "num_too_long": len(encoded.too_long),
        "num_unsafe": num_unsafe,
        "answers_share_rows": trainer.data_collator.share_rows,
    }
    return StageResult(model_folder, time.perf_counter() - started, facts)
