import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def test_what_optuna_draws_from(sweeping: Any) -> None:
    pytest.importorskip("optuna")
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    parsed = sweeping("points").parse(
        [
            "recipe=tsdi",
            "beta=tag(log, interval(0.01, 0.5))",
            "lam=choice(1,2.5)",
            "a=range(1,9,2)",
            "seed=1,2",
        ]
    )
    assert sweeping("search").search_space(parsed) == {
        "beta": FloatDistribution(0.01, 0.5, log=True),
        "lam": CategoricalDistribution([1, 2.5]),
        "a": IntDistribution(1, 7, step=2),
    }


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_search_goes_on_where_it_was(
    sampler: str, sweeping: Any, make_report: Any, finish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four trials of two seeds, interrupted in the third; points are made up: larger lam is safer and less helpful."""
    pytest.importorskip("optuna")
    command, search = sweeping("command"), sweeping("search")
    num_run = 0

    def run_points(sweep: Any, options: argparse.Namespace, whole: Any) -> None:
        nonlocal num_run
        assert {str(point) for point in sweep.points} <= {str(point) for point in whole.points}
        assert whole.folder == sweep.folder
        for point in sweep.points:
            if point.done:
                continue
            if num_run == 5:
                num_run += 1
                raise KeyboardInterrupt
            num_run += 1
            lam = float(point.swept["lam"])
            finish(point, make_report({"S1": round(9 - lam), "S2": 2}, -lam / 10))

    monkeypatch.setattr(command, "run_points", run_points)
    arguments = ["recipe=tsdi", "lam=interval(1, 8)", "seed=1,2", "--optuna", "4", "--sampler", sampler]
    options = command.argument_parser("sweep").parse_intermixed_args(arguments)
    with pytest.raises(KeyboardInterrupt):
        search.search(options)
    study = search._study(SimpleNamespace(folder=Path("outputs/tsdi").resolve()), options)
    study.ask()  # and killed before it had drawn a value
    sweep = search.search(options)
    assert len(sweep.points) == 8
    assert all(point.done for point in sweep.points)
    assert num_run == 9  # eight points and the interruption: none was run twice
    assert search.search(options).points == sweep.points  # nothing is left to do
