from pathlib import Path

import pytest

from equipoise.data.crosswalk import crosswalk, crosswalk_names, read_crosswalk
from equipoise.data.errors import DataError
from equipoise.data.taxonomy import OTHER, load_taxonomy

SIZES = {
    "aegis2": 23,
    "ailuminate": 12,
    "beavertails": 14,
    "bingoguard": 11,
    "catqa": 11,
    "do_not_answer": 12,
    "do_not_answer_area": 5,
    "granite_guardian": 8,
    "harmbench": 7,
    "llama_guard": 14,
    "llama_guard_2": 11,
    "or_bench": 10,
    "pku_saferlhf": 19,
    "qwen3guard": 10,  # nine, and "None"
    "salad_category": 66,
    "salad_domain": 6,
    "salad_task": 16,
    "shieldgemma": 4,
    "strongreject": 6,
    "wildguard": 15,  # fourteen, and "benign"
}
HARMLESS = {("qwen3guard", "None"), ("wildguard", "benign")}


def test_every_taxonomy_is_complete() -> None:
    assert {name: len(crosswalk(name).labels) for name in crosswalk_names()} == SIZES


@pytest.mark.parametrize("name", SIZES)
def test_every_label_maps_or_says_that_it_means_no_harm(name: str) -> None:
    taxonomy = load_taxonomy()
    walk = crosswalk(name)
    for label in walk.labels:
        categories = walk.map(label)
        assert all(category in taxonomy for category in categories)
        assert len(set(categories)) == len(categories)
        assert bool(categories) != ((name, label) in HARMLESS)
        for category in categories:
            assert label in walk.labels_of(category)


def test_llama_guard_codes_are_the_canonical_ones_and_those_of_version_2_are_not() -> None:
    for category in load_taxonomy().hazards:
        assert crosswalk("llama_guard").map(category) == (category,)
    assert crosswalk("llama_guard_2").map("S9") == ("S10",)


def test_salad_codes_recur_at_every_level_and_o61_does_not_exist() -> None:
    assert crosswalk("salad_domain").label("O1") == "O1: Representation & Toxicity"
    assert crosswalk("salad_task").label("O1") == "O1: Toxic Content"
    assert crosswalk("salad_category").label("O1") == "O1: Hate Speech"
    codes = {label.split(":")[0] for label in crosswalk("salad_category").labels}
    assert codes == {f"O{number}" for number in range(1, 68)} - {"O61"}


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        ("pku_saferlhf", "white-collar crime", "White-Collar Crime"),
        ("bingoguard", "Violent crime", "Violent Crime"),
        ("bingoguard", "S8", "Weapon"),
        ("beavertails", "drug_abuse,weapons,banned_substance", "drug_abuse,weapons,banned_substance"),
        ("llama_guard", "S11", "S11: Suicide & Self-Harm"),
        ("llama_guard", "Self-Harm", "S11: Suicide & Self-Harm"),
        ("ailuminate", "spc_ele", "specialized_advice"),
    ],
)
def test_a_label_is_known_by_name_code_and_alias(name: str, text: str, label: str) -> None:
    assert crosswalk(name).label(text) == label


def test_an_unknown_label_is_named_with_what_looks_like_it() -> None:
    message = "'suicide and self-harm' is unknown to the crosswalk llama_guard; did you mean 'S11: Suicide & Self-Harm'"
    with pytest.raises(DataError, match=message):
        crosswalk("llama_guard").map("suicide and self-harm")


def test_of_several_labels_the_first_of_the_file_decides() -> None:
    walk = crosswalk("beavertails")
    assert walk.category(["violence,aiding_and_abetting,incitement", "child_abuse"]) == "S4"
    assert walk.category(["non_violent_unethical_behavior", "privacy_violation"]) == "S7"
    assert walk.category(["non_violent_unethical_behavior"]) == OTHER
    assert walk.category([]) is None
    assert crosswalk("qwen3guard").category(["None"]) is None


def test_a_hazard_beats_other_whatever_the_order() -> None:
    assert crosswalk("aegis2").category(["Needs Caution", "Illegal Activity", "Manipulation"]) == "S2"
    assert crosswalk("pku_saferlhf").category(["Psychological Harm", "Mental Manipulation"]) == OTHER


def test_an_unknown_crosswalk_is_named() -> None:
    with pytest.raises(DataError, match="no crosswalk 'pku'; shipped are aegis2, ailuminate"):
        crosswalk("pku")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("labels: {}", "expected `labels:`"),
        ("- a", "expected keys with values, found list"),
        (
            "labels: {a: S1}",
            r"labels.a: found 'S1', expected a list of categories out of S1, .*the word none",
        ),
        ("labels: {a: []}", r"labels.a: found \[\], expected"),
        ("labels: {a: [S99]}", r"labels.a: found \['S99'\], expected"),
        ("labels: {a b: [S1], A_B: [S2]}", "labels.A_B: spelled like 'a b'"),
        ("labels: {a: [S1]}\naliases: {b: c}", "aliases.b: found 'c', expected one of the labels above"),
        ("labels: {a: [S1], c: [S2]}\naliases: {A: c}", "aliases.A: is a spelling of 'a' already"),
        ("labels: {a: [S1", "is not YAML in UTF-8"),
    ],
)
def test_a_crosswalk_that_cannot_be_used_says_why(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_crosswalk(path, load_taxonomy())
