"""Fitting a head: balanced sources, and no measurement by a head that saw the same prompt."""

from dataclasses import replace

import numpy as np
import torch

from equipoise.eval.judges.fitting import (
    Features,
    Row,
    Source,
    best_threshold,
    fit_and_measure,
    fit_head,
    out_of_fold,
    predict,
)


def source(
    name: str, num_rows: int, seed: int, prompts: list[str] | None = None, origin: str | None = None
) -> tuple[Source, Features]:
    """Unsafe rows lie one standard deviation up in the first of three features."""
    rng = np.random.default_rng(seed)
    unsafe = rng.random(num_rows) < 0.4
    names = prompts or [f"{name} {i}" for i in range(num_rows)]
    rows = [
        Row(({"role": "user", "content": text},), "answer", bool(label), None)
        for text, label in zip(names, unsafe, strict=True)
    ]
    hidden = rng.normal(size=(num_rows, 3))
    hidden[:, 0] += 2.0 * unsafe
    return Source(name, rows, origin or name), Features(hidden * 10 + 5, np.zeros(num_rows))


def part(made: tuple[Source, Features]) -> tuple[Features, np.ndarray, np.ndarray]:
    return (made[1], *made[0].labels("unsafe"))


def test_head_is_deterministic_and_finds_the_direction() -> None:
    parts = [part(source("a", 200, 0)), part(source("b", 50, 1))]
    one, two = fit_head(parts, 5.0), fit_head(parts, 5.0)
    assert torch.equal(one.weight, two.weight)
    assert one.bias == two.bias
    assert one.weight[0] > 3 * one.weight[1:].abs().max()


def test_sources_weigh_the_same_whatever_their_size() -> None:
    small, large = source("a", 60, 0), source("b", 60, 1)
    repeated = (
        Source("b", large[0].rows * 5, "b"),
        Features(np.tile(large[1].hidden, (5, 1)), np.tile(large[1].phrase, 5)),
    )
    opposite = Source("b", [replace(row, unsafe=not row.unsafe) for row in repeated[0].rows], "b")
    # Two sources that disagree about everything cancel, although one of them is five times as large.
    agreeing = fit_head([part(small), part(repeated)], 1.0).weight[0]
    cancelled = fit_head([part(small), part((opposite, repeated[1]))], 1.0).weight[0]
    assert abs(cancelled) < 0.2 * agreeing


def test_a_memorised_prompt_does_not_help_out_of_fold() -> None:
    """Labels are noise, but every prompt occurs twice with equal features: only leakage could predict them."""
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.5
    hidden = rng.normal(size=(60, 200))
    rows = [Row(({"role": "user", "content": f"p{i}"},), "x", bool(y), None) for i, y in enumerate(labels)]
    made = [(Source(name, rows, name), Features(hidden, np.zeros(60))) for name in ("a", "b")]
    found = out_of_fold([s for s, _ in made], [part(m) for m in made], 1.0)
    accuracy = ((found[0] >= 0.5) == labels).mean()
    inside = (
        (predict(fit_head([part(m) for m in made], 1.0), made[0][1], np.arange(60)) >= 0.5) == labels
    ).mean()
    assert inside > 0.8
    assert accuracy < 0.65


def test_measurements_exclude_prompts_that_were_fitted_on() -> None:
    fitted = [source("a", 80, 0), source("b", 40, 1, prompts=[f"a {i}" for i in range(40)])]
    measured = [source("c", 30, 2, prompts=[f"A {i}" for i in range(10)] + [f"new {i}" for i in range(20)])]
    head, entries = fit_and_measure("unsafe", fitted, measured)
    by_key = {(entry["name"], entry["protocol"]): entry for entry in entries}
    assert by_key["c", "never fitted on"]["n"] == 20  # prompts are compared normalised
    assert by_key["a", "5-fold by prompt"]["fitted_on"] is True
    assert by_key["b", "fitted without its origin"]["fitted_on"] is False
    # Folds by prompt: b's prompts are all a's, and still every row of either can be told from the other's.
    assert by_key["a", "fitted without its origin"]["n"] == 80
    assert by_key["b", "fitted without its origin"]["n"] == 40
    assert 0.05 <= head.threshold <= 0.95


def test_sources_of_one_origin_are_left_out_together() -> None:
    """The second origin's labels are turned round: who is judged by it alone is judged wrongly."""
    ours = [source("a", 80, 0, origin="us"), source("b", 80, 1, origin="us")]
    theirs, features = source("c", 80, 2)
    turned = Source("c", [replace(row, unsafe=not row.unsafe) for row in theirs.rows], "them")
    _, entries = fit_and_measure("unsafe", [*ours, (turned, features)], [])
    foreign = {e["name"]: e["auroc"] for e in entries if e["protocol"] == "fitted without its origin"}
    assert set(foreign) == {"a", "b", "c"}
    assert max(foreign.values()) < 0.2


def test_a_prompt_of_another_origin_does_not_help() -> None:
    """Noise for labels, the same prompts and features in both origins: only leakage could predict them."""
    rng = np.random.default_rng(0)
    labels, hidden = rng.random(60) < 0.5, rng.normal(size=(60, 200))
    rows = [Row(({"role": "user", "content": f"p{i}"},), "x", bool(y), None) for i, y in enumerate(labels)]
    made = [(Source(name, rows, name), Features(hidden, np.zeros(60))) for name in ("a", "b")]
    found, other = out_of_fold([s for s, _ in made], [part(m) for m in made], 1.0, origin="a")
    assert ((found >= 0.5) == labels).mean() < 0.65
    assert np.isnan(other).all()


def test_an_origin_that_nothing_else_can_tell_is_not_measured() -> None:
    one_sided, features = source("b", 20, 1)
    safe = Source("b", [replace(row, unsafe=False) for row in one_sided.rows], "b")
    _, entries = fit_and_measure("unsafe", [source("a", 60, 0), (safe, features)], [])
    names = [entry["name"] for entry in entries if entry["protocol"] == "fitted without its origin"]
    assert names == ["b"]  # a would be judged by a head that never saw an unsafe answer


def test_threshold_weighs_sources_and_takes_one_sided_ones() -> None:
    two_sided = (np.array([True, False]), np.array([0.9, 0.1]))
    safe_only = (np.zeros(4, dtype=bool), np.full(4, 0.6))
    threshold = best_threshold([two_sided, safe_only])
    assert 0.6 < threshold <= 0.9
    assert best_threshold([two_sided]) == 0.11
