import math
from pathlib import Path

import pytest

from equipoise.eval.generation.requests import Finish, Reply
from equipoise.eval.judges.base import JudgeError, Verdict
from equipoise.eval.judges.granite_guardian import CRITERIA, GraniteGuardian

PROMPT = [{"role": "user", "content": "What is nitre?"}]
NEW = ("3.3", "4.1")
OLD = ("3.0", "3.1", "3.2")


def said(*texts: str) -> list[Reply]:
    return [Reply(text, Finish.STOP) for text in texts]


@pytest.mark.parametrize("version", NEW)
@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("<think>\n</think>\n<score> no </score>", Verdict.SAFE),
        ("<think>\n</think>\n<score> yes </score>", Verdict.UNSAFE),
        ("<score>no</score>", Verdict.SAFE),
        ("<think>Does it? yes... no.</think>\n\n<score>yes</score>", Verdict.UNSAFE),
    ],
)
def test_documented_answers_with_scores(version: str, text: str, verdict: Verdict) -> None:
    judgement = GraniteGuardian(version).read(said(text))
    assert judgement.verdict is verdict
    assert judgement.native_categories == (("harm",) if verdict is Verdict.UNSAFE else ())
    assert judgement.p_unsafe is None
    assert text in judgement.raw


@pytest.mark.parametrize("version", OLD)
@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("No", Verdict.SAFE),
        ("Yes", Verdict.UNSAFE),
        ("No\n<confidence> High </confidence>", Verdict.SAFE),
        ("Yes\n<confidence>Low</confidence>", Verdict.UNSAFE),
    ],
)
def test_documented_answers_without_scores(version: str, text: str, verdict: Verdict) -> None:
    assert GraniteGuardian(version).read(said(text)).verdict is verdict


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "No",
        "<score>No</score>",
        "<score>no",
        "<score></score>",
        "<score>none</score>",
        "<score>no</score><score>yes</score>",
        "<score>no</score> because it is harmless",
        "It is <score>no</score>",
        "<think><score>no</score>",
        "<think>a</think>b</think><score>no</score>",
        "<think>a</think><think>b</think><score>no</score>",
    ],
)
def test_anything_else_is_unparsed(text: str) -> None:
    assert GraniteGuardian().read(said(text)).verdict is Verdict.UNPARSED


@pytest.mark.parametrize("text", ["no", "No.", "Nope", "Yes\nNo", "<score>no</score>", "No\n<confidence>"])
def test_older_versions_answer_in_one_word(text: str) -> None:
    assert GraniteGuardian("3.1").read(said(text)).verdict is Verdict.UNPARSED


def test_the_probability_is_that_of_yes_and_the_largest_counts() -> None:
    form = GraniteGuardian("3.1", criteria=("violence", "social_bias"))
    low = Reply("No", Finish.STOP, choice_logprobs={"Yes": math.log(0.1), "No": math.log(0.8)})
    high = Reply("Yes", Finish.STOP, choice_logprobs={"Yes": math.log(0.6), "No": math.log(0.2)})
    judgement = form.read([low, high])
    assert judgement.p_unsafe == pytest.approx(0.6 / 0.8)
    assert judgement.native_categories == ("social_bias",)
    assert form.read([low, low]).p_unsafe == pytest.approx(0.1 / 0.9)
    # One probability is missing: the largest of those that are known bounds it from below, and is no P(safe).
    assert form.read([low, Reply("No", Finish.STOP)]).p_unsafe is None


def test_safe_takes_every_criterion_and_unsafe_one() -> None:
    form = GraniteGuardian(criteria=("violence", "sexual_content"))
    yes, no, nonsense = "<score>yes</score>", "<score>no</score>", "maybe"
    assert form.read(said(no, no)).verdict is Verdict.SAFE
    assert form.read(said(no, nonsense)).verdict is Verdict.UNPARSED
    judgement = form.read(said(nonsense, yes))
    assert (judgement.verdict, judgement.native_categories) == (Verdict.UNSAFE, ("sexual_content",))
    failed = Reply(None, Finish.FAILED, error="timed out")
    assert form.read([failed, *said(no)]).verdict is Verdict.FAILED
    cut = Reply(no, Finish.LENGTH)
    assert form.read([cut, *said(no)]).verdict is Verdict.OVERLONG


def test_the_template_is_told_criterion_and_mode() -> None:
    for version, options in (
        ("3.2", {"guardian_config": {"risk_name": "harm"}}),
        ("3.3", {"guardian_config": {"criteria_id": "harm"}, "think": False}),
    ):
        (request,) = GraniteGuardian(version).ask(PROMPT, "A salt.")
        assert request.template_options == options
        assert request.messages == (*PROMPT, {"role": "assistant", "content": "A salt."})


@pytest.mark.parametrize("think", [False, True])
def test_version_4_1_gets_a_block_behind_the_exchange(think: bool) -> None:
    form = GraniteGuardian("4.1", criteria=("harm", "violence"), think=think)
    requests = form.ask(PROMPT, "A salt.")
    assert len(requests) == 2
    for request, criterion in zip(requests, form.criteria, strict=True):
        assert request.messages is not None
        *exchange, block = request.messages
        assert exchange == [*PROMPT, {"role": "assistant", "content": "A salt."}]
        assert block["role"] == "user"
        assert block["content"].startswith("<guardian><think>" if think else "<guardian><no-think>")
        assert f"### Criteria: {CRITERIA[criterion]}\n\n### Scoring Schema: " in block["content"]
    assert form.description.endswith("own wording")


def test_the_block_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "block.txt"
    path.write_text("<guardian>Is it {criterion}?", encoding="utf-8")
    form = GraniteGuardian("4.1", prompt_file=str(path))
    (request,) = form.ask(PROMPT, "A salt.")
    assert request.messages is not None
    assert request.messages[-1]["content"] == f"<guardian>Is it {CRITERIA['harm']}?"
    assert form.description.endswith(f"prompt: {path}; criteria: own wording")
    path.write_text("<guardian>", encoding="utf-8")
    with pytest.raises(JudgeError, match=r"\{criterion\}"):
        GraniteGuardian("4.1", prompt_file=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "5"}, "judge.version=5: Granite Guardian comes as 3.0, "),
        ({"criteria": ("harm", "evasiveness")}, "judge.criteria: found evasiveness; expected some of harm"),
        ({"criteria": ()}, "judge.criteria: found none"),
        ({"criteria": ("harm", "harm")}, "judge.criteria: found harm, harm; expected .* each once"),
        ({"version": "3.1", "think": True}, "3.1 cannot think"),
        ({"prompt_file": "x"}, "chat template of Granite Guardian 3.3 holds it"),
    ],
)
def test_options_that_cannot_be_used_say_why(options: dict, message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        GraniteGuardian(**options)
