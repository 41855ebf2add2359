import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.cleaning import RULES, clean
from equipoise.data.config import CleaningConfig, DataConfig
from equipoise.data.errors import DataError
from equipoise.data.near_duplicates import near_duplicates
from equipoise.data.schema import HELPFUL, LabelledExchange, PreferencePair
from equipoise.data.sources import load_data

LONG = " ".join(f"word{i}" for i in range(60))


def pair(
    id: str = "a", prompt: str = "Where is it?", chosen: str = "There, on the left.", **more: object
) -> PreferencePair:
    values: dict[str, object] = {"rejected": "Who knows.", "category": "S2", **more}
    return PreferencePair(id, ({"role": "user", "content": prompt},), chosen, **values)  # type: ignore[arg-type]


def only(rule: str, action: str = "drop", **more: object) -> CleaningConfig:
    """A configuration in which one rule does something."""
    return CleaningConfig(**{**dict.fromkeys(RULES, "keep"), rule: action, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "faulty"),
    [
        ("empty", pair(chosen="...")),
        ("empty", pair(prompt="?!")),
        ("broken_turns", pair(chosen="Sure.<|im_end|>")),
        ("broken_turns", pair(prompt="[INST] Where is it? [/INST]")),
        ("broken_turns", pair(rejected="Yes.\n\nHuman: and now?")),
        ("broken_turns", pair(chosen="```python\nprint(1)")),
        ("judged_unsafe", pair(meta={"chosen_p_safe": 0.249})),
        ("refused_helpful", pair(chosen="I'm sorry, but I can't help with that.", category=HELPFUL)),
        ("rejected_refusal", pair(rejected="I can't help you with that.")),
        ("truncated", pair(chosen=f"{LONG} and then the")),
        ("pii", pair(chosen="Write to bob.smith@example.com then.")),
        ("secrets", pair(chosen="The key is AKIAIOSFODNN7EXAMPLZ, use it.")),
    ],
)
def test_a_rule_finds_its_fault_and_nothing_else(rule: str, faulty: PreferencePair) -> None:
    sound = [
        pair("x", meta={"chosen_p_safe": 0.25}),
        pair("y", "How are you 🙂?", "🙂"),
        pair("z", chosen=f"{LONG}.", rejected="```js\n1\n``` is code."),
        pair("w", chosen="I can't help you with that.", rejected="I won't help you."),
    ]
    done = clean([*sound, replace(faulty, id="bad")], only(rule))
    assert [finding.record.id for finding in done.findings] == ["bad"]
    assert done.dropped == {rule: 1}
    assert [record.id for record in done.kept] == ["x", "y", "z", "w"]
    marked = clean([*sound, faulty], only(rule, "mark"))
    assert len(marked.kept) == 5
    assert marked.kept[-1].meta["flags"] == [rule]
    assert (marked.dropped, marked.marked) == ({}, {rule: 1})


def test_language_by_its_code() -> None:
    german = pair(
        "de", "Wo liegt der Bahnhof, bitte?", "Gehen Sie geradeaus und dann nach links, dort ist er."
    )
    english = pair(
        "en", "Where is the railway station, please?", "Go straight on and then to the left, there it is."
    )
    config = only("language", languages=["en"])
    assert [record.id for record in clean([german, english], config).kept] == ["en"]


def test_the_first_of_exact_duplicates_is_kept() -> None:
    records = [pair("a"), pair("b", "where is it"), pair("c", chosen="Elsewhere.")]
    done = clean(records, only("exact_duplicates"))
    assert [record.id for record in done.kept] == ["a", "c"]
    assert done.findings[0].detail == "repeats a"


def test_every_record_of_a_contradiction_goes() -> None:
    one = pair("a", chosen="Yes.", rejected="No.")
    other = pair("b", chosen="No.", rejected="Yes.")
    done = clean([one, other, pair("c")], only("contradictions"))
    assert [record.id for record in done.kept] == ["c"]
    prompt = one.prompt
    judged = [
        LabelledExchange("a", prompt, "Yes.", "S1", safe=True),
        LabelledExchange("b", prompt, "yes", "S1", safe=False),
        LabelledExchange("c", prompt, "no", "S1", safe=False),
    ]
    assert [record.id for record in clean(judged, only("contradictions")).kept] == ["c"]


def test_near_duplicates_from_the_stated_similarity_on() -> None:
    changed = LONG.replace("word30 ", "other ")  # 3 of 58 three-word runs differ: 55 / 61
    assert list(near_duplicates([LONG, changed, "something else"], 0.9)) == [(1, 0, pytest.approx(55 / 61))]
    assert list(near_duplicates([LONG, changed], 0.91)) == []


@settings(deadline=None, max_examples=25, database=None)
@given(st.lists(st.text("abc ", min_size=1, max_size=12), max_size=20), st.floats(0.5, 1))
def test_whatever_is_reported_is_that_similar_to_one_that_is_kept(
    texts: list[str], similarity: float
) -> None:
    found = list(near_duplicates(texts, similarity))
    repeated = {index for index, _, _ in found}
    for index, earlier, measured in found:
        assert earlier < index
        assert earlier not in repeated
        assert similarity <= measured <= 1
    kept = [text.split() for i, text in enumerate(texts) if i not in repeated]
    assert len(kept) == len({tuple(words) for words in kept})  # equal texts have equal signatures


def test_p_safe_of_a_judge_and_where_there_is_none() -> None:
    config = only("judged_unsafe", p_safe="judge")
    done = clean([pair("a"), pair("b")], config, lambda prompts, answers: [0.1, None])
    assert [record.id for record in done.kept] == ["b"]
    with pytest.raises(DataError, match="there is no judge here"):
        clean([pair()], config)
    with pytest.raises(DataError, match="chosen_p_safe, which no pair has"):
        clean([pair()], only("judged_unsafe"))
    with pytest.raises(DataError, match=r"a: chosen_p_safe: found 7, expected a number in \[0, 1\]"):
        clean([pair(meta={"chosen_p_safe": 7})], only("judged_unsafe"))


def test_cleaning_in_a_run_is_counted_and_an_empty_rest_is_an_error(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {i}?", "chosen": "No.", "rejected": "Sure.", "category": "S2"} for i in range(3)
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "chosen": "!!"}]))
    config = DataConfig(source="jsonl", path=str(path), cleaning=CleaningConfig(enabled=True))
    data = load_data(config, 0)
    assert len(data.safety_pairs) == 3
    assert data.counts["left out: cleaning, empty"] == 1
    assert data.preparations["jsonl"].dropped == {"empty": 1}
    path.write_text(json.dumps({**rows[0], "chosen": "!!"}) + "\n")
    with pytest.raises(DataError, match=r"left none of 1 records \(empty 1\).*data\.cleaning\.empty=mark"):
        load_data(config, 0)
