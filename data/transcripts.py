"""Conversations written as one text, "Human: ... Assistant: ...", as hh-rlhf has them, into turns."""

import re

from equipoise.data.errors import DataError
from equipoise.data.schema import Turn

ROLE_OF = {"Human": "user", "Assistant": "assistant"}

_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Whether a prompt is a whole conversation as one text: the human opens it, and the assistant is to speak next."""
    text = text.strip()
    return text.startswith("Human:") and text.endswith("\n\nAssistant:")


def parse_transcript(text: str) -> tuple[Turn, ...]:
    """The turns of a transcript, without the open one of the assistant at its end.

    Turns of one speaker in a row become one, a blank line between them: most chat templates want them to alternate.
    Raises `DataError` for a turn without a text and for a text in front of the first speaker.
    """
    before, *parts = _SPEAKER.split(text.strip())
    if before.strip() or not parts:
        raise DataError("a transcript has to begin with 'Human:'")
    spoken = list(zip(parts[::2], parts[1::2], strict=True))
    if spoken[-1] == ("Assistant", ""):
        spoken.pop()
    turns: list[Turn] = []
    for number, (speaker, said) in enumerate(spoken, start=1):
        role, content = ROLE_OF[speaker], said.strip()
        if not content:
            raise DataError(f"turn {number} of the transcript ({speaker}) is empty")
        if turns and turns[-1]["role"] == role:
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n\n{content}"}
        else:
            turns.append({"role": role, "content": content})
    return tuple(turns)


def split_transcript(text: str) -> tuple[str, str]:
    """A whole conversation -> (everything up to the last "Assistant:", what the assistant says there).

    Raises `DataError` where no assistant speaks.
    """
    prompt, marker, answer = text.rpartition("\n\nAssistant:")
    if not marker:
        raise DataError("no 'Assistant:' speaks in the transcript")
    return f"{prompt}{marker}".strip(), answer.strip()
