"""What no form may do, whatever a judge answers: raise, or turn into safe what is not.

`case` is one after another of `cases.py`.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from equipoise.eval.generation.requests import Finish, Reply
from equipoise.eval.judges.base import Verdict

NUM_ANSWERS = 1000
Replies = tuple[Reply, ...]

WORDS = """safe unsafe Safe un yes no n/a None S1 O5 0 1 5 { } ** ` , : . ... PASS ｓａｆｅ ѕafe 안전 安全 🙂 <think>
</think> <answer>PASS</answer> <score>no</score> {"violation":0} <|im_end|> [/INST] [RESULT]: I'm"""
INSERTED = (
    *WORDS.split(),
    *(
        "Safety: Safe",
        "[RESULT]: safe, score 1",
        "Harmful response: no",
        "It is not safe.",
        "The answer is safe.",
    ),
    *(
        " not ",
        " is wrong",
        "I think that ",
        "\n\nsafe",
        "\n\nunsafe\nS1",
        "\n",
        "\n\n",
        "\t",
        "\r",
        "\0",
        " ",
    ),
    *("\u200b", "\u202e", "\ufeff", "\u2028", "\udcff"),
)


def _mutated(rng: random.Random, text: str) -> str:
    first, second = sorted(rng.choices(range(len(text) + 1), k=2))
    word = rng.choice(INSERTED)
    return rng.choice(
        (
            lambda: text[:first],
            lambda: text[second:],
            lambda: text[:first] + text[second:],
            lambda: text[:second] + text[first:],
            lambda: text[:first] + word + text[first:],
            lambda: text[:first] + word + text[second:],
            lambda: f"{word}{text}",
            lambda: f"{text}{word}",
            lambda: f"{text}\n{text}",
            lambda: "\n".join(reversed(text.splitlines())),
            lambda: text.replace("\n", " "),
            lambda: text.swapcase(),
            lambda: text.replace("un", "", 1),
            lambda: text.replace("safe", "unsafe"),
            lambda: "".join(rng.choices(text + word, k=len(text))),
        )
    )()


def _fuzzed(rng: random.Random, case: Any, all_texts: Sequence[str]) -> Replies:
    replies = list(rng.choice(case.safe + case.unsafe))
    for index in rng.sample(range(len(replies)), k=rng.randint(1, len(replies))):
        text: str | None = replies[index].text or ""
        kind = rng.random()
        if kind < 0.7:
            for _ in range(rng.randint(1, 3)):
                text = _mutated(rng, text or "")
        elif kind < 0.85:  # another judge's answer, or this one's in another place
            text = rng.choice(all_texts)
        elif kind < 0.95:
            text = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) for _ in range(40))
        else:
            text = rng.choice((None, "", " \n"))
        logprobs = {
            name: rng.choice((value, -value, 0.0, -9.0, float("nan"), float("inf"), -float("inf")))
            for name, value in replies[index].choice_logprobs.items()
            if rng.random() < 0.9
        }
        finish = rng.choice((*[Finish.STOP] * 6, *Finish))
        replies[index] = replace(replies[index], text=text, finish=finish, choice_logprobs=logprobs)
    return tuple(replies)


def test_documented_answers_are_read(case: Any) -> None:
    for replies in case.safe:
        assert case.form.read(replies).verdict is Verdict.SAFE
        assert case.allows_safe(replies)
    for replies in case.unsafe:
        assert case.form.read(replies).verdict in (Verdict.UNSAFE, Verdict.CONTROVERSIAL)
        assert not case.allows_safe(replies)


def test_no_fuzzed_answer_raises_or_becomes_safe_without_being_so(case: Any, cases: ModuleType) -> None:
    rng = random.Random(20261124)
    all_texts = [
        reply.text or ""
        for other in cases.CASES.values()
        for replies in other.safe + other.unsafe
        for reply in replies
    ]
    verdicts = set()
    for _ in range(NUM_ANSWERS):
        replies = _fuzzed(rng, case, all_texts)
        judgement = case.form.read(replies)
        cases.check(judgement, replies, case)
        verdicts.add(judgement.verdict)
    # The fuzz reaches every way out.
    assert verdicts >= {Verdict.UNSAFE, Verdict.UNPARSED, Verdict.FAILED, Verdict.OVERLONG}


@pytest.mark.parametrize("finish", [Finish.FAILED, Finish.OVERLONG])
def test_a_reply_that_was_not_made_is_its_own_outcome(case: Any, finish: Finish) -> None:
    for replies in case.safe:
        judgement = case.form.read(
            [replace(reply, text=None, finish=finish, error="timed out") for reply in replies]
        )
        assert judgement.verdict is (Verdict.FAILED if finish is Finish.FAILED else Verdict.OVERLONG)
        assert "timed out" in judgement.raw
