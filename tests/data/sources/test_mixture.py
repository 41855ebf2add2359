import json
from pathlib import Path

import pytest

from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.schema import PreferencePair
from equipoise.data.sources import load_data, load_samples
from equipoise.data.sources.mixture import part_sizes, take


def pairs(number: int) -> list[PreferencePair]:
    return [
        PreferencePair(f"p{n}", ({"role": "user", "content": f"Q{n}"},), "yes", "no", "S1")
        for n in range(number)
    ]


def test_the_scarcest_part_is_taken_whole_and_the_shares_hold() -> None:
    assert part_sizes({"a": 800, "b": 100}, {"a": 0.8, "b": 0.2}) == {"a": 400, "b": 100}
    assert part_sizes({"a": 80, "b": 1000}, {"a": 4, "b": 1}) == {"a": 80, "b": 20}
    assert part_sizes({"a": 5, "b": 5}, {"a": 1, "b": 1}) == {"a": 5, "b": 5}
    assert part_sizes({"a": 3, "b": 90}, {"a": 1, "b": 0.01}) == {"a": 3, "b": 1}


def test_what_is_taken_does_not_depend_on_the_order() -> None:
    some = pairs(50)
    taken = take(some, 20, seed=1)
    assert len(taken) == 20
    assert taken == sorted(taken, key=some.index)
    assert {p.id for p in take(some[::-1], 20, seed=1)} == {p.id for p in taken}
    assert {p.id for p in take(some, 20, seed=2)} != {p.id for p in taken}


def test_a_mixture_of_a_hub_set_and_shipped_pairs(mirror: Path) -> None:
    config = DataConfig(
        source="mixture",
        mixture={"pku_saferlhf/alpaca-7b": 0.4, "helpful": 0.6},
        mirror=str(mirror),
        preference="safe",
    )
    data = load_data(config, seed=0)
    assert (len(data.safety_pairs), len(data.helpful_pairs)) == (4, 6)
    assert all(pair in load_samples().helpful_pairs for pair in data.helpful_pairs)
    assert data.counts["left out of helpful: the mixture's shares leave no room"] == 126
    assert "126: left out of helpful" in data.summary()


def test_a_part_without_a_pair_is_named(tmp_path: Path, mirror: Path) -> None:
    leaked = load_samples().harmful_prompts[0].prompt
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": leaked, "chosen": "a", "rejected": "b"}))
    config = DataConfig(source="mixture", mixture={"jsonl": 1, "helpful": 1}, path=str(path))
    with pytest.raises(
        DataError, match=r"data\.mixture\.jsonl: this part has no pair to train on .*1 records have"
    ):
        load_data(config, seed=0)


def test_parts_of_one_file_source_keep_its_format(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\nQ,a,b\n")
    data = load_data(DataConfig(source="mixture", mixture={"csv": 1, "safety": 2}, path=str(path)), seed=0)
    assert len(data.safety_pairs) == 3
