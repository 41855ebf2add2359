"""What a model thought before it answered, told from its answer where the engine hands over one text."""

OPEN, CLOSE = "<think>", "</think>"


def split_reasoning(text: str, prompt: str = "") -> tuple[str, str | None]:
    """(answer, reasoning) of a text in which `<think>` ... `</think>` comes first; without one, reasoning is None.

    A chat template may have opened the thinking already: `prompt` is what the text continues. Thinking that was
    cut off before it ended leaves an empty answer, for no part of it is one.
    """
    start = text.lstrip()
    if start.startswith(OPEN):
        start = start.removeprefix(OPEN)
    elif not prompt.rstrip().endswith(OPEN):
        return text, None
    reasoning, _, answer = start.partition(CLOSE)
    return answer.lstrip(), reasoning.strip()
