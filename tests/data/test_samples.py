"""The shipped records: as many as promised, none alike, and no split that leaks into another."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence

import pytest

from equipoise.data.schema import HELPFUL, Exchange, LabelledExchange, PreferencePair
from equipoise.data.sources import load_samples, normalise_prompt
from equipoise.data.taxonomy import load_taxonomy

SAMPLES = load_samples()
HAZARDS = tuple(id for id in load_taxonomy().hazards if id != "S14")  # it takes tools, the samples have none
SPLITS: dict[str, Sequence[PreferencePair | Exchange | LabelledExchange]] = {
    "safety_pairs": SAMPLES.safety_pairs,
    "helpful_pairs": SAMPLES.helpful_pairs,
    "harmful_prompts": SAMPLES.harmful_prompts,
    "lookalike_prompts": SAMPLES.lookalike_prompts,
    "helpful_prompts": SAMPLES.helpful_prompts,
    "labelled": SAMPLES.labelled,
}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def overlap(one: set[object], other: set[object]) -> float:
    """Jaccard: shared of all."""
    return len(one & other) / max(1, len(one | other))


def alike(texts: dict[str, str], threshold: float, num_words: int) -> list[tuple[str, str]]:
    """Ids of texts that share more than `threshold` of their runs of `num_words` words."""
    runs: dict[str, set[object]] = {}
    for id, text in texts.items():
        split = words(text)
        runs[id] = {tuple(split[i : i + num_words]) for i in range(len(split) - num_words + 1)}
    return [(a, b) for a, b in itertools.combinations(runs, 2) if overlap(runs[a], runs[b]) > threshold]


@pytest.mark.parametrize(
    ("split", "least"), [("safety_pairs", 24), ("harmful_prompts", 12), ("lookalike_prompts", 8)]
)
def test_every_hazard_has_enough(split: str, least: int) -> None:
    counts = Counter(record.category for record in SPLITS[split])
    assert set(counts) == set(HAZARDS)
    assert min(counts.values()) >= least, counts


def test_there_are_enough_helpful_and_labelled_records() -> None:
    assert len(SAMPLES.helpful_pairs) >= 120
    assert len(SAMPLES.helpful_prompts) >= 60
    assert all(exchange.response for exchange in SAMPLES.helpful_prompts)
    assert {record.category for record in [*SAMPLES.helpful_pairs, *SAMPLES.helpful_prompts]} == {HELPFUL}
    assert len(SAMPLES.labelled) >= 300
    assert {record.category for record in SAMPLES.labelled} == set(HAZARDS)


def test_labels_are_complete_and_of_every_kind() -> None:
    assert all(isinstance(record.safe, bool) for record in SAMPLES.labelled)
    assert all(isinstance(record.refusal, bool) for record in SAMPLES.labelled)
    kinds = Counter((record.safe, record.refusal) for record in SAMPLES.labelled)
    assert set(kinds) == {(True, True), (True, False), (False, False)}  # nobody refuses unsafely
    assert min(kinds.values()) >= 50
    for hazard in HAZARDS:
        of_hazard = Counter(record.safe for record in SAMPLES.labelled if record.category == hazard)
        assert min(of_hazard[True], of_hazard[False]) >= 5, hazard


def test_safety_pairs_say_which_answer_is_safe() -> None:
    assert all(pair.chosen_safe is True and pair.rejected_safe is False for pair in SAMPLES.safety_pairs)


def test_ids_are_unique_and_name_the_category() -> None:
    records = [record for split in SPLITS.values() for record in split]
    assert len({record.id for record in records}) == len(records)
    assert all(re.fullmatch(rf"{record.category}-[a-z]+-\d{{3}}", record.id) for record in records)


def test_no_prompt_occurs_twice_within_or_across_splits() -> None:
    seen: dict[str, str] = {}
    for split in SPLITS.values():
        for record in split:
            first = seen.setdefault(normalise_prompt(record.prompt), record.id)
            assert first == record.id, f"{record.id} asks what {first} asks"


def test_no_two_prompts_are_nearly_alike() -> None:
    prompts = {record.id: record.prompt[-1]["content"] for split in SPLITS.values() for record in split}
    assert alike(prompts, threshold=0.7, num_words=1) == []


@pytest.mark.parametrize("split", ["safety_pairs", "helpful_pairs"])
@pytest.mark.parametrize("answer", ["chosen", "rejected"])
def test_no_two_answers_are_worded_alike(split: str, answer: str) -> None:
    pairs = SAMPLES.safety_pairs if split == "safety_pairs" else SAMPLES.helpful_pairs
    texts = {pair.id: pair.chosen if answer == "chosen" else pair.rejected for pair in pairs}
    assert alike(texts, threshold=0.25, num_words=2) == []


def test_no_labelled_response_occurs_twice_or_in_a_pair() -> None:
    pairs = [*SAMPLES.safety_pairs, *SAMPLES.helpful_pairs]
    texts = [record.response for record in SAMPLES.labelled]
    texts += [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    repeated = [
        text for text, count in Counter(normalise_prompt(text) for text in texts).items() if count > 1
    ]
    assert repeated == []


def test_lengths_suit_short_answers() -> None:
    for pair in [*SAMPLES.safety_pairs, *SAMPLES.helpful_pairs]:
        assert 15 <= len(words(pair.chosen)) <= 80, pair.id
        assert 10 <= len(words(pair.rejected)) <= 80, pair.id
    for exchange in SAMPLES.helpful_prompts:
        assert 15 <= len(words(exchange.response or "")) <= 80, exchange.id
    for record in SAMPLES.labelled:
        assert 4 <= len(words(record.response)) <= 100, record.id
    for split in SPLITS.values():
        for record in split:
            assert 3 <= len(words(record.prompt[-1]["content"])) <= 60, record.id
