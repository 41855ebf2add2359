"""Splits and crosswalks hold for any records and labels, not for the examples alone."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.crosswalk import crosswalk, crosswalk_names
from equipoise.data.schema import Exchange
from equipoise.data.splits import normalise_prompt, split_by_prompt, unit_hash
from equipoise.data.taxonomy import OTHER, load_taxonomy

TEXTS = st.text(max_size=30)
RECORDS = st.lists(TEXTS, max_size=30).map(
    lambda texts: [
        Exchange(str(i), ({"role": "user", "content": text},), "S1") for i, text in enumerate(texts)
    ]
)
FRACTIONS = st.floats(0, 1, exclude_max=True)
SEEDS = st.integers(0, 10**6)

settings.register_profile("suite", deadline=None, max_examples=60, database=None)
settings.load_profile("suite")


def ids(records: list[Exchange]) -> list[str]:
    return [record.id for record in records]


@given(RECORDS, FRACTIONS, SEEDS)
def test_every_record_is_on_one_side_and_every_prompt_on_one_side(
    records: list[Exchange], fraction: float, seed: int
) -> None:
    training, held_out = split_by_prompt(records, fraction, seed)
    assert sorted(ids(training) + ids(held_out), key=int) == ids(records)
    prompts = [{normalise_prompt(record.prompt) for record in side} for side in (training, held_out)]
    assert not prompts[0] & prompts[1]


@given(RECORDS, RECORDS, FRACTIONS, SEEDS)
def test_a_prompt_keeps_its_side_when_data_is_added_and_reordered(
    records: list[Exchange], added: list[Exchange], fraction: float, seed: int
) -> None:
    added = [dataclasses.replace(record, id=f"new{record.id}") for record in added]
    alone = split_by_prompt(records, fraction, seed)[1]
    together = split_by_prompt([*added, *reversed(records)], fraction, seed)[1]
    assert set(ids(alone)) == {id for id in ids(together) if not id.startswith("new")}


@given(RECORDS, FRACTIONS, FRACTIONS, SEEDS)
def test_a_larger_fraction_holds_out_what_a_smaller_one_does(
    records: list[Exchange], one: float, other: float, seed: int
) -> None:
    smaller, larger = sorted((one, other))
    held_out = [set(ids(split_by_prompt(records, fraction, seed)[1])) for fraction in (smaller, larger)]
    assert held_out[0] <= held_out[1]


@given(TEXTS, SEEDS)
def test_the_hash_is_a_share_and_the_same_for_what_counts_as_the_same_prompt(text: str, seed: int) -> None:
    assert 0 <= unit_hash(text, seed) < 1
    # With a word in it: of a prompt of nothing but punctuation, the punctuation counts.
    assert unit_hash(f"  Say {text}! ", seed) == unit_hash(f"sAY {text}", seed)


def test_the_held_out_share_is_the_one_asked_for() -> None:
    held_out = sum(unit_hash(f"prompt {number}", seed=5) < 0.2 for number in range(5000))
    assert abs(held_out / 5000 - 0.2) < 4 * (0.2 * 0.8 / 5000) ** 0.5


@given(st.sampled_from(crosswalk_names()), st.data())
def test_a_label_in_any_spelling_goes_to_its_categories_and_back(name: str, data: st.DataObject) -> None:
    walk = crosswalk(name)
    label = data.draw(st.sampled_from(walk.labels))
    spelled = data.draw(
        st.sampled_from([label, label.upper(), label.lower(), f" {label} ", label.replace(" ", "_")])
    )
    assert walk.label(spelled) == label
    for category in walk.map(spelled):
        assert label in walk.labels_of(category)


@given(st.sampled_from(crosswalk_names()), st.data())
def test_the_category_of_several_labels_is_one_of_theirs_in_any_order(name: str, data: st.DataObject) -> None:
    walk = crosswalk(name)
    labels = data.draw(st.lists(st.sampled_from(walk.labels), max_size=5))
    category = walk.category(labels)
    meant = [walk.map(label)[0] for label in labels if walk.map(label)]
    if not meant:
        assert category is None
    elif all(target == OTHER for target in meant):
        assert category == OTHER
    else:
        assert category in set(meant) - {OTHER}
        assert category in load_taxonomy()
    assert walk.category(data.draw(st.permutations(labels))) == category
