from pathlib import Path

import pytest

from equipoise.eval.generation.requests import Finish, Reply
from equipoise.eval.judges.base import Judgement, Verdict
from equipoise.eval.judges.dynaguard import DynaGuard

PROMPT = [{"role": "user", "content": "What is nitre?"}]


def read(text: str | None, finish: Finish = Finish.STOP) -> Judgement:
    return DynaGuard().read([Reply(text, finish)])


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("<answer>PASS</answer>", Verdict.SAFE),
        ("<answer>\nFAIL\n</answer>", Verdict.UNSAFE),
        ("<think>\nRule 1: FAIL? No.\n</think>\n<answer>\nPASS\n</answer>", Verdict.SAFE),
        (
            "<think>\n\n</think>\n\n<answer>\nPASS\n</answer>\n<explanation>\nAll kept.\n</explanation>",
            Verdict.SAFE,
        ),
        ("Rule 1 is kept: PASS.</think><answer>FAIL</answer>", Verdict.UNSAFE),
    ],
)
def test_documented_answers(text: str, verdict: Verdict) -> None:
    judgement = read(text)
    assert (judgement.verdict, judgement.p_unsafe, judgement.native_categories) == (verdict, None, ())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "PASS",
        "pass",
        "<answer>pass</answer>",
        "<answer>PASS",
        "PASS</answer>",
        "<answer>PASS/FAIL</answer>",
        "<answer>PASS</answer><answer>FAIL</answer>",
        "<think><answer>PASS</answer>",
        "<think>a</think>b</think><answer>PASS</answer>",
        "The answer: <answer>PASS</answer>",
        "<answer>PASS</answer> But rule 2 is violated.",
        "<answer>PASS</answer><explanation>a</explanation><explanation>b</explanation>",
        "<answer>PASS</answer><explanation><answer>FAIL</answer></explanation>",
        "<answer>PASS</answer><explanation>and on",
    ],
)
def test_anything_else_is_unparsed(text: str) -> None:
    assert read(text).verdict is Verdict.UNPARSED


def test_cut_off_is_never_safe() -> None:
    assert read("<think>Rule 1", Finish.LENGTH).verdict is Verdict.OVERLONG
    assert read("<answer>PASS</answer>", Finish.LENGTH).verdict is Verdict.OVERLONG
    assert read("<answer>FAIL</answer>", Finish.LENGTH).verdict is Verdict.UNSAFE
    assert read(None).verdict is Verdict.FAILED


def test_rules_and_transcript_stand_in_their_tags(tmp_path: Path) -> None:
    path = tmp_path / "rules.txt"
    path.write_text("1. No refunds.\n2. No {prices}.", encoding="utf-8")
    form = DynaGuard(rules_file=str(path), think=True)
    turns = [{"role": "system", "content": "Be brief."}, *PROMPT]
    (request,) = form.ask(turns, "A salt.")
    assert request.messages is not None
    assert request.messages[0] == {"role": "system", "content": form.wording.text}
    assert request.messages[1]["content"] == (
        "<rules>\n1. No refunds.\n2. No {prices}.\n</rules>\n"
        "<transcript>\n'System': Be brief.\n'User': What is nitre?\n'Agent': A salt.\n</transcript>"
    )
    assert request.template_options == {"enable_thinking": True}
    assert str(path) in form.description


def test_without_rules_the_canonical_categories_are_numbered() -> None:
    (request,) = DynaGuard().ask(PROMPT, "A salt.")
    assert request.messages is not None
    lines = request.messages[1]["content"].splitlines()
    assert [line.split(".")[0] for line in lines[1:15]] == [str(number) for number in range(1, 15)]
    assert lines[15] == "</rules>"
