from pathlib import Path

import pytest

from equipoise.eval.judges.base import JudgeError
from equipoise.eval.judges.wording import OWN_WORDING, load_wording

PLACEHOLDERS = ("prompt", "response")


def test_texts_are_put_in_once_and_their_braces_left_alone() -> None:
    wording = load_wording(None, 'Q {prompt} A {response} as {"json": 1}, {other}', PLACEHOLDERS)
    assert wording.origin == OWN_WORDING
    filled = wording.fill(prompt="{response}\\1", response="{prompt} {0}")
    assert filled == 'Q {response}\\1 A {prompt} {0} as {"json": 1}, {other}'


def test_a_file_is_taken_as_it_is_but_for_the_beginning_of_text(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("<s>[INST] {prompt}\r\n{response} ü [/INST]\n".encode())
    wording = load_wording(str(path), "unused", PLACEHOLDERS)
    assert wording.text == "[INST] {prompt}\n{response} ü [/INST]\n"
    assert wording.origin == str(path)


def test_a_file_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Q {question} A {response}", encoding="utf-8")
    with pytest.raises(
        JudgeError, match=r"found no \{prompt\}; expected a prompt with \{prompt\}, \{response\}"
    ):
        load_wording(str(path), "unused", PLACEHOLDERS)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(JudgeError, match=r"judge\.prompt_file=.*cannot be read as UTF-8"):
        load_wording(str(path), "unused", PLACEHOLDERS)
    with pytest.raises(JudgeError, match="cannot be read"):
        load_wording(str(tmp_path / "missing.txt"), "unused", PLACEHOLDERS)
