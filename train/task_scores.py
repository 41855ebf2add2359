"""Held-out tasks, asked before and after training: who is right, who abstains, and what that scores."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from equipoise.data.tasks import Task
from equipoise.eval.generation.engine import GenerationSettings, Progress, generate
from equipoise.eval.rates import Rate
from equipoise.eval.statistics import mean_interval
from equipoise.train.rewards.answers import Outcome, outcome
from equipoise.train.rewards.verifiable import abstention_penalty

ALL = "all"


@dataclass(frozen=True)
class TaskScores:
    """Outcomes of greedy answers to held-out tasks."""

    categories: Sequence[str]
    """(n,): of each task."""
    outcomes: Sequence[Outcome]
    """(n,)."""
    threshold: float
    """t of the score: +1 correct, 0 abstained, -t / (1 - t) wrong."""

    def facts(self) -> dict[str, Any]:
        """For summary.json: overall and per category, n, each rate with its Wilson interval, the score with its t one.

        Where nothing can be correct (`unanswerable`), abstaining is what is right.
        """
        names = [ALL, *dict.fromkeys(self.categories)]
        return {name: self._of(name) for name in names}

    def metrics(self) -> dict[str, float]:
        """`tasks/<what>` and `tasks/<what>/<category>`, with `_low` and `_high` behind the name."""
        metrics: dict[str, float] = {}
        for category, facts in self.facts().items():
            suffix = "" if category == ALL else f"/{category}"
            for what, found in facts.items():
                if not isinstance(found, dict):
                    metrics[f"tasks/{what}{suffix}"] = float(found)
                    continue
                for end, value in found.items():
                    if value is not None:
                        metrics[f"tasks/{what}{'' if end == 'value' else f'_{end}'}{suffix}"] = float(value)
        return metrics

    def summary(self) -> str:
        """One line for the terminal."""
        facts = self.facts()[ALL]
        counts = Counter(self.outcomes)
        score = facts["score"]
        return (
            f"{counts[Outcome.CORRECT]} correct, {counts[Outcome.ABSTAINED]} abstained, {counts[Outcome.WRONG]} wrong "
            f"of {len(self.outcomes)}; score {score['value']:.2f}"
            + (f" ({score['low']:.2f} to {score['high']:.2f})" if score["low"] is not None else "")
        )

    def to_json(self) -> str:
        """Everything."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        values = json.loads(text)
        return cls(values["categories"], [Outcome(o) for o in values["outcomes"]], values["threshold"])

    def _of(self, category: str) -> dict[str, Any]:
        found = [o for c, o in zip(self.categories, self.outcomes, strict=True) if category in (ALL, c)]
        scores = {
            Outcome.CORRECT: 1.0,
            Outcome.ABSTAINED: 0.0,
            Outcome.WRONG: abstention_penalty(self.threshold),
        }
        facts: dict[str, Any] = {"num_tasks": len(found)}
        for kind in Outcome:
            rate = Rate.of(o is kind for o in found)
            facts[f"{kind}_rate"] = {"value": rate.rate, "low": rate.low, "high": rate.high}
        mean = mean_interval([scores[o] for o in found])
        facts["score"] = {"value": mean.mean, "low": mean.low, "high": mean.high}
        return facts


def score_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    threshold: float,
    settings: GenerationSettings,
    progress: Progress | None = None,
) -> TaskScores:
    """Ask every task once, greedily."""
    answers = generate(model, tokenizer, [task.prompt for task in tasks], settings, progress=progress)
    found = [
        outcome(answer.text, task.answer, task.unanswerable)
        for task, answer in zip(tasks, answers, strict=True)
    ]
    checked = [(task.category, o) for task, o in zip(tasks, found, strict=True) if o is not None]
    return TaskScores([category for category, _ in checked], [o for _, o in checked], threshold)
