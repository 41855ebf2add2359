import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.jsonl import MAX_CHARS
from equipoise.data.sources import Records, load_data, load_records

GOOD = {"prompt": "How do I sharpen a chisel?", "chosen": "On a flat stone.", "rejected": "No idea."}


def write(path: Path, *records: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(path: Path, source: str = "jsonl", **keys: Any) -> Records:
    return load_records(source, DataConfig(source=source, path=str(path), **keys))


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {**GOOD, "prompt": "B"})
    write(tmp_path / "a.jsonl", {**GOOD, "prompt": "A"})
    (tmp_path / "README.md").write_text("not a record")
    assert [pair.id for pair in load(tmp_path).pairs] == ["a:1", "b:1"]
    with pytest.raises(DataError, match=r"holds no file \*\.csv"):
        load(tmp_path, "csv")
    write(tmp_path / "a.jsonl", {**GOOD, "id": "same"})
    write(tmp_path / "b.jsonl", {**GOOD, "id": "same"})
    with pytest.raises(DataError, match="the id 'same' occurs in two files"):
        load(tmp_path)


def test_fields_may_be_called_otherwise_and_lie_deeper(tmp_path: Path) -> None:
    record = {"question": "Q", "good": "G", "bad": "B", "meta": {"safe": {"good": True}}, "kind": "S2"}
    fields = {
        "prompt": "question",
        "chosen": "good",
        "rejected": "bad",
        "category": "kind",
        "chosen_safe": "meta.safe.good",
    }
    (pair,) = load(write(tmp_path / "a.jsonl", record), fields=fields).pairs
    assert (pair.prompt[0]["content"], pair.chosen, pair.rejected, pair.category) == ("Q", "G", "B", "S2")
    assert pair.chosen_safe is True
    assert pair.meta == {"safe": {"good": True}}


def test_a_field_that_no_line_has_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"data\.fields\.category says 'harm', which no line has"):
        load(path, fields={"category": "harm"})


def test_records_without_a_category_get_the_default(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "prompt": "Q", "category": "S2"})
    assert [pair.category for pair in load(path).pairs] == ["OTHER", "S2"]
    assert [pair.category for pair in load(path, default_category="helpful").pairs] == ["helpful", "S2"]
    with pytest.raises(
        DataError, match=r"data\.default_category: found 'help', expected one of S1, .*, OTHER, helpful"
    ):
        load(path, default_category="help")


@pytest.mark.parametrize(
    ("taxonomy", "value", "category", "labels"),
    [
        ("beavertails", ["non_violent_unethical_behavior", "privacy_violation"], "S7", 2),
        ("beavertails", "privacy_violation", "S7", 1),
        ("beavertails", "S7", "S7", 0),
        ("llama_guard_2", "S9", "S10", 1),  # its own numbers come first
        ("qwen3guard", "None", "helpful", 1),
        ("pku_saferlhf", None, "OTHER", 0),
        ("pku_saferlhf", [], "OTHER", 0),
    ],
)
def test_labels_are_mapped_by_the_crosswalk_and_kept(
    tmp_path: Path, taxonomy: str, value: object, category: str, labels: int
) -> None:
    (pair,) = load(write(tmp_path / "a.jsonl", {**GOOD, "category": value}), taxonomy=taxonomy).pairs
    assert pair.category == category
    kept = pair.meta.get("labels", [])
    assert kept == ([value] if isinstance(value, str) else value or [])[:labels]


def test_a_users_own_taxonomy_brings_categories_and_labels(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "categories: {brand: {name: Brand, description: Running down the company.}}\n"
        "labels: {slander: [brand, S5], small talk: none}\n"
    )
    path = write(
        tmp_path / "a.jsonl", *({**GOOD, "category": c} for c in ("slander", "brand", "small talk", "S5"))
    )
    pairs = load(path, taxonomy=str(own)).pairs
    assert [pair.category for pair in pairs] == ["brand", "brand", "helpful", "S5"]
    assert [pair.meta.get("labels") for pair in pairs] == [["slander"], None, ["small talk"], None]


@pytest.mark.parametrize("value", ["slandr", ["slander", "slandr"]])
def test_a_label_that_the_taxonomy_does_not_know_is_named(tmp_path: Path, value: object) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("labels: {slander: [S5]}")
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "category": value})
    with pytest.raises(DataError, match=r"a\.jsonl:2: category: found 'slandr', .*labels of own: slander"):
        load(path, taxonomy=str(own))


def test_labelled_answers_make_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "response": "bad", "safe": False, "category": "S2"},
        {"prompt": "Q", "response": "good", "safe": True, "category": "S2"},
        {"prompt": "R", "response": "fine", "safe": True},
    ]
    found = load(write(tmp_path / "a.jsonl", *rows), "labelled")
    assert [(pair.chosen, pair.rejected, pair.category) for pair in found.pairs] == [("good", "bad", "S2")]
    assert len(found.labelled) == 3
    assert found.notes == {"answers without a partner to make a pair": 1}


def test_a_transcript_is_parsed_and_a_broken_one_reported(tmp_path: Path) -> None:
    good = "Human: Hi\n\nAssistant: Hello\n\nHuman: Help me\n\nAssistant:"
    (pair,) = load(write(tmp_path / "a.jsonl", {**GOOD, "prompt": good})).pairs
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]
    plain = {**GOOD, "prompt": "Human: is that a noun?"}
    assert len(load(write(tmp_path / "a.jsonl", plain)).pairs[0].prompt) == 1
    broken = {**GOOD, "prompt": "Human: Hi\n\nAssistant:\n\nHuman: Help me\n\nAssistant:"}
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: prompt: turn 2 of the transcript \(Assistant\) is empty"
    ):
        load(write(tmp_path / "a.jsonl", broken))


def test_a_field_of_ten_megabytes_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "chosen": "x" * 10 * MAX_CHARS})
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: chosen: has 10,000,000 characters, expected at most 1,000,000"
    ):
        load(path)


def damaged(lines: list[bytes], generator: random.Random) -> tuple[list[bytes], int]:
    """The lines with one of them broken in one of nine ways, and the number of that line."""
    place = generator.randrange(len(lines))
    record = json.loads(lines[place])
    ways: list[bytes] = [
        lines[place][: generator.randrange(1, len(lines[place]) - 1)],  # cut
        lines[place].replace(b"stone", b"st\xf6ne"),
        json.dumps({key: value for key, value in record.items() if key != "chosen"}).encode(),
        json.dumps({**record, "rejected": None}).encode(),
        json.dumps({**record, "prompt": generator.choice([[], 7, "  "])}).encode(),
        json.dumps({**record, "category": "S77"}).encode(),
        json.dumps({**record, "chosen_safe": "maybe"}).encode(),
        json.dumps([record]).encode(),
        lines[place] + b"," + lines[place],
    ]
    return [*lines[:place], generator.choice(ways), *lines[place + 1 :]], place + 1


def test_two_hundred_malformed_files_each_give_a_message_with_the_line(tmp_path: Path) -> None:
    generator = random.Random(7)
    path = tmp_path / "pairs.jsonl"
    for _ in range(200):
        good = [
            json.dumps({**GOOD, "prompt": f"Question {n}"}).encode() for n in range(generator.randint(1, 6))
        ]
        lines, number = damaged(good, generator)
        path.write_bytes(b"\n".join(lines) + b"\n")
        with pytest.raises(DataError) as caught:  # nothing is trained on the lines that are left
            load(path)
        first, *problems = str(caught.value).splitlines()
        assert first.startswith(f"{path} has ")
        assert {problem.split(":")[1] for problem in problems} == {str(number)}


def test_a_file_whose_every_line_is_held_out_or_judged_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({**GOOD, "prompt": f"Q{n}"} for n in range(3)))
    config = DataConfig(source="jsonl", path=str(path), held_out_fraction=0.999999)
    with pytest.raises(
        DataError, match=r"leaves nothing to train on: of 3 rows read .* 3 are held out. Lower data.held"
    ):
        load_data(config, seed=0)
