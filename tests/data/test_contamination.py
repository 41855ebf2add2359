import json
from pathlib import Path

import pytest

from equipoise.data.config import DataConfig
from equipoise.data.contamination import SuiteIndex
from equipoise.data.schema import Turn
from equipoise.data.sources import load_data, load_samples


def turns(text: str) -> tuple[Turn, ...]:
    return ({"role": "user", "content": text},)


def test_overlap_by_hand() -> None:
    index = SuiteIndex([turns("One two three four five six seven."), turns("another thing altogether")])
    assert index.overlap(turns("so: one TWO three four five six seven, right?")) == 1.0
    assert index.overlap(turns("one two three four five eight")) == pytest.approx(1 / 3)  # of three 5-grams
    assert index.overlap(turns("one two three four eight six seven")) == 0.0
    assert index.overlap(turns("another thing altogether")) == 0.0  # too short to have an n-gram


def test_an_earlier_turn_counts() -> None:
    index = SuiteIndex([turns("one two three four five six")])
    later = (
        *turns("one two three four five six"),
        {"role": "assistant", "content": "Yes."},
        *turns("and then?"),
    )
    assert index.overlap(later) == 1.0


def write_pairs(path: Path, prompts: list[str]) -> DataConfig:
    rows = [{"prompt": p, "chosen": "No.", "rejected": "Sure.", "category": "S2"} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source="jsonl", path=str(path))


def test_training_pairs_that_nearly_ask_what_a_suite_asks_are_dropped_and_counted(tmp_path: Path) -> None:
    asked = next(
        e.prompt[0]["content"]
        for e in load_samples().harmful_prompts
        if len(e.prompt[0]["content"].split()) > 11
    )
    config = write_pairs(tmp_path / "p.jsonl", [f"Please answer this. {asked}", "Where is the station?"])
    data = load_data(config, 0)
    assert len(data.safety_pairs) == 1
    reason = "left out: a prompt that shares more than 50% of a held-out or suite prompt's n-grams"
    assert data.counts[reason] == 1
    config.max_suite_overlap = 1.0
    assert len(load_data(config, 0).safety_pairs) == 2


def test_held_out_prompts_have_no_near_copy_in_training(tmp_path: Path) -> None:
    asked = [" ".join(f"word{i}{place}" for place in "abcdefghij") for i in range(40)]
    near = [f"{text} today" for text in asked]
    config = write_pairs(tmp_path / "p.jsonl", asked + near)
    config.held_out_fraction = 0.3
    data = load_data(config, 0)
    index = SuiteIndex(e.prompt for e in data.harmful_prompts)
    assert data.safety_pairs
    assert all(index.overlap(pair.prompt) <= 0.5 for pair in data.safety_pairs)
