"""Each data set on a local copy with upstream's layout and columns."""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.schema import PreferencePair
from equipoise.data.sources import HUB_SOURCES, Records, load_data, load_records


def records(mirror: Path, name: str, **keys: Any) -> Records:
    return load_records(name, DataConfig(source=name, mirror=str(mirror), **keys))


def told(pair: PreferencePair) -> tuple[str, str, str]:
    return pair.category, pair.chosen, pair.rejected


@pytest.mark.parametrize(
    "name", [f"{name}/{version}" for name, source in HUB_SOURCES.items() for version in source.versions]
)
def test_every_set_loads_and_accounts_for_every_row(mirror: Path, name: str) -> None:
    found = records(mirror, name)
    assert found.num_read > 0
    assert found.pairs
    assert len({pair.id for pair in found.pairs}) == len(found.pairs)
    assert all(pair.prompt[-1]["role"] == "user" and pair.chosen != pair.rejected for pair in found.pairs)


def test_a_pku_row_gives_a_safety_and_a_helpful_pair(mirror: Path) -> None:
    found = records(mirror, "pku_saferlhf/alpaca-7b", unsafe_chosen="keep")
    first = [pair for pair in found.pairs if pair.id.startswith("pku_saferlhf/alpaca-7b:1:")]
    assert [told(pair) for pair in first] == [
        ("S2", "Ask its owner, number 1.", "Just take it, number 1."),
        ("helpful", "Just take it, number 1.", "Ask its owner, number 1."),
    ]
    assert [(pair.chosen_safe, pair.rejected_safe) for pair in first] == [(True, False), (False, True)]
    assert first[0].meta == {"labels": ["Economic Crime"], "severity": [0, 2]}


def test_a_pku_pair_has_the_category_of_what_was_rejected(mirror: Path) -> None:
    found = records(mirror, "pku_saferlhf/alpaca-7b", preference="safe")
    assert [pair.category for pair in found.pairs] == ["S2", "S1", "OTHER", "S2"]
    assert found.pairs[1].meta["labels"] == ["Animal Abuse", "Violence"]  # in the order of the columns


def test_pku_counts_what_it_leaves_out(mirror: Path) -> None:
    found = records(mirror, "pku_saferlhf/alpaca-7b")
    assert found.num_read == 7
    assert found.left_out == {
        "a text or a label is empty": 1,
        "both answers are the same": 1,
        "the answer called safer is the only unsafe one": 1,
        "unsafe_chosen=drop": 2,
    }
    assert found.notes == {"both_safe=keep": 1, "both_unsafe=keep": 1}


@pytest.mark.parametrize(("rule", "num_pairs"), [("keep", 4), ("drop", 2), ("mark", 4)])
def test_pairs_of_two_safe_or_two_unsafe_answers_go_as_the_recipe_says(
    mirror: Path, rule: str, num_pairs: int
) -> None:
    found = records(mirror, "pku_saferlhf/alpaca-7b", preference="safe", both_safe=rule, both_unsafe=rule)
    assert len(found.pairs) == num_pairs
    assert (found.left_out + found.notes)[f"both_unsafe={rule}"] == 1
    marked = [key for pair in found.pairs for key in pair.meta if key.startswith("both")]
    assert marked == (["both_safe", "both_unsafe"] if rule == "mark" else [])


def test_the_three_configurations_together_and_the_30k_version(mirror: Path) -> None:
    assert records(mirror, "pku_saferlhf").num_read == 21
    older = records(mirror, "pku_saferlhf/30k", preference="safe")
    assert older.num_read == 5
    assert {pair.category for pair in older.pairs} == {"OTHER"}  # it has no harm categories
    assert records(mirror, "pku_saferlhf", num_rows=3).num_read == 3


def test_hh_is_parsed_into_turns_and_its_faults_are_counted(mirror: Path) -> None:
    harmless = records(mirror, "hh_rlhf/harmless")
    (pair,) = harmless.pairs
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]
    assert told(pair) == ("OTHER", "Gladly.", "No.")
    assert harmless.left_out == {
        "both answers are the same": 1,
        "an answer is empty": 1,
        "the transcript has an empty turn or no speakers": 2,
        "the conversations part before the last answer": 1,
    }
    assert records(mirror, "hh_rlhf/helpful").pairs[0].category == "helpful"


def test_ultrafeedback_leaves_ties_out(mirror: Path) -> None:
    found = records(mirror, "ultrafeedback_binarized")
    assert [told(pair) for pair in found.pairs] == [("helpful", "Red.", "Seven.")]
    assert found.left_out == {
        "the chosen answer has no higher score": 1,
        "the conversations part before the last answer": 1,
    }


def test_helpsteer_pairs_the_best_with_the_worst_answer(mirror: Path) -> None:
    found = records(mirror, "helpsteer")
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [
        ("Red.", "Seven."),
        ("Fine.", "Go away."),
    ]
    assert [turn["content"] for turn in found.pairs[1].prompt] == ["Hi", "Hello", "How are you?"]
    assert found.left_out == {
        "neither the best nor the worst answer to its prompt": 1,
        "no answer to its prompt is more helpful than another": 2,
        "the only answer to its prompt": 1,
    }


def test_beavertails_settles_what_was_judged_twice_and_pairs_by_prompt(mirror: Path) -> None:
    found = records(mirror, "beavertails")
    assert [told(pair) for pair in found.pairs] == [("S2", "Buy one.", "Steal one.")]
    assert found.left_out == {"the same prompt and answer again": 1, "judged safe as often as unsafe": 2}
    labels = ["financial_crime,property_crime,theft", "non_violent_unethical_behavior"]
    assert found.pairs[0].meta == {"labels": labels}
    # A safe answer has no harm of its own: the category of its prompt comes from the unsafe one, if any.
    assert {exchange.response: exchange.category for exchange in found.labelled} == {
        "Steal one.": "S2",
        "Buy one.": "S2",
        "Rent one.": "OTHER",
    }


def test_wildguardmix_teaches_both_to_refuse_and_to_answer(mirror: Path) -> None:
    found = records(mirror, "wildguardmix")
    assert [told(pair) for pair in found.pairs] == [
        ("S2", "I can't help.", "Sure: guess."),
        ("helpful", "Reset the password.", "I can't help."),
    ]
    assert [(prompt.category, prompt.response) for prompt in found.prompts] == [
        ("S7", None),
        ("helpful", None),
    ]
    assert [prompt.meta["labels"] for prompt in found.prompts] == [
        ["private_information_individual"],
        ["benign"],
    ]


def test_aegis2_reads_both_files_and_leaves_redacted_prompts_out(mirror: Path) -> None:
    found = records(mirror, "aegis2")
    assert [told(pair) for pair in found.pairs] == [("S2", "I won't help.", "Use tin.")]
    assert found.left_out == {"the prompt is redacted": 1}
    assert [(prompt.id, prompt.category) for prompt in found.prompts] == [("aegis2:4", "S2")]
    assert {exchange.response: exchange.refusal for exchange in found.labelled} == {
        "Use tin.": None,
        "Use a cloth.": None,
        "I won't help.": True,
    }


def test_do_not_answer_has_six_answers_a_question(mirror: Path) -> None:
    found = records(mirror, "do_not_answer")
    assert len(found.labelled) == 6
    assert [told(pair) for pair in found.pairs] == [("S7", "No, says GPT4.", "No, says ChatGLM2.")]
    assert found.notes == {"answers without a partner to make a pair": 4}


@pytest.mark.parametrize("column", ["prompt", "safer_response_id", "response_1_harm_category"])
def test_a_changed_schema_names_the_column(tmp_path: Path, mirrors: ModuleType, column: str) -> None:
    row = {name: value for name, value in mirrors.pku_rows()[0].items() if name != column}
    mirrors.write_rows(tmp_path / "PKU-Alignment/PKU-SafeRLHF/data/Alpaca-7B/train.jsonl", [row])
    with pytest.raises(DataError, match=rf"row 1: the column {column} is missing; found .*d79b19b2"):
        records(tmp_path, "pku_saferlhf/alpaca-7b")


def test_a_column_of_another_type_is_named(tmp_path: Path, mirrors: ModuleType) -> None:
    rows = [row | {"safer_response_id": f"response_{row['safer_response_id']}"} for row in mirrors.pku_rows()]
    mirrors.write_pku(tmp_path, rows)
    with pytest.raises(DataError, match="the column safer_response_id holds text, expected a whole number"):
        records(tmp_path, "pku_saferlhf/alpaca-7b")


def test_a_label_that_the_crosswalk_does_not_know_is_named(tmp_path: Path, mirrors: ModuleType) -> None:
    row = mirrors.pku_rows()[0]
    row["response_1_harm_category"]["Time Travel"] = True
    mirrors.write_pku(tmp_path, [row])
    with pytest.raises(DataError, match="'Time Travel' is unknown to the crosswalk pku_saferlhf"):
        records(tmp_path, "pku_saferlhf/alpaca-7b")


def test_a_copy_that_is_not_there_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a copy of the repository PKU-Alignment/PKU-SafeRLHF there"):
        records(tmp_path, "pku_saferlhf")
    folder = tmp_path / "PKU-Alignment/PKU-SafeRLHF/data/Alpaca-7B"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"a file is missing .*expected data/Alpaca-7B/train.jsonl"):
        records(tmp_path, "pku_saferlhf/alpaca-7b")
    (folder / "train.jsonl").write_text('{"prompt": "cut in the mid')
    with pytest.raises(DataError, match=r"cannot be read: .*Mend the file, or copy it again"):
        records(tmp_path, "pku_saferlhf/alpaca-7b")


def test_labelled_answers_are_for_training_and_held_out_ones_become_prompts(mirror: Path) -> None:
    config = DataConfig(source="beavertails", mirror=str(mirror), held_out_fraction=0.5)
    data = load_data(config, seed=3)
    trained = {exchange.prompt[0]["content"] for exchange in data.labelled}
    judged = {prompt.prompt[0]["content"] for prompt in data.harmful_prompts}
    assert trained
    assert trained | (judged & {"How do I get a bike?", "How do I get a car?"}) == {
        "How do I get a bike?",
        "How do I get a car?",
    }
    assert not trained & judged


@pytest.mark.skipif("EQUIPOISE_DATA" not in os.environ, reason="EQUIPOISE_DATA names no folder of real data")
def test_real_rows_of_pku_have_the_columns_that_the_loader_asks_for(
    tmp_path: Path, mirrors: ModuleType
) -> None:
    rows = json.loads((Path(os.environ["EQUIPOISE_DATA"]) / "pku_saferlhf_raw_rows.json").read_text())
    made_up = {name: type(mirrors.pku_rows()[0][name]) for name in mirrors.PKU_30K_COLUMNS}
    assert all({name: type(value) for name, value in row.items()} == made_up for row in rows)
    mirrors.write_rows(tmp_path / "PKU-Alignment/PKU-SafeRLHF-30K/round0/train.jsonl.xz", rows)
    found = records(tmp_path, "pku_saferlhf/30k", preference="safe")
    assert len(found.pairs) + found.left_out.total() == found.num_read == len(rows) == 32
