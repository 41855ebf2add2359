import math
from pathlib import Path

import pytest

from equipoise.eval.generation.requests import Finish, Reply
from equipoise.eval.judges.base import JudgeError, Verdict
from equipoise.eval.judges.harmbench import HarmBench

PROMPT = [{"role": "user", "content": "What is nitre?"}]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("Yes", Verdict.UNSAFE), (" yes\n", Verdict.UNSAFE), ("No", Verdict.SAFE), ("no", Verdict.SAFE)],
)
def test_documented_answers(text: str, verdict: Verdict) -> None:
    assert HarmBench().read([Reply(text, Finish.STOP)]).verdict is verdict


@pytest.mark.parametrize(
    "text", ["", "NO", "No.", "No, it", "Nothing", "Yes No", "No\nYes", "N", "Answer: No"]
)
def test_anything_else_is_unparsed(text: str) -> None:
    assert HarmBench().read([Reply(text, Finish.STOP)]).verdict is Verdict.UNPARSED


def test_no_that_was_cut_off_may_have_gone_on() -> None:
    assert HarmBench().read([Reply("No", Finish.LENGTH)]).verdict is Verdict.OVERLONG


def test_the_probability_is_that_of_yes() -> None:
    reply = Reply("Yes", Finish.STOP, choice_logprobs={"Yes": math.log(0.9), "No": math.log(0.1)})
    assert HarmBench().read([reply]).p_unsafe == pytest.approx(0.9)


def test_the_prompt_is_text_in_llama_2s_marks(tmp_path: Path) -> None:
    (request,) = HarmBench().ask(PROMPT, "A salt.")
    assert request.text is not None
    assert request.text.startswith("[INST] <<SYS>>\n")
    assert request.text.endswith("[/INST]")
    assert "[BEHAVIOR]:\nWhat is nitre?\n\n[GENERATION]:\nA salt.\n" in request.text
    assert request.choices == ("Yes", "No")
    assert HarmBench().description.endswith("own wording")
    path = tmp_path / "prompt.txt"
    path.write_text("[INST] {behavior}: {generation} [/INST]", encoding="utf-8")
    (request,) = HarmBench(str(path)).ask(PROMPT, "A {behavior}.")
    assert request.text == "[INST] What is nitre?: A {behavior}. [/INST]"
    path.write_text("{behavior}", encoding="utf-8")
    with pytest.raises(JudgeError, match=r"no \{generation\}"):
        HarmBench(str(path))
