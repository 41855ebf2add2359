"""What a dry run says of each kind of stage: steps, examples, tokens, memory and time; one function a kind."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from equipoise.data.sources import SafetyData
from equipoise.data.templates import EncodingLimits, encode_turns
from equipoise.train.answers import EncodedAnswers, chosen_answers, encode_answers
from equipoise.train.merging import SHARD_BYTES
from equipoise.train.pairs import EncodedPairs, encode_pairs
from equipoise.train.planning.machine import Machine
from equipoise.train.planning.memory import Memory, Training
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.rl import GRPOStageConfig, SafeRLHFStageConfig
from equipoise.train.recipe.stages import (
    CostModelStageConfig,
    KTOStageConfig,
    LogRatioStageConfig,
    MergeStageConfig,
    PreferenceStageConfig,
    RewardModelStageConfig,
    ScorerStageConfig,
    SFTStageConfig,
    StageConfig,
    TokenBiasStageConfig,
    TrainingConfig,
)
from equipoise.train.scorer_pairs import scorer_pairs, split_by_prompt
from equipoise.train.stage_tasks import demonstrations, stage_tasks
from equipoise.train.stages.grpo import draw_tasks, prompts_per_step
from equipoise.train.stages.kto import stage_examples
from equipoise.train.stages.log_ratios import draw
from equipoise.train.stages.preference import stage_pairs
from equipoise.train.stages.safe_rlhf import stage_prompts
from equipoise.train.stages.sft import safe_choices
from equipoise.train.trainers.shared_prompts import MIN_SAVING
from equipoise.train.training import examples_per_step

DECODING = 10
"""Decoding reads every weight once a token and a batch; bound by memory, it is put at a tenth of the peak."""
TEMPLATE_TOKENS = 30
"""Of a chat template around a random prompt, roughly."""


Needs = Callable[[Training, int], Memory]
"""What a stage takes on a device: (the model as it is trained, examples a forward pass) -> memory."""


@dataclass(frozen=True)
class StagePlan:
    """A row of the plan; what a kind of stage has not is empty."""

    needs: Needs
    """For the recipe as it is and, to say what would fit, as it might be."""
    steps: str = ""
    examples: str = ""
    tokens: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Planning:
    """What the plans are made from."""

    recipe: Recipe
    data: SafetyData
    tokenizer: PreTrainedTokenizerBase
    training: Training
    machine: Machine
    say: Callable[[str], None]

    @property
    def num_processes(self) -> int:
        """Of the launch that is planned."""
        return self.training.engine.num_processes

    def passes(self, num_passes: int, num_tokens: int) -> float:
        """Seconds of forward passes (a backward pass is one, or two with weight gradients) over tokens of all ranks."""
        num_flops = num_passes * 2 * self.training.size.num_parameters * num_tokens
        return num_flops / self.num_processes / (self.machine.flops * self.machine.efficiency)

    def decoding(self, num_tokens: int) -> float:
        """Seconds of sampling tokens, of all ranks."""
        num_flops = 2 * self.training.size.num_parameters * num_tokens
        return num_flops * DECODING / self.num_processes / self.machine.flops

    def traffic(self, num_microbatches: int) -> float:
        """Seconds in which gradients, and sharded weights, travel, none of it hidden; 0 where no bandwidth is known."""
        if self.machine.bandwidth is None:
            return 0.0
        return num_microbatches * self.training.engine.traffic(self.training) / self.machine.bandwidth

    @property
    def learning(self) -> int:
        """Passes of a training step: forward, backward without or with weight gradients, what is recomputed."""
        return (2 if self.training.rank is not None else 3) + self.training.checkpointing

    def memory(self, stage: StageConfig, row: StagePlan) -> Memory:
        """What the stage takes on a device as the recipe has it."""
        return row.needs(
            self.training, stage.per_device_batch_size if isinstance(stage, TrainingConfig) else 1
        )


def plan_stage(name: str, stage: StageConfig, planning: Planning) -> StagePlan:
    """The row of a stage; raises DataError and RecipeError where running it would."""
    return PLANS[type(stage)](name, stage, planning)


def _pairs(name: str, stage: PreferenceStageConfig | ScorerStageConfig, planning: Planning) -> StagePlan:
    recipe = planning.recipe
    scores = isinstance(stage, ScorerStageConfig)
    if isinstance(stage, ScorerStageConfig):
        pairs, _ = scorer_pairs(stage, planning.data)
        pairs, _ = split_by_prompt(pairs, stage.held_out_fraction, recipe.seed)
    else:
        pairs, _ = stage_pairs(stage, planning.data)
    encoded = encode_pairs(pairs, planning.tokenizer, recipe.data.max_length, EncodingLimits.of(recipe.data))
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    given = _given(name, "pairs", stage, encoded, encoded.dataset, parts, planning)

    def needs(training: Training, batch_size: int) -> Memory:
        if isinstance(stage, ScorerStageConfig):
            return training.scorer(batch_size * given.longest)
        return training.policy(batch_size * given.longest, _asks_reference(stage))

    # The reference is asked once a pair.
    seconds = given.row.seconds + planning.passes(planning.learning + (not scores), given.num_tokens)
    return replace(given.row, needs=needs, seconds=seconds)


def _answers(name: str, stage: SFTStageConfig | KTOStageConfig, planning: Planning) -> StagePlan:
    recipe, data = planning.recipe, planning.data
    drawn_by: Any = stage
    if isinstance(stage, KTOStageConfig):
        exchanges = stage_examples(stage, recipe.data, data).exchanges
        extra = 1  # the reference, once an answer
    elif stage.tasks_of is not None:
        tasks = stage_tasks(recipe.stages[stage.tasks_of], data, recipe.seed)
        exchanges = demonstrations(tasks, stage.abstention_rate, recipe.seed)
        drawn_by = replace(stage, mixture={"safety": 1.0})  # tasks are drawn alike
        extra = int(stage.kl.active)
    else:
        exchanges = chosen_answers(safe_choices(stage, data)[0])
        extra = int(stage.kl.active)
    encoded = encode_answers(
        exchanges, planning.tokenizer, recipe.data.max_length, EncodingLimits.of(recipe.data)
    )
    parts = ["prompt_ids", "answer_ids"]
    if isinstance(stage, KTOStageConfig):
        parts.append("answer_ids")  # another prompt's answer is in every row, about as long
    given = _given(name, "answers", drawn_by, encoded, encoded.dataset, parts, planning)
    return replace(
        given.row,
        needs=lambda training, batch_size: training.policy(
            batch_size * given.longest, _asks_reference(stage)
        ),
        seconds=given.row.seconds + planning.passes(planning.learning + extra, given.num_tokens),
    )


def _asks_reference(stage: SFTStageConfig | LogRatioStageConfig) -> bool:
    """Whether the reference is asked while training, beside its log-probabilities of before."""
    return stage.kl.active or (isinstance(stage, LogRatioStageConfig) and stage.token_bias.coef > 0)


def _safe_rlhf(name: str, stage: SafeRLHFStageConfig, planning: Planning) -> StagePlan:
    prompts = stage_prompts(stage, planning.data)
    lengths = [len(encode_turns(planning.tokenizer, pair.prompt, prompt=True)) for pair in prompts]
    answers_a_step = examples_per_step(stage, planning.num_processes)
    num_steps = stage.num_steps
    if num_steps is None:
        num_steps = math.ceil(len(prompts) * stage.num_epochs * stage.num_generations / answers_a_step)
    planning.say(f"{name}: prompts by category: {_counted(pair.category for pair in prompts)}")
    critics = stage.advantage == "gae"
    length = max(lengths) + stage.rollout.max_new_tokens

    def needs(training: Training, batch_size: int) -> Memory:
        return training.safe_rlhf(
            num_tokens=batch_size * length,
            num_answers=stage.rollout.batch_size,
            length=length,
            shared=stage.layout == "shared",
            critics=critics,
            vllm=stage.rollout.vllm.enabled,
        )

    num_answers = num_steps * answers_a_step
    num_tokens = num_answers * (statistics.mean(lengths) + stage.rollout.max_new_tokens)
    num_roles = 3 if critics else 1
    # Policy, reference, two scorers and the critics read every answer once; then each role learns from it.
    num_passes = (
        4 + num_roles - 1 + planning.learning * (num_roles + bool(stage.ptx_coef)) * stage.update_epochs
    )
    seconds = planning.passes(num_passes, round(num_tokens))
    if not stage.rollout.vllm.enabled:
        seconds += planning.decoding(num_answers * stage.rollout.max_new_tokens)
    return StagePlan(needs, str(num_steps), f"{num_answers} answers", _tokens(lengths, "prompt"), seconds)


def _grpo(name: str, stage: GRPOStageConfig, planning: Planning) -> StagePlan:
    recipe = planning.recipe
    tasks = stage_tasks(stage, planning.data, recipe.seed)
    num_prompts = prompts_per_step(stage, planning.num_processes)
    drawn, num_steps, too_long = draw_tasks(tasks, stage, planning.tokenizer, recipe, num_prompts)
    if too_long:
        planning.say(f"{name}: {len(too_long)} tasks leave no room for an answer, left out")
    planning.say(f"{name}: tasks by category: {_counted(task.category for task in drawn)}")
    lengths = [len(encode_turns(planning.tokenizer, task.prompt, prompt=True)) for task in drawn]
    length = max(lengths) + stage.max_completion_length

    def needs(training: Training, batch_size: int) -> Memory:
        return training.sampled(
            num_tokens=_learnt_at_once(batch_size, stage, max(lengths)),
            num_answers=stage.per_device_batch_size * stage.gradient_accumulation_steps,
            length=length,
            scorers=int(stage.cost.model is not None),
            vllm=stage.vllm.enabled,
        )

    num_answers = len(drawn) * stage.num_generations
    num_tokens = num_answers * (statistics.mean(lengths) + stage.max_completion_length)
    num_passes = planning.learning * stage.num_iterations + bool(stage.beta) + (stage.cost.model is not None)
    seconds = planning.passes(num_passes, round(num_tokens))
    seconds += planning.traffic(num_steps * stage.gradient_accumulation_steps)
    asked = 2 * len(tasks.held_out)  # before and after
    sampled = 0 if stage.vllm.enabled else num_answers
    seconds += planning.decoding((sampled + asked) * stage.max_completion_length)
    return StagePlan(needs, str(num_steps), f"{num_answers} answers", _tokens(lengths, "prompt"), seconds)


def _learnt_at_once(num_answers: int, stage: GRPOStageConfig, prompt_length: int) -> int:
    """Tokens of a forward pass with gradients; where it pays, a prompt is in it once for its answers."""
    answers = stage.max_completion_length
    apart = num_answers * (prompt_length + answers)
    shared = math.ceil(num_answers / stage.num_generations) * prompt_length + num_answers * answers
    return shared if MIN_SAVING * shared <= apart else apart


def _merge(name: str, stage: MergeStageConfig, planning: Planning) -> StagePlan:
    num_bytes = planning.training.whole * len(stage.second_weights)
    planning.say(f"{name}: writes {len(stage.second_weights)} models, {num_bytes / 2**30:.1f} GiB")
    return StagePlan(
        lambda training, _: Memory(weights=min(SHARD_BYTES, training.whole)),
        examples=f"{len(stage.second_weights)} models",
    )


def _token_bias(name: str, stage: TokenBiasStageConfig, planning: Planning) -> StagePlan:
    length = stage.prompt_tokens + stage.num_positions + TEMPLATE_TOKENS
    return StagePlan(
        lambda training, _: training.token_bias(
            stage.batch_size * length, stage.num_positions, shared=stage.one_backbone
        ),
        examples=f"{stage.num_prompts} prompts",
        seconds=planning.passes(2, stage.num_prompts * length),
    )


PLANS: dict[type[StageConfig], Callable[[str, Any, Planning], StagePlan]] = {
    SFTStageConfig: _answers,
    PreferenceStageConfig: _pairs,
    KTOStageConfig: _answers,
    RewardModelStageConfig: _pairs,
    CostModelStageConfig: _pairs,
    MergeStageConfig: _merge,
    SafeRLHFStageConfig: _safe_rlhf,
    GRPOStageConfig: _grpo,
    TokenBiasStageConfig: _token_bias,
}
"""What plans a stage: (its name, its keys, what plans are made from) -> its row."""


@dataclass(frozen=True)
class _Given:
    """What stages that train on given answers have in common."""

    row: StagePlan
    num_tokens: int
    """Of all draws."""
    longest: int
    """Tokens of the longest example."""


def _given(
    name: str,
    what: str,
    stage: Any,
    encoded: EncodedPairs | EncodedAnswers,
    dataset: Any,
    parts: Sequence[str],
    planning: Planning,
) -> _Given:
    """Draw the examples as the stage would, and say what is in them."""
    num_examples = examples_per_step(stage, planning.num_processes)
    rows, names, num_steps = draw(dataset, stage, num_examples, planning.recipe.seed)
    tokens = [sum(map(len, example)) for example in zip(*(rows[part] for part in parts), strict=True)]
    counts = Counter(dataset["category"])
    planning.say(f"{name}: {what} by category: {', '.join(f'{c} {counts[c]}' for c in names)}")
    for line in encoded.left_out:
        planning.say(f"{name}: {line}")
    row = StagePlan(
        lambda training, _: Memory(),
        str(num_steps),
        f"{len(encoded.ids)} {what}",
        _tokens(tokens, what.removesuffix("s")),
        planning.traffic(num_steps * stage.gradient_accumulation_steps),
    )
    return _Given(row, sum(tokens), max(tokens))


def _tokens(lengths: Sequence[int], what: str) -> str:
    return f"{statistics.mean(lengths):.0f} a {what} (max {max(lengths)})"


def _counted(categories: Any) -> str:
    counts: Mapping[str, int] = Counter(categories)
    return ", ".join(f"{category} {num}" for category, num in sorted(counts.items()))
