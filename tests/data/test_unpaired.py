import json
from pathlib import Path

import pytest

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL, Exchange, LabelledExchange, PreferencePair
from equipoise.data.unpaired import from_labelled, from_pairs, load_unpaired, read_unpaired

PROMPT = ({"role": "user", "content": "Where is the library?"},)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_desirable_or_label_as_trl_calls_it(tmp_path: Path) -> None:
    file = write(
        tmp_path / "answers.jsonl",
        {"prompt": "Hello?", "response": "Hello.", "desirable": True, "category": "helpful", "rater": 3},
        {"prompt": [*PROMPT], "response": "Find it yourself.", "label": False, "category": "S1", "id": "b"},
        {"prompt": "And you?", "response": "Fine.", "label": True},
    )
    first, second, third = read_unpaired(file)
    assert (first.id, first.desirable, first.category, first.meta) == (
        "answers:1",
        True,
        HELPFUL,
        {"rater": 3},
    )
    assert (second.id, second.prompt, second.desirable) == ("b", PROMPT, False)
    assert (third.desirable, third.category) == (True, "OTHER")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"desirable": None}, "desirable: is missing, expected true or false (label is read too)"),
        ({"desirable": "yes"}, "desirable: found a text, expected true, false or null"),
        ({"desirable": 1}, "desirable: found a number, expected true, false or null"),
        ({"label": True}, "desirable: is given twice, as desirable and as label; give one of them"),
        ({"response": None}, "response: is missing, expected a text"),
        ({"category": "S99"}, "category: found 'S99', expected one of"),
        (
            {"chosen": "Yes.", "rejected": "No."},
            "line: is a preference pair (chosen, rejected), expected one answer",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named(change: dict[str, object], problem: str, tmp_path: Path) -> None:
    good = {"prompt": "Hello?", "response": "Hello.", "desirable": True, "category": "S1"}
    file = write(tmp_path / "answers.jsonl", good, good | {"prompt": "Who?"} | change)
    with pytest.raises(DataError) as error:
        read_unpaired(file)
    assert f"{file}:2: {problem}" in str(error.value)


def test_prompts_of_a_suite_are_left_out_and_counted(tmp_path: Path) -> None:
    file = write(
        tmp_path / "answers.jsonl",
        {"prompt": "where is the LIBRARY", "response": "There.", "desirable": True},
        {"prompt": "Where is the pool?", "response": "Here.", "desirable": False},
    )
    suite = [Exchange("x", PROMPT, "S1")]
    found = load_unpaired(file, suite)
    assert [exchange.response for exchange in found.exchanges] == ["Here."]
    assert found.num_in_suites == 1
    nothing = write(
        tmp_path / "nothing.jsonl", {"prompt": "Where is the library?", "response": "A", "label": True}
    )
    with pytest.raises(
        DataError, match="leaves no answer to train on: the prompts of all 1 occur in the suites"
    ):
        load_unpaired(nothing, suite)


def test_labelled_answers_by_what_their_labels_say() -> None:
    def labelled(category: str, safe: bool | None, refusal: bool | None) -> LabelledExchange:
        return LabelledExchange("x", PROMPT, "answer", category, safe, refusal)

    cases = {
        ("S1", True, True): True,  # a refusal of harm is what is wanted
        ("S1", True, False): True,
        ("S1", False, False): False,
        ("S1", None, True): None,
        (HELPFUL, True, False): True,
        (HELPFUL, True, True): False,  # a harmless request refused
        (HELPFUL, False, False): False,
        (HELPFUL, True, None): None,
    }
    for (category, safe, refusal), desirable in cases.items():
        found = from_labelled([labelled(category, safe, refusal)])
        wanted = [] if desirable is None else [desirable]
        assert [exchange.desirable for exchange in found.exchanges] == wanted
        assert found.num_unlabelled == 1 - len(wanted)


def test_a_pair_is_split_in_two() -> None:
    pair = PreferencePair("p", PROMPT, "There.", "Who knows.", "S2", source="made up")
    wanted, unwanted = from_pairs([pair])
    assert (wanted.id, wanted.response, wanted.desirable) == ("p/chosen", "There.", True)
    assert (unwanted.id, unwanted.response, unwanted.desirable) == ("p/rejected", "Who knows.", False)
    assert {wanted.category, unwanted.category} == {"S2"}
