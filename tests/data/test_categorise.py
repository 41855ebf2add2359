import json
from pathlib import Path

import numpy as np
import pytest

from equipoise.data.categorise import CategoryClassifier, Guess, categorise
from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.records import Records
from equipoise.data.schema import HELPFUL, PreferencePair, Turn
from equipoise.data.sources import load_data


def turns(text: str) -> tuple[Turn, ...]:
    return ({"role": "user", "content": text},)


WORDS = {"S1": "alpha beta gamma delta", "S2": "kappa lambda omega sigma"}


def labelled(number: int = 12) -> list[tuple[tuple[Turn, ...], str]]:
    texts = {
        c: [f"{w.split()[i % 4]} {w.split()[(i + 1) % 4]} number {i}" for i in range(number)]
        for c, w in WORDS.items()
    }
    return [(turns(text), category) for category, of in texts.items() for text in of]


def fitted() -> CategoryClassifier:
    return CategoryClassifier([p for p, _ in labelled()], [c for _, c in labelled()], 0.5)


def test_what_is_plain_is_learnt_and_its_accuracy_is_told() -> None:
    classifier = fitted()
    assert classifier.categories == ["S1", "S2"]
    assert classifier.accuracy == 1.0
    assert [of.num_prompts for of in classifier.accuracies] == [12, 12]
    guesses = classifier([turns("alpha beta"), turns("omega sigma")])
    assert [guess.category for guess in guesses] == ["S1", "S2"]
    assert all(guess.confidence is not None and 0.5 < guess.confidence <= 1 for guess in guesses)


def test_noise_has_no_confidence() -> None:
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    prompts = [turns(" ".join(generator.choice(words, 8))) for _ in range(60)]
    classifier = CategoryClassifier(prompts, ["S1", "S2"] * 30, 0.5)
    assert classifier.accuracy < 0.75
    confidence = np.mean([guess.confidence for guess in classifier(prompts[:0] or [turns("w1 w2 unseen")])])
    assert confidence < 0.75


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least two categories with 5 different prompts each; found"):
        CategoryClassifier([turns("a"), turns("b")], ["S1", "S2"], 0.5)


def test_a_guess_is_kept_beside_the_category_and_only_sure_hazards_are_given() -> None:
    pairs = [PreferencePair(str(i), turns(f"q{i}"), "No.", "Yes.", "OTHER") for i in range(4)]
    pairs.append(PreferencePair("known", turns("q"), "No.", "Yes.", "S3"))
    records = Records(pairs=pairs)
    guesses = [Guess("S1", 0.9), Guess("S1", 0.4), Guess(HELPFUL, 0.9), Guess("S2", None)]
    categorise(records, lambda prompts, answers: guesses, 0.5)
    assert [pair.category for pair in records.pairs] == ["S1", "OTHER", "OTHER", "S2", "S3"]
    assert records.pairs[1].meta == {"category_guess": "S1", "category_confidence": 0.4}
    assert records.pairs[4].meta == {}
    assert records.notes == {"given a category": 2, "stay in OTHER: no category was certain": 2}


def test_a_run_fits_on_the_users_file_and_names_a_line_without_a_category(tmp_path: Path) -> None:
    examples = tmp_path / "labelled.jsonl"
    rows = [{"prompt": prompt[0]["content"], "category": category} for prompt, category in labelled()]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = tmp_path / "p.jsonl"
    pairs.write_text(json.dumps({"prompt": "gamma delta please", "chosen": "No.", "rejected": "Yes."}) + "\n")
    config = DataConfig(
        source="jsonl", path=str(pairs), categorise="classifier", categorise_from=str(examples)
    )
    assert load_data(config, 0).safety_pairs[0].category == "S1"
    examples.write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(DataError, match=r"labelled\.jsonl:1: category: is missing"):
        load_data(config, 0)
