"""KTO: policy folder in, better policy folder out, from answers that are desirable or not."""

from dataclasses import replace

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from equipoise.data.schema import HELPFUL, UnpairedExchange
from equipoise.data.sources import SafetyData
from equipoise.data.templates import EncodingLimits
from equipoise.data.unpaired import UnpairedData, from_labelled, from_pairs, load_unpaired
from equipoise.train.answers import encode_answers
from equipoise.train.recipe import DataConfig
from equipoise.train.recipe.stages import KTOStageConfig
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.stages.log_ratios import Drawn, draw, train_on_log_ratios
from equipoise.train.trainers.kto import KTOTrainer
from equipoise.train.trainers.mismatched import with_mismatched
from equipoise.train.training import examples_per_step


def stage_examples(stage: KTOStageConfig, config: DataConfig, data: SafetyData) -> UnpairedData:
    """The stage's examples, of every subset with a share: split pairs, or those that come unpaired.

    Raises DataError for a file of `data.unpaired_path` that cannot be used.
    """
    if stage.split_pairs:
        found = UnpairedData(from_pairs([*data.safety_pairs, *data.helpful_pairs]))
    elif config.unpaired_path is not None:
        suites = [*data.harmful_prompts, *data.lookalike_prompts, *data.helpful_prompts]
        found = load_unpaired(config.unpaired_path, suites)
    else:
        found = from_labelled(data.labelled)
    drawn = [e for e in found.exchanges if stage.mixture.get(subset_of(e), 0) > 0]
    return replace(found, exchanges=drawn)


def subset_of(example: UnpairedExchange) -> str:
    """The subset of a mixture that an example is in."""
    return "helpful" if example.category == HELPFUL else "safety"


def run_kto(name: str, stage: KTOStageConfig, policy: str, context: StageContext) -> StageResult:
    """Train one stage from the model folder `policy`; resumes from its last complete checkpoint."""
    recipe = context.recipe

    def prepare(tokenizer: PreTrainedTokenizerBase) -> Drawn:
        found = stage_examples(stage, recipe.data, context.data)
        if found.num_in_suites:
            context.say(f"{name}: {found.num_in_suites} answers left out, whose prompt a suite asks too")
        if found.num_unlabelled:
            context.say(
                f"{name}: {found.num_unlabelled} answers left out, whose labels do not say whether they are desirable"
            )
        examples = found.exchanges
        limits = EncodingLimits.of(recipe.data)
        encoded = encode_answers(examples, tokenizer, recipe.data.max_length, limits)
        for line in encoded.left_out:
            context.say(f"{name}: {line}")
        rows, names, num_steps = draw(encoded.dataset, stage, examples_per_step(stage), recipe.seed)
        num_draws, num_desirable = len(rows), sum(rows["desirable"])
        forward_pass = stage.per_device_batch_size * PartialState().num_processes
        rows, ids = with_mismatched(rows, encoded, forward_pass, recipe.data.max_length)
        if num_desirable in (0, num_draws):
            which = "desirable" if num_desirable else "undesirable"
            context.say(f"{name}: every answer is {which}: KTO learns from both sides")
        facts: dict[str, object] = {
            "num_examples": len(encoded.ids),
            "num_too_long": len(encoded.too_long),
            "num_in_suites": found.num_in_suites,
            "num_unlabelled": found.num_unlabelled,
            "num_desirable_draws": num_desirable,
        }
        return Drawn(rows, names, ids, num_steps, facts)

    return train_on_log_ratios(name, stage, policy, context, prepare, KTOTrainer)
