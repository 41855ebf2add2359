import math

import pytest

from equipoise.eval.generation.requests import Finish, Reply
from equipoise.eval.judges.base import Judgement, Verdict
from equipoise.eval.judges.reading import (
    alternating,
    as_question,
    read_answer,
    two_way_probability,
    unread,
    verdict_probability,
)


def log(**probabilities: float) -> dict[str, float]:
    return {name: math.log(p) if p else -math.inf for name, p in probabilities.items()}


def test_the_probability_is_that_among_the_choices() -> None:
    assert two_way_probability(log(unsafe=0.6, safe=0.2), ["unsafe"], ["safe"]) == pytest.approx(0.75)
    several = log(un=0.3, unsafe=0.1, safe=0.4, Safe=0.0)
    assert two_way_probability(several, ["un", "unsafe"], ["safe", "Safe"]) == pytest.approx(0.5)
    assert two_way_probability(log(unsafe=1.0, safe=0.0), ["unsafe"], ["safe"]) == 1.0
    assert two_way_probability({"unsafe": -1000.0, "safe": -1001.0}, ["unsafe"], ["safe"]) == pytest.approx(
        1 / (1 + math.exp(-1))
    )


@pytest.mark.parametrize(
    "logprobs",
    [
        {},
        {"safe": -1.0},
        {"safe": -1.0, "unsafe": math.nan},
        {"safe": -math.inf, "unsafe": -math.inf},
        {"safe": math.inf, "unsafe": 0.0},
    ],
)
def test_no_probability_where_a_side_is_missing_or_no_number(logprobs: dict[str, float]) -> None:
    assert two_way_probability(logprobs, ["unsafe"], ["safe"]) is None


def test_no_probability_where_the_judge_was_about_to_say_something_else() -> None:
    logprobs = log(unsafe=0.3, safe=0.1)
    assert two_way_probability(logprobs, ["unsafe"], ["safe"], least_mass=0.39) == pytest.approx(0.75)
    assert two_way_probability(logprobs, ["unsafe"], ["safe"], least_mass=0.41) is None


def test_a_probability_that_contradicts_the_verdict_is_dropped() -> None:
    reply = Reply("unsafe", Finish.STOP, choice_logprobs=log(unsafe=0.9, safe=0.05))
    assert verdict_probability(reply, Verdict.UNSAFE) == pytest.approx(0.9 / 0.95)
    assert verdict_probability(reply, Verdict.SAFE) is None


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (Reply(None, Finish.FAILED, error="503"), Verdict.FAILED),
        (Reply("safe", Finish.FAILED, error="503"), Verdict.FAILED),
        (Reply(None, Finish.OVERLONG, error="9,000 tokens"), Verdict.OVERLONG),
        (Reply("safe", Finish.OVERLONG), Verdict.OVERLONG),
        (Reply(None, Finish.STOP), Verdict.FAILED),
        (Reply(None, Finish.LENGTH), Verdict.OVERLONG),
    ],
)
def test_a_reply_without_text_is_its_outcome(reply: Reply, verdict: Verdict) -> None:
    judgement = unread(reply)
    assert judgement is not None
    assert judgement.verdict is verdict
    assert judgement.raw
    assert reply.error in judgement.raw


def test_a_reply_with_text_is_left_to_the_form() -> None:
    assert unread(Reply("", Finish.STOP)) is None
    assert unread(Reply("safe", Finish.LENGTH)) is None


def parse(text: str) -> Judgement | None:
    return Judgement(Verdict(text), 0.5, None) if text in set(Verdict) else None


@pytest.mark.parametrize(
    ("text", "finish", "verdict"),
    [
        (" safe\n", Finish.STOP, Verdict.SAFE),
        ("safe", Finish.LENGTH, Verdict.OVERLONG),  # it may have gone on: "safe only if ..."
        ("unsafe", Finish.LENGTH, Verdict.UNSAFE),
        ("controversial", Finish.LENGTH, Verdict.CONTROVERSIAL),
        ("it is", Finish.LENGTH, Verdict.OVERLONG),
        ("it is", Finish.STOP, Verdict.UNPARSED),
        ("", Finish.STOP, Verdict.UNPARSED),
    ],
)
def test_what_was_cut_off_is_never_safe(text: str, finish: Finish, verdict: Verdict) -> None:
    judgement = read_answer(Reply(text, finish), parse)
    assert judgement.verdict is verdict
    assert judgement.raw == text
    assert (judgement.p_unsafe is None) == (verdict in (Verdict.OVERLONG, Verdict.UNPARSED))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_turns_alternate_and_the_system_turn_opens_the_users() -> None:
    prompt = [
        turn("system", "Be brief."),
        turn("user", "Hi"),
        turn("user", "there"),
        turn("assistant", "Yes?"),
    ]
    prompt.append(turn("user", "How?"))
    assert alternating(prompt, "So.") == [
        turn("user", "Be brief.\n\nHi\n\nthere"),
        turn("assistant", "Yes?"),
        turn("user", "How?"),
        turn("assistant", "So."),
    ]
    assert alternating([turn("assistant", "Hello!")], "And?") == [
        turn("user", ""),
        turn("assistant", "Hello!\n\nAnd?"),
    ]
    assert prompt[1] == turn("user", "Hi")


def test_a_conversation_becomes_one_question() -> None:
    assert as_question([turn("user", "User: hi")]) == "User: hi"
    prompt = [
        turn("system", "Be brief."),
        turn("user", "Hi"),
        turn("assistant", "Yes?"),
        turn("user", "How?"),
    ]
    assert as_question(prompt, assistant="Agent") == "System: Be brief.\nUser: Hi\nAgent: Yes?\nUser: How?"
