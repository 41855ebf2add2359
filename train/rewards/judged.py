"""Rewards that a model gives: the recipe's judge, and a cost model."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from equipoise.data.schema import HELPFUL
from equipoise.data.templates import encode_turns
from equipoise.eval.judges.base import Judge, Judgement, Verdict
from equipoise.eval.scorer import Scorer, cut_behind_end, score_rows
from equipoise.train.rewards.verifiable import Reward, completion_text
from equipoise.train.sharding import unsharded

_SCORES = {Verdict.SAFE: 1.0, Verdict.CONTROVERSIAL: 0.0, Verdict.UNSAFE: -1.0}
"""A verdict that is missing here is no finding, and gives no reward."""


class JudgeVerdict:
    """Safe 1, controversial 0, unsafe -1; on `helpful` prompts answered 1, refused -1: refusing all does not pay.

    None where the judge could not say. An empty answer is no safe one: -1. Tasks that are neither a hazard's nor
    helpful are not judged.
    """

    __name__ = "judge_verdict"

    def __init__(self, judge: Judge, judged: Sequence[str]) -> None:
        """judged: the categories whose answers are judged; `helpful` and the hazards."""
        self.judge, self.judged = judge, frozenset(judged)

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], category: Sequence[str], **columns: Any
    ) -> list[Reward]:
        """One reward a completion."""
        texts = [completion_text(completion) for completion in completions]
        rewards: list[Reward] = [
            -1.0 if name in self.judged and not text.strip() else None
            for text, name in zip(texts, category, strict=True)
        ]
        asked = [
            i
            for i, (text, name) in enumerate(zip(texts, category, strict=True))
            if name in self.judged and text.strip()
        ]
        with unsharded():  # the judge is loaded when it is first asked, and every rank has answers of its own
            judgements = (
                self.judge.judge([prompts[i] for i in asked], [texts[i] for i in asked]) if asked else []
            )
        for i, judgement in zip(asked, judgements, strict=True):
            rewards[i] = _reward(judgement, category[i])
        return rewards


def _reward(judgement: Judgement, category: str) -> Reward:
    if category != HELPFUL:
        return _SCORES.get(judgement.verdict)
    return None if judgement.refused is None else (-1.0 if judgement.refused else 1.0)


class Cost:
    """The cost model's end score of prompt + completion, through the chat template; above 0 is unsafe."""

    __name__ = "cost"

    def __init__(
        self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, batch_size: int, ends: Sequence[int]
    ) -> None:
        """ends: the end-of-turn tokens behind which a template may write more."""
        self.scorer, self.tokenizer, self.batch_size, self.ends = scorer, tokenizer, batch_size, set(ends)

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Reward]:
        """One cost a completion, in nats of the cost model's log-odds."""
        rows = [
            cut_behind_end(
                encode_turns(
                    self.tokenizer,
                    [*prompt, {"role": "assistant", "content": completion_text(completion)}],
                    prompt=False,
                ),
                self.ends,
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return list(score_rows(self.scorer, rows, self.batch_size))
