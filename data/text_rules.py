"""What the wording of a text gives away: nothing said, control tokens, sentences without an end. Rules of thumb."""

import re

MIN_TRUNCATED = 200
"""Characters: shorter answers often end without a full stop and are whole."""

_CONTROL = re.compile(
    r"<\|[a-z_]{2,30}\|>|<\|(?:start_header|end_header|eot)_id\|>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>"
    r"|<(?:start|end)_of_turn>|<extra_id_\d>|^### (?:Human|Assistant|Instruction|Response):",
    re.MULTILINE,
)
_SPEAKER = re.compile(r"\n\n(?:Human|Assistant|User):")
_ENDED = re.compile(r"""[.!?…。！？:;)\]}"'”’»*`|>~_-]\s*$|[\U0001F300-\U0001FAFF☀-➿]\s*$""")
_LAST_LINE_OF_LIST = re.compile(r"(?:^|\n)\s*(?:[-*•#]|\d+[.)])[^\n]*$")
_LINK = re.compile(r"\bhttps?://\S+$")


def is_empty(text: str) -> bool:
    """Whether a text holds no letter, digit or other sign that means something (emoji do)."""
    return not any(char.isalnum() or ord(char) >= 0x2190 for char in text)


def broken_turn(text: str, *, answer: bool) -> str | None:
    """What of a chat template or of another turn stands in a text, or None."""
    if found := _CONTROL.search(text):
        return f"holds {found[0].strip()!r}"
    if answer and (speaker := _SPEAKER.search(text)):
        return f"another turn begins inside: {speaker[0].strip()!r}"
    if answer and text.count("```") % 2:
        return "a code block is never closed"
    return None


def is_truncated(answer: str) -> bool:
    """Whether a long answer stops in the middle of a sentence: no closing mark, list, link or code at its end."""
    text = answer.rstrip()
    if len(text) < MIN_TRUNCATED or _ENDED.search(text) or _LINK.search(text):
        return False
    return text[-1] == "," or not _LAST_LINE_OF_LIST.search(text)
