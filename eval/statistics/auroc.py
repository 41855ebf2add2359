"""The area under the ROC curve: how often a positive scores above a negative."""

from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
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
    [0, 1]. Where all or none of the pairs are in order there is no variance to estimate: the other end is Newcombe's
    (2006, Statistics in Medicine 25, method 5), with the prompts as sample sizes. (0, 1) for fewer than two prompts of
    either kind.
    """
    wins = (positive[:, None] > negative).astype(float) + 0.5 * (positive[:, None] == negative)
    auroc = float(wins.mean())
    first: list[Hashable] = list(range(len(positive))) if positive_prompts is None else list(positive_prompts)
    second: list[Hashable] = (
        list(range(len(positive), len(positive) + len(negative)))
        if negative_prompts is None
        else list(negative_prompts)
    )
    num_first, num_second = len(set(first)), len(set(second))
    if min(num_first, num_second) < 2:
        return auroc, 0.0, 1.0
    if auroc in (0.0, 1.0):
        end = _lowest_behind_perfection(num_first, num_second)
        return (1.0, end, 1.0) if auroc else (0.0, 0.0, 1 - end)
    # By prompt, the summed deviations of its positives' and of its negatives' shares of wins.
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys([*first, *second]))}
    sums = np.zeros((2, len(prompts)))
    np.add.at(sums[0], [prompts[prompt] for prompt in first], wins.mean(axis=1) - auroc)
    np.add.at(sums[1], [prompts[prompt] for prompt in second], wins.mean(axis=0) - auroc)
    num = np.array([num_first, num_second])
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


def _lowest_behind_perfection(num_positive: int, num_negative: int) -> float:
    """The AUROC θ below 1 with 1 - θ = z sqrt(V(θ)), V after Hanley and McNeil with the mean of both sample sizes."""
    size = (num_positive + num_negative) / 2 - 1
    z = float(norm.ppf(0.975))

    def excess(theta: float) -> float:
        spread = 1 + size * (1 - theta) / (2 - theta) + size * theta / (1 + theta)
        return (1 - theta) ** 2 - z * z * theta * (1 - theta) * spread / (num_positive * num_negative)

    # Divided by 1 - θ, which is a root of its own, it falls from 1 to below 0.
    return float(optimize.brentq(lambda theta: excess(theta) / (1 - theta), 0.0, 1 - 1e-9))
