import pytest

from equipoise.eval.generation.reasoning import split_reasoning


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("safe", "", ("safe", None)),
        ("<think>hm</think>\n\nsafe", "", ("safe", "hm")),
        ("\n<think>\n</think>\nsafe", "", ("safe", "")),
        ("hm</think>safe", "<|assistant|><think>\n", ("safe", "hm")),
        ("hm, cut off", "<|assistant|><think>\n", ("", "hm, cut off")),
        ("<think>cut off", "", ("", "cut off")),
        ("say <think> aloud", "", ("say <think> aloud", None)),
        ("a</think>b", "", ("a</think>b", None)),
    ],
)
def test_thinking_and_answer(text: str, prompt: str, expected: tuple[str, str | None]) -> None:
    assert split_reasoning(text, prompt) == expected
