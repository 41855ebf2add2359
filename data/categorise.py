"""Categories for records that come without: a linear classifier on the prompt's words and characters, or a judge."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from equipoise.data.config import DataConfig
from equipoise.data.crosswalk import find_crosswalk
from equipoise.data.errors import DataError
from equipoise.data.jsonl import Line, read_records
from equipoise.data.records import Records
from equipoise.data.schema import HELPFUL, LabelledExchange, PreferencePair, Turn
from equipoise.data.splits import normalise_prompt
from equipoise.data.taxonomy import OTHER

Record = TypeVar("Record", PreferencePair, LabelledExchange)

NUM_FOLDS = 5
MAX_CHARS = 2000
"""Of a conversation, from its end: what is asked stands there."""
BATCH = 2000
"""Prompts classified at a time."""


class Guess(NamedTuple):
    """A category and how sure its giver is of it; None: it does not say."""

    category: str
    confidence: float | None


Categoriser = Callable[[Sequence[Sequence[Turn]], Sequence[str]], Sequence[Guess]]
"""(prompts, the more harmful answer to each) -> a guess for each."""


@dataclass(frozen=True)
class CategoryAccuracy:
    """How a classifier does on the labelled prompts of one category that it was not fitted on."""

    category: str
    num_prompts: int
    recall: float
    """Share of this category's prompts that it is given to."""
    precision: float
    """Share of the prompts it is given to that are of this category; nan where there are none."""
    kept_rate: float
    """Share of this category's prompts with at least `min_confidence`."""
    kept_accuracy: float
    """Of those, share that is right; nan where there are none."""


class CategoryClassifier:
    """TF-IDF of words and of characters, logistic regression, its probabilities calibrated by one temperature."""

    def __init__(
        self, prompts: Sequence[Sequence[Turn]], categories: Sequence[str], min_confidence: float
    ) -> None:
        """Fit on labelled prompts, which are read once each; raises DataError where they are too few.

        Accuracies and the temperature come from `NUM_FOLDS`-fold cross-validation, without a prompt on both sides.
        """
        from sklearn.model_selection import StratifiedKFold, cross_val_predict  # here: it takes a second

        unique = {_text(prompt): c for prompt, c in zip(prompts, categories, strict=True)}
        counts = Counter(unique.values())
        self.left_out = {c: n for c, n in counts.items() if n < NUM_FOLDS}
        """Category -> prompts, of those with too few to be learnt."""
        unique = {text: c for text, c in unique.items() if c not in self.left_out}
        if len(set(unique.values())) < 2:
            raise DataError(
                f"data.categorise=classifier needs at least two categories with {NUM_FOLDS} different prompts each; "
                f"found {dict(counts)}."
            )
        texts, labels = list(unique), np.array(list(unique.values()))
        self._model = _pipeline()
        folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
        log_probs = _log(cross_val_predict(self._model, texts, labels, cv=folds, method="predict_proba"))
        self._model.fit(texts, labels)
        self.categories: list[str] = [str(c) for c in self._model.classes_]
        index = np.searchsorted(self._model.classes_, labels)
        self.temperature = _temperature(log_probs, index)
        self.accuracies = self._accuracies(_tempered(log_probs, self.temperature), index, min_confidence)

    @property
    def accuracy(self) -> float:
        """Share of all labelled prompts whose category is found, cross-validated."""
        total = sum(of.num_prompts for of in self.accuracies)
        return sum(of.recall * of.num_prompts for of in self.accuracies) / total

    def __call__(self, prompts: Sequence[Sequence[Turn]], answers: Sequence[str] = ()) -> list[Guess]:
        """The most probable category of each prompt, with its probability."""
        guesses: list[Guess] = []
        for start in range(0, len(prompts), BATCH):
            texts = [_text(prompt) for prompt in prompts[start : start + BATCH]]
            probs = _tempered(_log(self._model.predict_proba(texts)), self.temperature)
            best = probs.argmax(axis=1)
            guesses += [Guess(self.categories[b], float(row[b])) for b, row in zip(best, probs, strict=True)]
        return guesses

    def _accuracies(self, probs: Any, index: Any, min_confidence: float) -> list[CategoryAccuracy]:
        guessed, kept = probs.argmax(axis=1), probs.max(axis=1) >= min_confidence
        right = guessed == index
        return [
            CategoryAccuracy(
                category,
                num_prompts=int((index == i).sum()),
                recall=_mean(right[index == i]),
                precision=_mean(right[guessed == i]),
                kept_rate=_mean(kept[index == i]),
                kept_accuracy=_mean(right[(index == i) & kept]),
            )
            for i, category in enumerate(self.categories)
        ]


def fit_classifier(
    config: DataConfig, shipped: Sequence[PreferencePair | LabelledExchange]
) -> CategoryClassifier:
    """The classifier of a recipe: on the file of `categorise_from`, or on the `shipped` training records."""
    if config.categorise_from is not None:
        labelled = _labelled_prompts(config)
    else:
        labelled = [(record.prompt, record.category) for record in shipped]
    labelled = [(prompt, category) for prompt, category in labelled if category != OTHER]
    return CategoryClassifier([p for p, _ in labelled], [c for _, c in labelled], config.min_confidence)


def categorise(records: Records, categoriser: Categoriser, min_confidence: float) -> None:
    """Give a hazard to pairs and answers in OTHER; `meta.category_guess` and `category_confidence` keep the guess.

    A guess below min_confidence, or `helpful`, leaves a record in OTHER. All of it is counted in `records.notes`.
    """
    records.pairs = _categorised(records.pairs, categoriser, min_confidence, records.notes)
    records.labelled = _categorised(records.labelled, categoriser, min_confidence, records.notes)


def _categorised(
    group: Sequence[Record], categoriser: Categoriser, min_confidence: float, notes: Counter[str]
) -> list[Record]:
    without = [record for record in group if record.category == OTHER]
    answers = [r.rejected if isinstance(r, PreferencePair) else r.response for r in without]
    guesses = iter(categoriser([record.prompt for record in without], answers))
    categorised: list[Record] = []
    for record in group:
        if record.category != OTHER:
            categorised.append(record)
            continue
        guess = next(guesses)
        sure = guess.confidence is None or guess.confidence >= min_confidence
        given = guess.category if sure and guess.category != HELPFUL else OTHER
        meta = {**record.meta, "category_guess": guess.category, "category_confidence": guess.confidence}
        categorised.append(replace(record, category=given, meta=meta))
        notes["given a category" if given != OTHER else "stay in OTHER: no category was certain"] += 1
    return categorised


def _labelled_prompts(config: DataConfig) -> list[tuple[tuple[Turn, ...], str]]:
    assert config.categorise_from is not None
    walk = None if config.taxonomy is None else find_crosswalk(config.taxonomy)

    def parse(line: Line) -> tuple[tuple[Turn, ...], str]:
        line.crosswalk = walk
        if line.values.get("category") is None:
            line.problem("category", "is missing; every line has to name one")
        return line.prompt(), line.category()

    return read_records(Path(config.categorise_from).expanduser(), parse)


def _text(prompt: Sequence[Turn]) -> str:
    said = [turn for turn in prompt if turn["role"] == "user"]
    return normalise_prompt(said or prompt)[-MAX_CHARS:]


def _pipeline() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000, dtype=np.float32)
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, max_features=100_000, dtype=np.float32
    )
    # One against the rest by dual coordinate descent: seconds where the softmax of 15 x 100,000 weights takes minutes.
    linear = LogisticRegression(solver="liblinear", C=10.0, class_weight="balanced", random_state=0)
    return make_pipeline(make_union(words, characters), OneVsRestClassifier(linear))


def _temperature(log_probs: Any, index: Any) -> float:
    """The temperature that makes the labels most probable (Guo et al., 1706.04599, section 4.2)."""

    def nll(log_temperature: float) -> float:
        scaled = log_softmax(log_probs / np.exp(log_temperature), axis=1)
        return float(-scaled[np.arange(len(index)), index].mean())

    return float(np.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded").x))


def _tempered(log_probs: Any, temperature: float) -> Any:
    return np.exp(log_softmax(log_probs / temperature, axis=1))


def _log(probs: Any) -> Any:
    return np.log(np.clip(probs, 1e-9, 1.0))


def _mean(values: Any) -> float:
    return float(values.mean()) if len(values) else float("nan")
