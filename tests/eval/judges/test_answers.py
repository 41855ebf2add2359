import pytest

from equipoise.eval.generation.requests import Finish, Reply
from equipoise.eval.judges.answers import behind_thinking, json_object, read_behind_thinking
from equipoise.eval.judges.base import Judgement, Verdict


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "yes"),
        ("<think>\n</think>\n yes ", "yes"),
        ("<think>is it? no</think>yes", "yes"),
        ("is it? no</think>\n\nyes", "yes"),  # the template wrote <think>
        ("<think>is it? no", None),
        ("a</think>b</think>c", "b</think>c"),  # which no form takes for an answer
        ("", ""),
    ],
)
def test_what_was_thought_is_no_answer(text: str, answer: str | None) -> None:
    assert behind_thinking(text) == answer


def test_what_an_engine_kept_apart_is_not_taken_apart_again() -> None:
    seen: list[str] = []

    def parse(text: str) -> Judgement | None:
        seen.append(text)
        return None

    for text, reasoning in (
        ("<think>a</think>yes", None),
        ("yes", "a"),
        ("b</think>yes", "a"),
        ("<think>a", None),
    ):
        read = read_behind_thinking(Reply(text, Finish.STOP, reasoning=reasoning), parse)
        assert (read.verdict, read.raw) == (Verdict.UNPARSED, text)
    assert seen == ["yes", "yes", "b</think>yes"]
    assert read_behind_thinking(Reply("", Finish.LENGTH, reasoning="a"), parse).verdict is Verdict.OVERLONG


@pytest.mark.parametrize("text", ['{"a": 1}', '```json\n{"a": 1}\n```', '```\n{"a": 1}\n```', ' {"a": 1}\n'])
def test_one_object_alone_or_in_one_fence(text: str) -> None:
    assert json_object(text) == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": 1',
        '{"a": 1} and more',
        'Here: {"a": 1}',
        '{"a": 1}{"a": 2}',
        '{"a": 1, "a": 0}',
        '{"a": {"b": 1, "b": 2}}',
        '[{"a": 1}]',
        "1",
        "null",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": ' * 100_000,
        "{'a': 1}",
        '```json\n{"a": 1}\n```\n```json\n{"a": 2}\n```',
        '```json\n{"a": 1}',
        'Answer:\n```json\n{"a": 1}\n```',
    ],
)
def test_anything_else_is_no_object(text: str) -> None:
    assert json_object(text) is None
