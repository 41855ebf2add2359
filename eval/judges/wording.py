"""A judge's prompt where no tokenizer holds it: from the user's file, or a first version in our own words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.eval.judges.base import JudgeError

OWN_WORDING = "own wording"
"""What a card says of a prompt that is not the one its judge was trained on."""


@dataclass(frozen=True, slots=True)
class Wording:
    """A prompt with `{placeholders}`; any other brace stands for itself."""

    text: str
    origin: str
    """`own wording`, or the file it was read from: part of the judge's description."""

    def fill(self, **texts: str) -> str:
        """The prompt with each placeholder's text in its place; braces inside the texts are left alone."""
        names = "|".join(map(re.escape, texts))
        return re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], self.text)


def load_wording(prompt_file: str | None, own: str, placeholders: Sequence[str]) -> Wording:
    """The wording in `prompt_file` to the last character, its final line end included; None: `own`.

    A leading `<s>` is dropped: the engine adds the beginning of the text.

    Raises `JudgeError` where the file can't be read as UTF-8, or lacks a placeholder.
    """
    if prompt_file is None:
        return Wording(own, OWN_WORDING)
    path = Path(prompt_file).expanduser()
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").removeprefix("<s>")
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"judge.prompt_file={prompt_file}: cannot be read as UTF-8 text: {error}") from error
    missing = [f"{{{name}}}" for name in placeholders if f"{{{name}}}" not in text]
    if missing:
        expected = ", ".join(f"{{{name}}}" for name in placeholders)
        raise JudgeError(
            f"{path}: found no {' and no '.join(missing)}; expected a prompt with {expected}, each where the judge "
            "is to read that text."
        )
    return Wording(text, str(path))
