"""Fit a head of the embedded judge on labelled answers, and measure it on answers it has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from equipoise.data.schema import Turn
from equipoise.data.sources import normalise_prompt
from equipoise.eval.judges.calibration import calibration_entry
from equipoise.eval.judges.embedded import Head

INVERSE_PENALTY = 1e-3
"""scikit-learn's C, on standardised features."""
PHRASE_SCALE = {"unsafe": 5.0, "refusal": 20.0}
"""The phrase indicator counts as this many standard deviations: the penalty would shrink it to nothing otherwise."""
NUM_FOLDS = 5


@dataclass(frozen=True)
class Row:
    """One labelled answer; a label nobody gave is None."""

    prompt: tuple[Turn, ...]
    response: str
    unsafe: bool | None
    refusal: bool | None

    def label(self, head: str) -> bool | None:
        """The label that `head` learns."""
        return self.unsafe if head == "unsafe" else self.refusal


@dataclass(frozen=True)
class Source:
    """The rows of one data set; sources weigh the same in the fit, whatever their size."""

    name: str
    rows: list[Row]
    origin: str
    """Who wrote the answers. Sources of one origin are left out together: their style would give each other away."""

    def labels(self, head: str) -> tuple[NDArray, NDArray]:
        """Indices of the rows with a label for `head`, and those labels."""
        known = [(i, row.label(head)) for i, row in enumerate(self.rows) if row.label(head) is not None]
        return np.array([i for i, _ in known], dtype=int), np.array([label for _, label in known], dtype=bool)

    def prompts(self) -> list[str]:
        """The rows' normalised prompts: what two sources must not share if one is to test the other."""
        return [normalise_prompt(row.prompt) for row in self.rows]


@dataclass(frozen=True)
class Features:
    """What the heads see of a source: hidden states `(N, F)` and the phrase indicator `(N,)`."""

    hidden: NDArray
    phrase: NDArray


Part = tuple[Features, NDArray, NDArray]
"""Features of a source, the row indices to use, and their labels."""


def fit_head(parts: Sequence[Part], phrase_scale: float) -> Head:
    """A logistic regression in which every source, and in it either label, weighs the same."""
    hidden = np.concatenate([features.hidden[rows] for features, rows, _ in parts])
    phrase = np.concatenate([features.phrase[rows] for features, rows, _ in parts])
    label = np.concatenate([labels for _, _, labels in parts])
    weight = np.concatenate(
        [np.where(y, 0.5 / max(y.mean(), 1e-9), 0.5 / max(1 - y.mean(), 1e-9)) / len(y) for *_, y in parts]
    )
    mean, deviation = hidden.mean(axis=0), hidden.std(axis=0) + 1e-6
    design = np.hstack([(hidden - mean) / deviation, phrase_scale * phrase[:, None]])
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=1000)
    model.fit(design, label, sample_weight=weight * len(label) / len(parts))
    coefficients = model.coef_[0]
    raw = coefficients[:-1] / deviation
    return Head(
        weight=torch.tensor(raw, dtype=torch.float32),
        bias=float(model.intercept_[0] - raw @ mean),
        phrase_weight=float(coefficients[-1] * phrase_scale),
        threshold=0.5,
    )


def predict(head: Head, features: Features, rows: NDArray) -> NDArray:
    """Probabilities `(len(rows),)` of the rows of `features` with these indices."""
    hidden, phrase = torch.tensor(features.hidden[rows]).float(), torch.tensor(features.phrase[rows]).float()
    return head.probabilities(hidden, phrase).double().numpy()


def best_threshold(results: Sequence[tuple[NDArray, NDArray]]) -> float:
    """The threshold with the highest mean over sources of sensitivity and specificity, out of fold."""
    grid = np.arange(5, 96) / 100
    values = [np.mean([_mean_rate(y, p, threshold) for y, p in results]) for threshold in grid]
    return float(grid[int(np.argmax(values))])


def _mean_rate(label: NDArray, score: NDArray, threshold: float) -> float:
    """The mean of sensitivity and specificity, or the one of them that the labels allow."""
    rates = [hits.mean() for hits in (score[label] >= threshold, score[~label] < threshold) if len(hits)]
    return float(np.mean(rates))


def out_of_fold(
    sources: Sequence[Source], parts: Sequence[Part], phrase_scale: float, origin: str | None = None
) -> list[NDArray]:
    """Probabilities for each source's labelled rows by heads that saw no row with the same prompt.

    With an origin: by heads that saw none of its sources either; those of the others are not asked for and stay NaN.
    """
    ids: dict[str, int] = {}
    named = [[ids.setdefault(name, len(ids)) for name in source.prompts()] for source in sources]
    groups = [
        np.array([names[i] for i in rows], dtype=int)
        for names, (_, rows, _) in zip(named, parts, strict=True)
    ]
    asked = [origin is None or source.origin == origin for source in sources]
    learnt = [origin is None or source.origin != origin for source in sources]
    found = [np.full(len(rows), np.nan) for _, rows, _ in parts]
    for held in _folds(
        np.concatenate([group for group, yes in zip(groups, asked, strict=True) if yes]),
        {prompt for group, yes in zip(groups, learnt, strict=True) if yes for prompt in group},
    ):
        kept = [
            (features, rows[~np.isin(group, held)], labels[~np.isin(group, held)])
            for (features, rows, labels), group, yes in zip(parts, groups, learnt, strict=True)
            if yes
        ]
        kept = [part for part in kept if len(part[1])]
        if len({bool(label) for *_, labels in kept for label in labels}) < 2:
            continue
        head = fit_head(kept, phrase_scale)
        for n, (features, rows, _) in enumerate(parts):
            here = np.isin(groups[n], held)
            if asked[n] and here.any():
                found[n][here] = predict(head, features, rows[here])
    return found


def _folds(asked: NDArray, learnt: set[int]) -> list[NDArray]:
    """The prompts to hold out in turn: all of them at once where they are few, or none of them is learnt from."""
    prompts = set(asked)
    if len(prompts) < NUM_FOLDS or prompts.isdisjoint(learnt):
        return [asked]
    return [asked[outside] for _, outside in GroupKFold(NUM_FOLDS).split(asked, groups=asked)]


def fit_and_measure(
    head_name: str, fitted: Sequence[tuple[Source, Features]], measured: Sequence[tuple[Source, Features]]
) -> tuple[Head, list[dict[str, object]]]:
    """Fit one head; measure it by cross-validation, without each origin in turn, and on sets never fitted on.

    No measurement uses a head that was fitted on the same prompt, in whatever source. The threshold is chosen on
    the out-of-fold probabilities of all fitted sources.
    """
    scale = PHRASE_SCALE[head_name]
    usable = [(source, (features, *source.labels(head_name))) for source, features in fitted]
    usable = [(source, part) for source, part in usable if len(part[1])]
    sources, parts = [source for source, _ in usable], [part for _, part in usable]
    folds = out_of_fold(sources, parts, scale)
    threshold = best_threshold([(labels, p) for (_, _, labels), p in zip(parts, folds, strict=True)])
    foreign = {
        origin: out_of_fold(sources, parts, scale, origin)
        for origin in dict.fromkeys(source.origin for source in sources)
    }

    entries = []
    for n, (source, (_, _, labels)) in enumerate(usable):
        protocol = f"{NUM_FOLDS}-fold by prompt"
        entries.append(calibration_entry(source.name, head_name, protocol, True, labels, folds[n], threshold))
        found = foreign[source.origin][n]
        told = ~np.isnan(found)  # nothing is left to fit on where others have no row on another prompt
        if told.any():
            protocol = "fitted without its origin"
            entries.append(
                calibration_entry(
                    source.name, head_name, protocol, False, labels[told], found[told], threshold
                )
            )

    head = replace(fit_head(parts, scale), threshold=threshold)
    seen = {prompt for source in sources for prompt in source.prompts()}
    for source, features in measured:
        _, rows, labels = _without(source, (features, *source.labels(head_name)), seen)
        if len(rows):
            found = predict(head, features, rows)
            protocol = "never fitted on"
            entries.append(
                calibration_entry(source.name, head_name, protocol, False, labels, found, threshold)
            )
    return head, entries


def _without(source: Source, part: Part, excluded: set[str]) -> Part:
    """The rows of `part` whose prompt is not among `excluded`."""
    features, rows, labels = part
    prompts = source.prompts()
    kept = np.array([prompts[i] not in excluded for i in rows], dtype=bool)
    return features, rows[kept], labels[kept]
