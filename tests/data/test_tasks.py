import json
from collections import Counter
from pathlib import Path

import pytest

from equipoise.data.errors import DataError
from equipoise.data.tasks import Task, generate_arithmetic, load_jsonl_tasks, with_instruction

SHARES = {"addition_1": 2.0, "multiplication_2": 1.0, "unanswerable": 1.0}


def text_of(task: Task) -> str:
    return task.prompt[-1]["content"]


def test_problems_have_the_asked_for_shares_and_right_answers() -> None:
    split = generate_arithmetic({"addition_2": 1, "multiplication_3": 3, "unanswerable": 0}, 80, 8, seed=0)
    categories = [task.category for task in split.training]
    assert (categories.count("addition_2"), categories.count("multiplication_3")) == (20, 60)
    for task in split.training + split.held_out:
        a, b = (int(n) for n in task.id.split(":")[1].split("-"))
        assert min(a, b) >= 10
        assert task.answer == str(a + b if task.category == "addition_2" else a * b)
        assert str(a) in text_of(task)
        assert str(b) in text_of(task)


def test_no_problem_is_on_both_sides_with_its_operands_in_any_order() -> None:
    split = generate_arithmetic(SHARES, 400, 100, seed=3)
    unordered = [
        {(t.category, *sorted(t.id.split(":")[1].split("-"))) for t in side}
        for side in (split.training, split.held_out)
    ]
    assert not unordered[0] & unordered[1]
    assert len(unordered[0]) == len({t.id for t in split.training})
    texts = [{text_of(t) for t in side} for side in (split.training, split.held_out)]
    assert not texts[0] & texts[1]
    # 36 unordered pairs of one-digit numbers from 2 on: a third is held out, all others fill the share.
    assert sum(t.category == "addition_1" for t in split.held_out) == 12
    repeats = Counter(t.id for t in split.training if t.category == "addition_1")
    assert len(repeats) == 24
    assert repeats.total() == 200
    assert set(repeats.values()) == {8, 9}


def test_a_seed_is_a_set_of_problems_whatever_else_is_asked_for() -> None:
    assert generate_arithmetic(SHARES, 50, 10, 0) == generate_arithmetic(SHARES, 50, 10, 0)
    assert generate_arithmetic(SHARES, 50, 10, 0) != generate_arithmetic(SHARES, 50, 10, 1)
    alone = generate_arithmetic({"unanswerable": 1}, 20, 5, 0)
    beside = generate_arithmetic({"unanswerable": 1, "addition_1": 1}, 40, 10, 0)
    assert alone.held_out == [t for t in beside.held_out if t.category == "unanswerable"]


def test_unanswerable_problems_lack_a_quantity_and_have_no_answer() -> None:
    split = generate_arithmetic({"unanswerable": 1}, 60, 0, seed=0)
    assert not split.held_out
    assert len({text_of(t) for t in split.training}) == 60
    assert all(t.unanswerable and t.answer is None for t in split.training)
    assert all(sum(c.isdigit() for c in text_of(t)) in (1, 2) for t in split.training)  # one number of two


def test_an_unknown_category_is_refused() -> None:
    with pytest.raises(DataError, match="no category 'division_1'; possible: addition_1"):
        generate_arithmetic({"division_1": 1}, 1, 1, 0)


def test_an_instruction_stands_behind_the_question() -> None:
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
    task = Task("1", turns, "task", "7")
    assert with_instruction([task], "briefly")[0].prompt == (
        turns[0],
        {"role": "user", "content": "q\nbriefly"},
    )
    assert with_instruction([task], "") == [task]


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_users_tasks_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mine.jsonl",
        {"prompt": "6 * 7?", "answer": 42, "category": "easy", "id": "a"},
        {"prompt": [{"role": "user", "content": "Capital of France?"}], "answer": "Paris"},
        {"prompt": "What am I thinking of?", "unanswerable": True},
        {"prompt": "Write a poem."},
    )
    a, b, c, d = load_jsonl_tasks(file)
    assert a == Task("a", ({"role": "user", "content": "6 * 7?"},), "easy", "42")
    assert (b.id, b.category, b.answer) == ("mine:2", "task", "Paris")
    assert (c.category, c.answer, c.unanswerable) == ("unanswerable", None, True)
    assert (d.answer, d.unanswerable) == (None, False)


def test_everything_wrong_with_a_file_is_said_with_its_line(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mine.jsonl",
        {"prompt": "", "answer": "1"},
        {"prompt": "q", "answer": ["1"]},
        {"prompt": "q", "answer": "1", "unanswerable": True},
        {"prompt": "q", "anwser": "1"},
        {"prompt": "q", "answer": float("nan")},
    )
    with pytest.raises(DataError) as caught:
        load_jsonl_tasks(file)
    said = str(caught.value)
    for part in (
        "mine.jsonl:1: prompt: is empty",
        "mine.jsonl:2: answer: found a list, expected a text",
        "mine.jsonl:3: answer: is given, but the task is marked as unanswerable",
        "mine.jsonl:4: anwser: unknown key",
        "mine.jsonl:5: answer: found nan",
    ):
        assert part in said
