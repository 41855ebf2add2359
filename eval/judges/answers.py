"""What general models wrap an answer in: thinking, code fences, JSON; what is not plainly one answer is None."""

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from equipoise.eval.generation.requests import Reply
from equipoise.eval.judges.base import Judgement
from equipoise.eval.judges.reading import read_answer

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(?P<inside>[^`]*)\n[ \t]*```")


def read_behind_thinking(reply: Reply, parse: Callable[[str], Judgement | None]) -> Judgement:
    """`read_answer` of what stands behind the thinking, whoever tells the two apart: the engine, or we here."""

    def parse_answer(text: str) -> Judgement | None:
        answer = behind_thinking(text) if reply.reasoning is None else text
        return None if answer is None else parse(answer)

    return read_answer(reply, parse_answer)


def behind_thinking(text: str) -> str | None:
    """The answer behind `<think>...</think>`, or the whole text where nothing was thought; None: never closed.

    A template may have written `<think>` itself, so that the text begins inside. The first `</think>` ends the
    thinking; a second one is left in the answer, where no documented form has it.
    """
    _, closed, answer = text.partition("</think>")
    if closed:
        return answer.strip()
    return None if "<think>" in text else text.strip()


def json_object(text: str) -> dict[str, Any] | None:
    """The one JSON object that the text is, alone or in one code fence.

    None for anything around it, another type, a key given twice, NaN, infinity, and what can't be read for its size.
    """
    fence = _FENCE.fullmatch(text)
    try:
        value = json.loads(
            fence["inside"] if fence else text, object_pairs_hook=_no_key_twice, parse_constant=_not_json
        )
    except (ValueError, RecursionError):  # int() refuses thousands of digits with a ValueError
        return None
    return value if isinstance(value, dict) else None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key given twice")
    return found


def _not_json(constant: str) -> NoReturn:
    raise ValueError(constant)
