"""Rewards that need nothing but the completion and its task.

Each takes what TRL's GRPOTrainer hands over, as keywords: `completions`, `completion_ids`, and the columns of the
tasks; each returns one number a completion, None where it does not apply to the task. Settings come first and are
bound with `functools.partial`.
"""

import re
from collections.abc import Sequence
from typing import Any

from equipoise.train.rewards.answers import Outcome, claimed_answer, outcome, plain

Reward = float | None


def completion_text(completion: Any) -> str:
    """The text of a completion: TRL gives a list with one assistant turn for prompts that are conversations."""
    return str(completion if isinstance(completion, str) else completion[0].get("content") or "")


def outcomes(
    completions: Sequence[Any], answer: Sequence[str | None], unanswerable: Sequence[bool]
) -> list[Outcome | None]:
    """What became of each task; None where there is nothing to check."""
    return [
        outcome(completion_text(completion), expected, no_answer)
        for completion, expected, no_answer in zip(completions, answer, unanswerable, strict=True)
    ]


def numeric_answer(
    *, completions: Sequence[Any], answer: Sequence[str | None], unanswerable: Sequence[bool], **columns: Any
) -> list[Reward]:
    """1 for the right answer, as a number where the reference is one; 1 for abstaining where there is none; else 0."""
    return [
        None if found is None else float(found is (Outcome.ABSTAINED if no_answer else Outcome.CORRECT))
        for found, no_answer in zip(outcomes(completions, answer, unanswerable), unanswerable, strict=True)
    ]


def exact_answer(*, completions: Sequence[Any], answer: Sequence[str | None], **columns: Any) -> list[Reward]:
    """1 where the answer reads as the reference does, but for case, spacing and quotes; else 0. `12.0` is not `12`."""
    rewards: list[Reward] = []
    for completion, expected in zip(completions, answer, strict=True):
        text = completion_text(completion)
        marked = claimed_answer(text)
        given = plain(text if marked is None else marked)
        rewards.append(None if expected is None else float(given == plain(expected)))
    return rewards


def calibrated_abstention(
    threshold: float,
    *,
    completions: Sequence[Any],
    answer: Sequence[str | None],
    unanswerable: Sequence[bool],
    **columns: Any,
) -> list[Reward]:
    """+1 correct, 0 abstained, -t / (1 - t) wrong, for the confidence threshold t in [0, 1).

    Who is right with probability p gains p - (1 - p) t / (1 - t) by answering, which is above 0 exactly when p > t:
    abstaining pays below the threshold, answering above it. Source: Kalai et al. 2509.04664, explicit confidence
    targets.
    """
    scores = {
        Outcome.CORRECT: 1.0,
        Outcome.ABSTAINED: 0.0,
        Outcome.WRONG: abstention_penalty(threshold),
        None: None,
    }
    return [scores[found] for found in outcomes(completions, answer, unanswerable)]


def abstention_penalty(threshold: float) -> float:
    """-t / (1 - t), the score of a wrong answer; 0 at t = 0, where guessing is free."""
    return -threshold / (1 - threshold) if threshold else 0.0


def answer_format(pattern: str, *, completions: Sequence[Any], **columns: Any) -> list[Reward]:
    """1 where the whole completion, stripped, matches the regular expression (`.` matches line ends too); else 0."""
    expression = re.compile(pattern, re.DOTALL)
    return [
        float(expression.fullmatch(completion_text(completion).strip()) is not None)
        for completion in completions
    ]


def response_length(
    limit: int, maximum: int, *, completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[Reward]:
    """0 up to `limit` tokens, then falling evenly to -1 at `maximum`; the end token counts.

    Source: DAPO 2503.14476, equation 13 (soft overlong punishment), with L_max = maximum and L_cache = maximum - limit.
    """
    return [-min(max(len(ids) - limit, 0) / (maximum - limit), 1.0) for ids in completion_ids]
