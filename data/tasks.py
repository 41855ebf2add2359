"""Tasks whose answers can be checked: generated arithmetic, some of it without an answer, and a user's own file."""

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from equipoise.data.errors import DataError
from equipoise.data.jsonl import Line, read_records
from equipoise.data.schema import Turn

UNANSWERABLE = "unanswerable"
ARITHMETIC = re.compile(r"(addition|multiplication)_([1-6])|" + UNANSWERABLE)
"""Categories of arithmetic: the operation and the number of digits of its operands."""

DEFAULT_CATEGORY = "task"
"""Of a record without one."""

_FIELDS = frozenset({"id", "prompt", "answer", "unanswerable", "category"})
_NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
_THINGS = ("apples", "books", "coins", "eggs", "keys", "pens", "shells", "stamps")
_SYMBOLS = ("x", "y", "n", "k")


@dataclass(frozen=True, slots=True)
class Task:
    """A question and the answer that it is checked against."""

    id: str
    prompt: tuple[Turn, ...]
    category: str
    """Anything that results are to be told apart by: `addition_2`, `geography`, a hazard."""
    answer: str | None = None
    """None: nothing to check against, or nothing to know (`unanswerable`)."""
    unanswerable: bool = False
    """Nobody could answer; declining is what is right."""


@dataclass(frozen=True)
class TaskSplit:
    """Tasks to train on and others, with no question in common, that are asked before and after."""

    training: list[Task]
    held_out: list[Task]


def generate_arithmetic(
    shares: Mapping[str, float], num_training: int, num_held_out: int, seed: int
) -> TaskSplit:
    """Made-up problems in the proportions of `shares` (category -> share, see `ARITHMETIC`), the same for a seed.

    A problem and the one with its operands swapped are on the same side. Of a category with fewer problems than are
    asked for (one-digit addition has no more than 36), at most a third is held out, and all others are trained on as
    often as its share takes.
    Half of each category is put in symbols, half in words; unanswerable problems lack one quantity and read like
    those that can be answered. Raises DataError on an unknown category.
    """
    unknown = [category for category in shares if not ARITHMETIC.fullmatch(category)]
    if unknown:
        raise DataError(
            f"arithmetic has no category {unknown[0]!r}; possible: addition_1 ... addition_6, "
            f"multiplication_1 ... multiplication_6 (digits of the operands), {UNANSWERABLE}"
        )
    total = sum(shares.values())
    training: list[Task] = []
    held_out: list[Task] = []
    for category, share in shares.items():
        if share <= 0:
            continue
        rng = random.Random(f"{seed}/{category}")  # a category does not depend on the others
        wanted = [max(1, round(num * share / total)) for num in (num_training, num_held_out)]
        problems = _problems(category, sum(wanted), rng)
        num_out = min(wanted[1], len(problems) // 3) if num_held_out else 0
        held_out += problems[:num_out]
        training += itertools.islice(itertools.cycle(problems[num_out : num_out + wanted[0]]), wanted[0])
    return TaskSplit(training, held_out)


def _problems(category: str, num: int, rng: random.Random) -> list[Task]:
    """At most `num` problems, no two of them with the same unordered operands."""
    if category == UNANSWERABLE:
        texts: dict[str, None] = {}
        for number in range(20 * num):  # some come up twice
            texts[_without_answer(number, rng)] = None
            if len(texts) == num:
                break
        return [_task(category, text, text, None) for text in texts]
    operation, level = category.split("_")
    num_digits = int(level)
    low, high = max(2, 10 ** (num_digits - 1)), 10**num_digits - 1
    size = high - low + 1
    num_pairs = size * (size + 1) // 2
    if num >= num_pairs // 2:
        pairs = [(a, b) for a in range(low, high + 1) for b in range(a, high + 1)]
        rng.shuffle(pairs)
        pairs = pairs[:num]
    else:
        drawn: dict[tuple[int, int], None] = {}
        while len(drawn) < num:
            a, b = rng.randint(low, high), rng.randint(low, high)
            drawn[(min(a, b), max(a, b))] = None
        pairs = list(drawn)
    tasks = []
    for i, pair in enumerate(pairs):
        a, b = rng.sample(pair, 2)
        answer = a + b if operation == "addition" else a * b
        tasks.append(_task(category, f"{a}-{b}", _with_answer(operation, a, b, i, rng), str(answer)))
    return tasks


def _with_answer(operation: str, a: int, b: int, number: int, rng: random.Random) -> str:
    if number % 2 == 0:
        return f"What is {a} {'+' if operation == 'addition' else '*'} {b}?"
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    if operation == "addition":
        return f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have?"
    return f"{name} has {a} boxes with {b} {things} each. How many {things} does {name} have?"


def _without_answer(number: int, rng: random.Random) -> str:
    a, operation = rng.randint(2, 99), rng.choice("+*")
    if number % 2 == 0:
        return f"What is {a} {operation} {rng.choice(_SYMBOLS)}?"
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    if operation == "+":
        return f"{name} has some {things} and gets {a} more. How many {things} does {name} have?"
    return f"{name} has {a} boxes with {things} in them. How many {things} does {name} have?"


def _task(category: str, key: str, text: str, answer: str | None) -> Task:
    turn = {"role": "user", "content": text}
    return Task(f"{category}:{key}", (turn,), category, answer, unanswerable=answer is None)


def load_jsonl_tasks(path: str | Path) -> list[Task]:
    """A user's tasks, one JSON object a line: `prompt`, and `answer` or `"unanswerable": true`; `category`, `id`.

    The schema is in `data/README.md`. Raises `DataError` with every problem of the file.
    """
    path = Path(path).expanduser()

    def parse(line: Line) -> Task:
        for name in line.values.keys() - _FIELDS:
            line.problem(name, f"unknown key; possible: {', '.join(sorted(_FIELDS))}")
        unanswerable = line.flag("unanswerable") or False
        answer = _answer(line)
        if unanswerable and answer is not None:
            line.problem("answer", "is given, but the task is marked as unanswerable")
        return Task(
            id=line.optional_text("id", f"{path.stem}:{line.number}"),
            prompt=line.prompt(),
            category=line.optional_text("category", UNANSWERABLE if unanswerable else DEFAULT_CATEGORY),
            answer=answer,
            unanswerable=unanswerable,
        )

    return read_records(path, parse)


def _answer(line: Line) -> str | None:
    """`answer` as a text; a number is written out, so that `12` and `"12"` are the same."""
    value = line.values.get("answer")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            line.problem("answer", f"found {value}, expected a finite number or a text")
        return str(value)
    return line.optional_text("answer") or None


def with_instruction(tasks: Sequence[Task], instruction: str) -> list[Task]:
    """The tasks with `instruction` on a line of its own behind the question; an empty one changes nothing."""
    if not instruction:
        return list(tasks)
    told = []
    for task in tasks:
        *before, last = task.prompt
        turn = {**last, "content": f"{last['content']}\n{instruction}"}
        told.append(replace(task, prompt=(*before, turn)))
    return told
