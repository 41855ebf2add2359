"""The area under the ROC curve: how often a positive scores above a negative."""

from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm


def auroc_interval(
    positive: NDArray,
    negative: NDArray,
    positive_prompts: Iterable[Hashable] | None = None,
    negative_prompts: Iterable[Hashable] | None = None,
) -> tuple[float, float, float]:
    """AUROC with its 95 % interval, from scores `(P,)` of positives and `(N,)` of negatives; ties count half.

    The variance is DeLong's (1988), or with the prompts Obuchowski's for several answers to one (1997, Biometrics 53,
    equation 3; the same where all prompts differ); the interval is built on the logit scale, so that it stays in
    [0, 1]. Degenerate cases get (0, 1) as interval: fewer than two prompts of either kind, or a perfect separation.
    """
    wins = (positive[:, None] > negative).astype(float) + 0.5 * (positive[:, None] == negative)
    auroc = float(wins.mean())
    first: list[Hashable] = list(range(len(positive))) if positive_prompts is None else list(positive_prompts)
    second: list[Hashable] = (
        list(range(len(positive), len(positive) + len(negative)))
        if negative_prompts is None
        else list(negative_prompts)
    )
    if min(len(set(first)), len(set(second))) < 2 or auroc in (0.0, 1.0):
        return auroc, 0.0, 1.0
    # By prompt, the summed deviations of its positives' and of its negatives' shares of wins.
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys([*first, *second]))}
    sums = np.zeros((2, len(prompts)))
    np.add.at(sums[0], [prompts[prompt] for prompt in first], wins.mean(axis=1) - auroc)
    np.add.at(sums[1], [prompts[prompt] for prompt in second], wins.mean(axis=0) - auroc)
    num = np.array([len(set(first)), len(set(second))])
    scaled = sums / np.array([[len(positive)], [len(negative)]])
    variance = float(
        (num / (num - 1) * (scaled**2).sum(axis=1)).sum()
        + 2 * len(prompts) / (len(prompts) - 1) * (scaled[0] * scaled[1]).sum()
    )
    if variance <= 0:
        return auroc, 0.0, 1.0
    centre = np.log(auroc / (1 - auroc))
    half = norm.ppf(0.975) * np.sqrt(variance) / (auroc * (1 - auroc))
    low, high = 1 / (1 + np.exp(-(centre - half))), 1 / (1 + np.exp(-(centre + half)))
    return auroc, float(low), float(high)
