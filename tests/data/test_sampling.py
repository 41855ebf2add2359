"""Balanced orders hold for any categories and numbers."""

from collections import Counter
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data.sampling import balanced_rows, category_shares, quotas, spread_evenly

settings.register_profile("suite", deadline=None, max_examples=60, database=None)
settings.load_profile("suite")

COUNTS = st.dictionaries(
    st.sampled_from([f"S{i}" for i in range(1, 15)]), st.integers(1, 40), min_size=1, max_size=8
)
TEMPERATURES = st.floats(0, 1)


@given(COUNTS)
def test_no_prefix_is_a_whole_draw_from_its_shares(numbers: dict[str, int]) -> None:
    order, total = spread_evenly(numbers), sum(numbers.values())
    assert Counter(order) == numbers
    bound = 1 - 1 / (2 * len(numbers) - 2) if len(numbers) > 1 else 0.0  # Tijdeman's theorem
    placed: Counter[str] = Counter()
    for position, category in enumerate(order, start=1):
        placed[category] += 1
        for name, number in numbers.items():
            assert abs(placed[name] - number / total * position) <= bound + 1e-6


@given(COUNTS, TEMPERATURES, st.integers(1, 500))
def test_quotas_are_the_shares_to_less_than_a_draw(
    counts: dict[str, int], temperature: float, num_draws: int
) -> None:
    shares = category_shares(counts, temperature)
    found = quotas(shares, num_draws)
    assert sum(found.values()) == num_draws
    assert all(abs(found[name] - share * num_draws) < 1 + 1e-6 for name, share in shares.items())


def test_shares_by_hand() -> None:
    counts = {"S1": 90, "S2": 10}
    assert category_shares(counts, 0.0) == {"S1": 0.9, "S2": 0.1}
    assert category_shares(counts, 1.0) == {"S1": 0.5, "S2": 0.5}
    half = category_shares(counts, 0.5)  # sqrt(90) : sqrt(10) = 3 : 1
    assert abs(half["S1"] - 0.75) < 1e-12
    assert quotas({"S1": 0.5, "S2": 0.3, "S3": 0.2}, 7) == {"S1": 4, "S2": 2, "S3": 1}  # 3.5, 2.1, 1.4


@given(COUNTS, TEMPERATURES, st.integers(0, 5))
def test_every_epoch_holds_every_category_its_quota_of_times_and_repeats_no_row_early(
    counts: dict[str, int], temperature: float, seed: int
) -> None:
    categories = [name for name, number in counts.items() for _ in range(number)]
    rows = range(100, 100 + len(categories))
    wanted = quotas(category_shares(counts, temperature), len(categories))
    order = list(islice(balanced_rows(rows, categories, temperature, seed), 3 * len(categories)))
    for epoch in range(3):
        drawn = order[epoch * len(categories) : (epoch + 1) * len(categories)]
        found = Counter(categories[row - 100] for row in drawn)
        assert found == +Counter(wanted)
    for name in counts:
        of = [row for row in order if categories[row - 100] == name]
        times = Counter(of).values()
        assert not of or max(times) - min([*times, *([0] * (len(times) < counts[name]))]) <= 1


@given(COUNTS, st.integers(0, 200))
def test_an_interrupted_order_goes_on_where_it_stopped(counts: dict[str, int], stop: int) -> None:
    categories = [name for name, number in counts.items() for _ in range(number)]
    whole = list(islice(balanced_rows(range(len(categories)), categories, 0.5, 1), stop + 50))
    again = balanced_rows(range(len(categories)), categories, 0.5, 1)
    assert list(islice(again, stop, stop + 50)) == whole[stop:]


def test_temperature_0_draws_every_row_once_an_epoch() -> None:
    categories = ["S1"] * 9 + ["S2"]
    order = list(islice(balanced_rows(range(10), categories, 0.0, 3), 20))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
