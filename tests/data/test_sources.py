import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.jsonl import MAX_LISTED
from equipoise.data.sources import SafetyData, load_data, load_jsonl_pairs, load_samples, normalise_prompt

GOOD = {"prompt": "How do I sharpen a chisel?", "chosen": "On a flat stone.", "rejected": "No idea."}


def write(path: Path, *records: Mapping[str, object] | str | bytes) -> Path:
    lines = []
    for record in records:
        text = record if isinstance(record, str | bytes) else json.dumps(record)
        lines.append(text if isinstance(text, bytes) else text.encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def problems(path: Path) -> list[str]:
    """The lines of the error, without the file's name."""
    with pytest.raises(DataError) as caught:
        load_jsonl_pairs(path)
    return [line.strip().removeprefix(f"{path}:") for line in str(caught.value).splitlines()[1:]]


def test_a_minimal_pair_gets_an_id_that_names_its_line(tmp_path: Path) -> None:
    pair = load_jsonl_pairs(write(tmp_path / "mine.jsonl", "", GOOD))[0]
    assert pair.id == "mine:2"
    assert pair.prompt == ({"role": "user", "content": "How do I sharpen a chisel?"},)
    assert (pair.category, pair.chosen_safe, pair.rejected_safe, pair.source) == ("OTHER", None, None, "")
    assert pair.meta == {}


def test_a_full_pair_keeps_everything(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Where can I buy a stolen bike?"},
    ]
    full = {
        **GOOD,
        "prompt": turns,
        "id": "a",
        "category": "S2",
        "chosen_safe": True,
        "rejected_safe": False,
        "source": "here",
        "meta": {"annotator": 3},
        "confidence": 0.5,
    }
    pair = load_jsonl_pairs(write(tmp_path / "pairs.jsonl", full))[0]
    assert pair.prompt == tuple(turns)
    assert (pair.id, pair.category, pair.source) == ("a", "S2", "here")
    assert (pair.chosen_safe, pair.rejected_safe) == (True, False)
    assert pair.meta == {"annotator": 3, "confidence": 0.5}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "prompt: is missing, expected a text or a list of turns"),
        ({"prompt": 3}, "prompt: found a number, expected a text or a list of turns"),
        ({"prompt": "  \n"}, "prompt: is only white space"),
        ({"prompt": []}, "prompt: is an empty list"),
        ({"prompt": ["Hi"]}, 'prompt[0]: found a text, expected {"role": ..., "content": ...}'),
        (
            {"prompt": [{"role": "human", "content": "Hi"}]},
            "prompt[0].role: found 'human', expected one of system, user, assistant",
        ),
        ({"prompt": [{"role": "user", "content": ""}]}, "prompt[0].content: is empty"),
        (
            {"prompt": [{"role": "user", "content": "Hi", "name": "x"}]},
            "prompt[0].name: unknown key; a turn has role and content",
        ),
        (
            {"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]},
            "prompt: ends with a turn of 'assistant', expected 'user'",
        ),
        (
            {"prompt": [{"role": "user", "content": "A"}, {"role": "system", "content": "B"}] * 2},
            "prompt: has a system turn that is not the first",
        ),
        ({"chosen": ""}, "chosen: is empty"),
        ({"rejected": ["No"]}, "rejected: found a list, expected a text"),
        ({"rejected": " On a flat stone. "}, "rejected: is the same as chosen"),
        ({"chosen": "half \ud83d"}, "chosen: holds half of a surrogate pair, which no tokenizer can read"),
        ({"category": ["S1", "S2"]}, "category: found a list, expected one of S1,"),
        ({"category": "S15"}, "category: found 'S15', expected one of S1,"),
        ({"chosen_safe": "yes"}, "chosen_safe: found a text, expected true, false or null"),
        ({"source": 1}, "source: found a number, expected a text"),
        ({"meta": []}, "meta: found a list, expected an object"),
        ({"id": " "}, "id: is only white space"),
    ],
)
def test_a_bad_field_is_reported_with_line_field_and_reason(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    found = problems(write(tmp_path / "bad.jsonl", GOOD, {**GOOD, **change}))
    assert any(problem.startswith(f"2: {reason}") for problem in found), found


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line: is not JSON (Expecting property name enclosed in double quotes, column 2)"),
        ("[1]", "line: found a list, expected a JSON object"),
        ("null", "line: found null, expected a JSON object"),
        (b'{"prompt": "caf\xe9"}', "line: is not UTF-8 (byte 16); save the file as UTF-8"),
        ("[" * 100_000, "line: is not JSON that can be read"),
    ],
)
def test_a_line_that_cannot_be_read_is_reported(tmp_path: Path, line: str | bytes, reason: str) -> None:
    found = problems(write(tmp_path / "bad.jsonl", line, GOOD))
    assert len(found) == 1
    assert found[0].startswith(f"1: {reason}")


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", {"prompt": "", "chosen": 1}, GOOD, "nonsense", {**GOOD, "id": 3})
    found = problems(path)
    assert [problem.split(":")[0] + problem.split(":")[1] for problem in found] == [
        "1 prompt",
        "1 chosen",
        "1 rejected",
        "3 line",
        "4 id",
    ]


def test_a_long_list_of_problems_is_cut_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", *["nonsense"] * (MAX_LISTED + 7))
    with pytest.raises(DataError, match=f"has {MAX_LISTED + 7} problems") as caught:
        load_jsonl_pairs(path)
    assert str(caught.value).count("is not JSON") == MAX_LISTED
    assert str(caught.value).endswith("... and 7 more")


def test_an_id_that_occurs_twice_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", {**GOOD, "id": "a"}, GOOD, {**GOOD, "id": "a"})
    assert problems(path) == ["3: id: 'a' is the id of line 1 too"]


def test_the_texts_of_a_bad_record_are_not_printed(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", {**GOOD, "chosen": 1, "rejected": "how to do harm"})
    assert "harm" not in "".join(problems(path))


def test_a_byte_order_mark_and_blank_lines_hold_no_record(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "", "  ", "\r")
    assert len(load_jsonl_pairs(path)) == 1


def test_a_missing_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl cannot be read: No such file"):
        load_jsonl_pairs(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load_jsonl_pairs(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no record"):
        load_jsonl_pairs(tmp_path / "empty.jsonl")


def test_labels_of_another_taxonomy_are_kept_and_the_pair_is_other(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", {**GOOD, "category": ["privacy_violation", "theft"]})
    pair = load_jsonl_pairs(path)[0]
    assert pair.category == "OTHER"
    assert pair.meta == {"labels": ["privacy_violation", "theft"]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What's  up?", "whats up"),
        ("Don\u2019t PANIC!", "don't panic"),
        ("caf\u00e9", "cafe\u0301"),
        ("ﬁle a report...", "File a report"),
        ("Stra\u00dfe", "STRASSE"),
    ],
)
def test_prompts_that_differ_in_form_alone_are_one(one: str, other: str) -> None:
    assert normalise_prompt(one) == normalise_prompt(other)


@pytest.mark.parametrize(
    ("one", "other"), [("kill a process", "kill a person"), ("?!", "..."), ("2 + 2", "2 2"), ("की", "का")]
)
def test_prompts_that_differ_in_content_are_two(one: str, other: str) -> None:
    assert normalise_prompt(one) != normalise_prompt(other)


def test_turns_count_and_a_text_is_one_user_turn() -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "user", "content": "there?"}]
    assert normalise_prompt(turns) == "hello there"
    assert normalise_prompt(turns[:1]) == normalise_prompt("hello")


def load(path: Path, seed: int = 0, **keys: Any) -> SafetyData:
    return load_data(DataConfig(source="jsonl", path=str(path), **keys), seed)


def user_file(tmp_path: Path) -> Path:
    """200 safety pairs, 100 helpful ones, and two whose prompts the shipped suites have."""
    samples = load_samples()
    leaked = [samples.harmful_prompts[0].prompt[0]["content"].upper(), samples.helpful_prompts[0].prompt]
    records = [{**GOOD, "prompt": f"Question {n // 2}", "category": "S1"} for n in range(200)]
    records += [{**GOOD, "prompt": f"Task {n}", "category": "helpful"} for n in range(100)]
    return write(tmp_path / "mine.jsonl", *records, *({**GOOD, "prompt": prompt} for prompt in leaked))


def test_a_users_pairs_replace_the_training_pairs_and_the_suites_stay(tmp_path: Path) -> None:
    samples, data = load_samples(), load(user_file(tmp_path))
    assert (len(data.safety_pairs), len(data.helpful_pairs)) == (200, 100)
    assert data.counts == {"read": 302, "other": 2, "held_out": 0, "dropped_in_suites": 2}
    assert data.harmful_prompts == samples.harmful_prompts
    assert data.lookalike_prompts == samples.lookalike_prompts
    assert data.helpful_prompts == samples.helpful_prompts
    assert "2 dropped because a shipped suite asks the same" in data.summary()


def test_held_out_prompts_are_judged_once_and_not_trained_on(tmp_path: Path) -> None:
    samples, data = load_samples(), load(user_file(tmp_path), held_out_fraction=0.3)
    harmful = data.harmful_prompts[len(samples.harmful_prompts) :]
    helpful = data.helpful_prompts[len(samples.helpful_prompts) :]
    trained = {normalise_prompt(pair.prompt) for pair in data.safety_pairs + data.helpful_pairs}
    judged = [normalise_prompt(exchange.prompt) for exchange in harmful + helpful]
    assert not trained & set(judged)
    assert len(judged) == len(set(judged)) == 200 - len(trained)
    assert 40 <= len(judged) <= 80  # 60 expected, sd 6.5
    assert data.counts["held_out"] == 2 * len(harmful) + len(helpful)
    assert {exchange.category for exchange in harmful} == {"S1"}
    assert all(exchange.response is None for exchange in harmful)
    assert {exchange.response for exchange in helpful} == {GOOD["chosen"]}


def test_the_split_depends_on_prompt_and_seed_alone(tmp_path: Path) -> None:
    path = user_file(tmp_path)
    reordered = tmp_path / "reordered.jsonl"
    reordered.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))

    def training(file: Path, seed: int) -> set[str]:
        return {
            normalise_prompt(pair.prompt) for pair in load(file, seed, held_out_fraction=0.3).safety_pairs
        }

    assert training(path, 0) == training(reordered, 0)
    assert training(path, 0) != training(path, 1)


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    leaked = load_samples().harmful_prompts[0].prompt
    path = write(tmp_path / "mine.jsonl", {**GOOD, "prompt": leaked})
    with pytest.raises(
        DataError,
        match="nothing to train on: of 1 rows read and 1 pairs, 1 records have a prompt of a shipped suite",
    ):
        load(path)


def test_a_source_that_cannot_be_loaded() -> None:
    with pytest.raises(DataError, match="'hub'; possible: samples, mixture, jsonl"):
        load_data(DataConfig(source="hub"), seed=0)
    with pytest.raises(DataError, match=r"add data\.path=FILE"):
        load_data(DataConfig(source="jsonl"), seed=0)


def test_samples_need_no_file() -> None:
    assert load_data(DataConfig(), seed=0) == load_samples()


@pytest.mark.skipif("EQUIPOISE_DATA" not in os.environ, reason="EQUIPOISE_DATA names no folder of real data")
def test_real_pairs_load_completely() -> None:
    path = Path(os.environ["EQUIPOISE_DATA"]) / "pku_saferlhf_pairs.jsonl"
    pairs = load_jsonl_pairs(path)
    assert len(pairs) == 2411
    assert {pair.category for pair in pairs} == {"OTHER"}
    assert sum("labels" in pair.meta for pair in pairs) == 241
    data = load(path, held_out_fraction=0.1)
    assert len(data.safety_pairs) + data.counts["held_out"] + data.counts["dropped_in_suites"] == 2411
