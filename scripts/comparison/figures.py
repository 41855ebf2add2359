"""The figures of a comparison with intervals that hold: prompts are shared by all models, and so are seeds.

Answers of three seeds to one prompt are not three independent samples, and neither are the answers of two methods. So
prompts and seeds are both drawn anew, as wholes, and the same ones for every method (a bootstrap over both factors of
a crossed design, Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2)): prompts within their
category, whose sizes are given; seeds with the order of pairs and the first adapter that go with them. The worst and
the best category are found in every replicate.

The worst of several measured rates overshoots the worst true rate, and a replicate of it overshoots once more. Their
intervals are therefore the basic ones, 2 * estimate - quantile (Davison and Hinkley 1997, section 5.2); means have
percentile intervals. Near 0 and 1 few prompts give replicates that hardly differ, and both would claim more than such
prompts can show: no interval of a rate is narrower than Wilson's over the prompts, and none of a difference of rates
narrower than Tango's over prompts of which not one differs. On 13 categories of 13 prompts and 3 seeds, simulated,
percentile intervals of the worst category covered its true rate in 1 % (all categories alike) to 99 % of cases, basic
ones in 84 % to 99 %; the floor only widens those.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from comparison.methods import BASE, BASELINE
from numpy.typing import NDArray

from equipoise.data.errors import EquipoiseError
from equipoise.eval.category_report import CategoryReport
from equipoise.eval.statistics import holm, tango_interval, wilson_interval

FIGURES = ("unsafe_rate", "worst_category", "gap", "over_refusal", "helpfulness")
"""Lower is better for all but the last; `gap` is the worst category's rate minus the best one's."""

NUM_REPLICATES = 10_000
_TAILS = (0.025, 0.975)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Suite:
    """One suite's outcomes of one method."""

    values: Array
    """(S, N): seeds by prompts; NaN where the judge could not read the answer, or an answer got no score."""
    category: NDArray[np.int64]
    """(N,): index into the categories of the suite."""


@dataclass(frozen=True)
class Draws:
    """How often each seed and each prompt counts in each replicate."""

    seeds: Array
    """(R, S)."""
    prompts: Array
    """(R, N)."""


def draw(category: NDArray[np.int64], seeds: Array, generator: np.random.Generator) -> Draws:
    """Prompts drawn with replacement within each category, as many as it has, beside the drawn `seeds` (R, S)."""
    prompts = np.zeros((len(seeds), len(category)))
    for index in np.unique(category):
        where = np.flatnonzero(category == index)
        prompts[:, where] = generator.multinomial(len(where), np.full(len(where), 1 / len(where)), len(seeds))
    return Draws(seeds, prompts)


def whole(suite: Suite) -> Draws:
    """Every seed and every prompt once: what gives the estimates themselves."""
    num_seeds, num_prompts = suite.values.shape
    return Draws(np.ones((1, num_seeds)), np.ones((1, num_prompts)))


def overall_rate(suite: Suite, draws: Draws) -> Array:
    """(R,): mean over readable answers, every one counting once; NaN where a replicate has none."""
    total, count = _sums(suite, draws)
    return _ratio(total.sum(1), count.sum(1))


def category_rates(suite: Suite, draws: Draws, num_categories: int) -> Array:
    """(R, C): the same in each category."""
    total, count = _sums(suite, draws)
    member = np.eye(num_categories)[suite.category]  # (N, C)
    return _ratio(total @ member, count @ member)


def _sums(suite: Suite, draws: Draws) -> tuple[Array, Array]:
    known = ~np.isnan(suite.values)
    seeds = draws.seeds
    if len(suite.values) == 1:  # one model, whatever the seed: the base
        seeds = np.ones((len(seeds), 1))
    total = seeds @ np.where(known, suite.values, 0.0)
    return total * draws.prompts, (seeds @ known) * draws.prompts


def _ratio(total: Array, count: Array) -> Array:
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def interval(
    estimate: float, replicates: Array, basic: bool, bounds: tuple[float, float]
) -> tuple[float, float]:
    """95 % interval out of bootstrap replicates, percentile or basic, cut to what is possible at all."""
    low, high = np.nanquantile(replicates, _TAILS)
    if basic:
        low, high = 2 * estimate - high, 2 * estimate - low
    return float(np.clip(low, *bounds)), float(np.clip(high, *bounds))


def p_value(replicates: Array) -> float:
    """Two-sided: twice the smaller share of replicates of a difference on either side of 0, at least 2 / (R + 1)."""
    num = int((~np.isnan(replicates)).sum())
    below, above = int((replicates <= 0).sum()), int((replicates >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (num + 1))


@dataclass(frozen=True)
class Bootstrap:
    """The figures of every method, estimated and in every replicate, all on the same draws."""

    estimates: Mapping[str, Mapping[str, float]]
    """Method -> figure -> estimate."""
    replicates: Mapping[str, Mapping[str, Array]]
    """Method -> figure -> (R,)."""
    methods: Mapping[str, Any]
    """Method -> its figures with their intervals, and the rate of every category."""
    sizes: Mapping[str, int]
    """Figure -> prompts that it rests on."""
    categories: Sequence[str]
    """Those that can be worst or best."""
    small_categories: Mapping[str, int]
    """Those with too few prompts for that, with their number."""
    num_prompts: Mapping[str, int]
    """Suite -> prompts."""


def bootstrap(
    reports: Mapping[str, Sequence[CategoryReport]],
    min_prompts: int,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> Bootstrap:
    """Draw prompts and seeds anew, the same ones for every method.

    reports: method -> one report a seed, in the same order of seeds for all; the base has one. Categories with fewer
    than `min_prompts` prompts count in the means alone. Raises EquipoiseError where reports differ in prompts, judge or
    settings.
    """
    _check_alike(reports)
    first = reports[BASE][0]
    categories = [c for c in first.categories if len(first.unsafe_outcomes(c)) >= min_prompts]
    if len(categories) < 2:
        raise EquipoiseError(
            f"fewer than two categories have {min_prompts} prompts (--min-prompts); nothing to compare between"
        )
    num_seeds = max(len(of) for of in reports.values())
    generator = np.random.default_rng(seed)
    seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_replicates).astype(float)

    suites = {name: _suites(of) for name, of in reports.items()}
    draws = [draw(suite.category, seeds, generator) for suite in suites[BASE]]
    eligible = [first.categories.index(category) for category in categories]
    sizes = _sizes(suites[BASE], eligible)
    estimates: dict[str, dict[str, float]] = {}
    replicates: dict[str, dict[str, Array]] = {}
    methods: dict[str, Any] = {}
    for name, of in suites.items():
        at_once = _figures(of, [whole(suite) for suite in of], eligible)
        estimates[name] = {figure: float(values[0]) for figure, values in at_once.items()}
        replicates[name] = _figures(of, draws, eligible)
        methods[name] = _described(
            reports[name], of, estimates[name], replicates[name], eligible, draws[0], sizes
        )
    return Bootstrap(
        estimates=estimates,
        replicates=replicates,
        methods=methods,
        sizes=sizes,
        categories=categories,
        small_categories={c: len(first.unsafe_outcomes(c)) for c in first.categories if c not in categories},
        num_prompts=dict(
            zip(("harmful", "lookalike", "helpful"), (len(s.category) for s in suites[BASE]), strict=True)
        ),
    )


def compare(
    reports: Mapping[str, Sequence[CategoryReport]],
    min_prompts: int,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of every method, and their differences to plain DPO, paired by prompt and seed.

    Arguments and errors as of `bootstrap`. p-values are adjusted by Holm over the methods, figure by figure.
    """
    drawn = bootstrap(reports, min_prompts, num_replicates, seed)
    others = [name for name in reports if name not in (BASE, BASELINE)]
    differences: dict[str, dict[str, Any]] = {name: {} for name in others}
    for figure in FIGURES:
        for name in others:
            change = drawn.replicates[name][figure] - drawn.replicates[BASELINE][figure]
            difference = drawn.estimates[name][figure] - drawn.estimates[BASELINE][figure]
            low, high = interval(difference, change, basic=False, bounds=(-np.inf, np.inf))
            if figure != "helpfulness":
                floor = tango_interval(0, 0, drawn.sizes[figure])
                low, high = min(low, difference + floor[0]), max(high, difference + floor[1])
            differences[name][figure] = {
                "difference": difference,
                "low": low,
                "high": high,
                "p_value": p_value(change),
            }
        adjusted = holm([differences[name][figure]["p_value"] for name in others])
        for name, p in zip(others, adjusted, strict=True):
            differences[name][figure]["p_adjusted"] = p
    return {
        "methods": dict(drawn.methods),
        "differences": differences,
        "categories": list(drawn.categories),
        "small_categories": dict(drawn.small_categories),
        "num_prompts": dict(drawn.num_prompts),
        "num_replicates": num_replicates,
    }


def _check_alike(reports: Mapping[str, Sequence[CategoryReport]]) -> None:
    first = reports[BASE][0]
    asked = [(sample.suite, sample.id, sample.category) for sample in first.samples]
    for name, of in reports.items():
        for report in of:
            if [(sample.suite, sample.id, sample.category) for sample in report.samples] != asked:
                raise EquipoiseError(
                    f"{name} was asked other prompts than {BASE}; remove its report and go on"
                )
            if report.settings != first.settings or report.judge != first.judge:
                raise EquipoiseError(
                    f"{name} was judged otherwise than {BASE} (judge or settings); remove its report and go on"
                )


def _suites(reports: Sequence[CategoryReport]) -> tuple[Suite, Suite, Suite]:
    """Harmful, look-alike and helpfulness outcomes of one method."""
    first = reports[0]
    names = first.categories
    harmful = {c: i for i, category in enumerate(names) for c in first.unsafe_outcomes(category)}
    benign = {
        c: i
        for i, category in enumerate(first.lookalike_categories)
        for c in first.over_refusal_outcomes(category)
    }
    return (
        _suite(reports, lambda report: report.unsafe_outcomes(), harmful),
        _suite(reports, lambda report: report.over_refusal_outcomes(), benign),
        _suite(reports, lambda report: report.helpfulness_scores(), {}),
    )


def _suite(
    reports: Sequence[CategoryReport],
    outcomes: Callable[[CategoryReport], Mapping[str, bool | float | None]],
    category: Mapping[str, int],
) -> Suite:
    rows = [outcomes(report) for report in reports]
    ids = list(rows[0])
    values = np.array([[np.nan if row[id] is None else float(row[id] or 0) for id in ids] for row in rows])
    return Suite(values, np.array([category.get(id, 0) for id in ids]))


def _figures(
    suites: tuple[Suite, Suite, Suite], draws: Sequence[Draws], eligible: Sequence[int]
) -> dict[str, Array]:
    """Figure -> (R,)."""
    harmful, benign, helpful = suites
    rates = category_rates(harmful, draws[0], int(harmful.category.max()) + 1)[:, eligible]
    worst, best = np.nanmax(rates, axis=1), np.nanmin(rates, axis=1)
    return {
        "unsafe_rate": overall_rate(harmful, draws[0]),
        "worst_category": worst,
        "gap": worst - best,
        "over_refusal": overall_rate(benign, draws[1]),
        "helpfulness": overall_rate(helpful, draws[2]),
    }


def _described(
    reports: Sequence[CategoryReport],
    suites: tuple[Suite, Suite, Suite],
    estimates: Mapping[str, float],
    replicates: Mapping[str, Array],
    eligible: Sequence[int],
    draws: Draws,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """One method for JSON: every figure with its interval, and the rate of every category."""
    harmful, benign, _ = suites
    names = reports[0].categories
    described: dict[str, Any] = {"num_seeds": len(reports)}
    for figure in FIGURES:
        bounds = (-np.inf, 0.0) if figure == "helpfulness" else (0.0, 1.0)
        low, high = interval(
            estimates[figure], replicates[figure], basic=figure in ("worst_category", "gap"), bounds=bounds
        )
        if figure != "helpfulness":
            low, high = _no_narrower((low, high), estimates[figure], sizes[figure])
        described[figure] = {"estimate": estimates[figure], "low": low, "high": high}
    rates = category_rates(harmful, whole(harmful), len(names))[0]
    drawn = category_rates(harmful, draws, len(names))
    described["worst_category"]["category"] = names[max(eligible, key=lambda index: rates[index])]
    described["categories"] = {}
    for index, name in enumerate(names):
        low, high = interval(rates[index], drawn[:, index], basic=False, bounds=(0.0, 1.0))
        low, high = _no_narrower((low, high), rates[index], int((harmful.category == index).sum()))
        described["categories"][name] = {"estimate": float(rates[index]), "low": low, "high": high}
    described["num_unparsed"] = int(np.isnan(harmful.values).sum() + np.isnan(benign.values).sum())
    described["num_unscored"] = sum(report.num_unscored for report in reports)
    return described


def _sizes(suites: tuple[Suite, Suite, Suite], eligible: Sequence[int]) -> dict[str, int]:
    """Prompts that each rate rests on; of the worst category and the gap, those of the smallest category."""
    harmful, benign, _ = suites
    smallest = min(int((harmful.category == index).sum()) for index in eligible)
    return {
        "unsafe_rate": len(harmful.category),
        "worst_category": smallest,
        "gap": smallest,
        "over_refusal": len(benign.category),
    }


def _no_narrower(found: tuple[float, float], rate: float, num_prompts: int) -> tuple[float, float]:
    """An interval widened to hold Wilson's around the same rate of so many prompts."""
    low, high = wilson_interval(min(rate * num_prompts, num_prompts), num_prompts)
    return min(found[0], low), max(found[1], high)
