"""What a GRPO stage trains on and is asked: tasks of every subset in its mixture, with the instruction put behind."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL, PreferencePair, UnpairedExchange
from equipoise.data.sources import SafetyData
from equipoise.data.splits import normalise_prompt, split_by_prompt
from equipoise.data.tasks import Task, generate_arithmetic, load_jsonl_tasks, with_instruction
from equipoise.data.taxonomy import load_taxonomy
from equipoise.train.recipe.rl import GRPOStageConfig
from equipoise.train.rewards.verifiable import abstention_penalty
from equipoise.train.sampling import order_pairs

ARITHMETIC, FILE = "arithmetic", "file"
ABSTENTION = "I don't know"


@dataclass(frozen=True)
class StageTasks:
    """Tasks by subset; those held out have an answer, or are known to have none."""

    training: Mapping[str, Sequence[Task]]
    held_out: Sequence[Task]

    @property
    def categories(self) -> list[str]:
        """Of the training tasks, in order of their appearance."""
        return list(dict.fromkeys(task.category for tasks in self.training.values() for task in tasks))

    def draw(self, mixture: Mapping[str, float], num_draws: int | None, seed: int) -> list[Task]:
        """Tasks in training order, any stretch of which keeps the mixture's shares; None: one pass."""
        tasks = [task for subset in self.training.values() for task in subset]
        places = iter(range(len(tasks)))
        rows = {name: [next(places) for _ in subset] for name, subset in self.training.items()}
        return [tasks[row] for row in order_pairs(rows, mixture, num_draws, seed)]


def stage_tasks(stage: GRPOStageConfig, data: SafetyData, seed: int) -> StageTasks:
    """The stage's tasks; raises DataError where a subset is empty or a reward applies to none of them."""
    training: dict[str, Sequence[Task]] = {}
    held_out: list[Task] = []
    for subset in [name for name, share in stage.mixture.items() if share > 0]:
        tasks: list[Task]
        if subset == ARITHMETIC:
            a = stage.arithmetic
            split = generate_arithmetic(a.shares, a.num_training, a.num_held_out, a.seed)
            tasks, others = split.training, split.held_out
        elif subset == FILE:
            assert stage.path is not None
            tasks, others = split_by_prompt(load_jsonl_tasks(stage.path), stage.held_out_fraction, seed)
            others = [task for task in others if _checkable(task)]
        else:
            tasks, others = _prompts(data.helpful_pairs if subset == HELPFUL else data.safety_pairs), []
        if not tasks:
            raise DataError(
                f"mixture.{subset} has a share of {stage.mixture[subset]}, but no task is left to train on"
            )
        training[subset] = told(tasks, stage)
        held_out += told(others, stage)
    found = StageTasks(training, held_out)
    _check_rewards(stage, [task for tasks in training.values() for task in tasks])
    _check_thresholds(stage, found.categories)
    return found


def demonstrations(tasks: StageTasks, abstention_rate: float, seed: int) -> list[UnpairedExchange]:
    """Every training task that can be checked with its answer, or "I don't know" where it has none.

    The share `abstention_rate` of those with an answer gets "I don't know" too: a policy that never says it would not
    be sampled saying it, and could not learn when to.
    """
    rng = random.Random(f"{seed}/demonstrations")
    shown = []
    for task in (task for subset in tasks.training.values() for task in subset):
        if _checkable(task):
            abstain = task.answer is None or rng.random() < abstention_rate
            answer = ABSTENTION if abstain else str(task.answer)
            shown.append(UnpairedExchange(task.id, task.prompt, answer, True, task.category))
    return shown


def told(tasks: Sequence[Task], stage: GRPOStageConfig) -> list[Task]:
    """The tasks that can be checked with the stage's instruction behind them; the others as they are."""
    text = stage.instruction.replace("{threshold}", f"{stage.threshold:.0%}")
    text = text.replace("{penalty}", f"{abstention_penalty(stage.threshold):.3g}")
    return [with_instruction([task], text)[0] if _checkable(task) else task for task in tasks]


def judged_categories() -> tuple[str, ...]:
    """Categories whose answers a safety judge is asked about."""
    return (*load_taxonomy().ids, HELPFUL)


def _checkable(task: Task) -> bool:
    return task.answer is not None or task.unanswerable


def _prompts(pairs: Sequence[PreferencePair]) -> list[Task]:
    """The prompts of preference pairs, each once."""
    first: dict[str, Task] = {}
    for pair in pairs:
        first.setdefault(normalise_prompt(pair.prompt), Task(pair.id, pair.prompt, pair.category))
    return list(first.values())


def _check_rewards(stage: GRPOStageConfig, tasks: Sequence[Task]) -> None:
    """Every reward applies to a task, and every task has a reward: else a share of the run would teach nothing."""
    judged = set(judged_categories())
    applies = {
        "calibrated_abstention": _checkable,
        "numeric_answer": _checkable,
        "exact_answer": lambda task: task.answer is not None,
        "judge_verdict": lambda task: task.category in judged,
    }
    rewarded: set[str] = set()
    for name, weight in stage.rewards.items():
        ids = {task.id for task in tasks if applies.get(name, lambda task: True)(task)}
        if not ids:
            counts = Counter(task.category for task in tasks)
            raise DataError(
                f"rewards.{name} applies to none of {len(tasks)} tasks ({dict(counts)}): it needs "
                + ("a hazard's category or `helpful`" if name == "judge_verdict" else "an answer to check")
            )
        rewarded |= ids if weight else set()
    left = [task.id for task in tasks if task.id not in rewarded]
    if left and stage.cost.model is None:
        raise DataError(
            f"{len(left)} of {len(tasks)} tasks have no reward at all (first: {', '.join(left[:3])}); add one that "
            f"applies to them, or leave them out of the mixture. Rewards: {', '.join(stage.rewards)}"
        )


def _check_thresholds(stage: GRPOStageConfig, categories: Sequence[str]) -> None:
    for category in stage.cost.multiplier.thresholds:
        if category not in categories:
            raise DataError(
                f"cost.multiplier.thresholds.{category}: nothing that this stage trains on has this category; "
                f"occurring: {', '.join(categories)}"
            )
