import pytest

from equipoise.eval.judges.base import Verdict
from equipoise.eval.rates import Rate, gap_of
from equipoise.eval.statistics import IntervalMethod, rate_interval, wilson_interval
from equipoise.eval.statistics.rogan_gladen import JudgeErrors, rogan_gladen


def test_rate_counts_what_has_no_outcome_and_why() -> None:
    outcomes = [True, False, None, None, None, None]
    verdicts = [
        Verdict.UNSAFE,
        Verdict.SAFE,
        Verdict.UNPARSED,
        Verdict.FAILED,
        Verdict.OVERLONG,
        Verdict.SAFE,
    ]
    rate = Rate.of(outcomes, verdicts=verdicts)
    assert (rate.count, rate.n, rate.rate, rate.num_no_finding) == (1, 2, 0.5, 4)
    # The last one has a verdict, and nothing was said of what is counted (whether it is a refusal).
    assert (rate.num_unparsed, rate.num_failed, rate.num_overlong) == (1, 1, 1)
    assert rate.best_low == wilson_interval(1, 6)[0]
    assert rate.worst_high == wilson_interval(5, 6)[1]


def test_a_known_outcome_is_never_counted_as_missing() -> None:
    rate = Rate.of([True, False], verdicts=[Verdict.FAILED, Verdict.SAFE])
    assert (rate.n, rate.num_failed, rate.num_no_finding) == (2, 0, 0)


@pytest.mark.parametrize("method", list(IntervalMethod))
def test_the_interval_is_the_one_asked_for(method: IntervalMethod) -> None:
    rate = Rate.of([True] + [False] * 19, confidence=0.9, method=method)
    assert (rate.low, rate.high, rate.method) == (*rate_interval(1, 20, 0.9, method), method)


def test_several_answers_to_a_prompt_widen_the_interval() -> None:
    outcomes: list[bool | None] = [True] * 3 + [False] * 57
    prompts = [index // 3 for index in range(60)]
    alone, together = Rate.of(outcomes), Rate.of(outcomes, prompts=prompts)
    assert (alone.n_effective, together.n) == (60, 60)
    assert together.n_effective < 25
    assert together.rate == alone.rate
    assert together.high > alone.high
    assert Rate.of(outcomes, prompts=list(range(60))) == alone


def test_the_corrected_rate_is_beside_the_measured_one() -> None:
    errors = JudgeErrors(100, 90, 100, 80)
    rate = Rate.of([True] * 30 + [False] * 70 + [None] * 5, errors=errors)
    assert rate.rate == 0.3
    assert rate.corrected == rogan_gladen(30, 100, errors, 5)
    assert Rate.of([True]).corrected is None


def test_the_gap_of_rates_knows_what_is_missing() -> None:
    clear = [Rate.of([True] * 10 + [False] * 20), Rate.of([False] * 30)]
    unclear = [Rate.of([True] * 10 + [False] * 20 + [None] * 10), Rate.of([False] * 30)]
    assert gap_of(clear).gap == pytest.approx(1 / 3)
    assert gap_of(unclear).gap == pytest.approx(1 / 3)
    assert gap_of(unclear).high > gap_of(clear).high
    copied = [Rate.of([True] * 30 + [False] * 60, prompts=[i // 3 for i in range(90)]), clear[1]]
    assert gap_of(copied).high - gap_of(copied).low > 0.9 * (gap_of(clear).high - gap_of(clear).low)
