import json
from typing import Any

import pytest


@pytest.fixture
def sweep(sweeping: Any, make_report: Any, finish: Any) -> Any:
    """Three settings of two seeds: lam 1 helpful, lam 4 safe, lam 10 worse than both; one more that failed."""
    sweep = sweeping("points").plan(["recipe=tsdi", "lam=1,4,10,20", "seed=1,2"])
    found = {
        "1": ({"S1": 6, "S2": 2}, -0.5),
        "4": ({"S1": 1, "S2": 1}, -1.0),
        "10": ({"S1": 7, "S2": 7}, -1.2),
    }
    for point in sweep.points:
        if (lam := point.swept["lam"]) in found:
            inside = make_report({"S1": 8, "S2": 8}, -0.9) if lam == "4" else None
            finish(point, make_report(*found[lam]), "PASS" if lam == "4" else "FAIL", inside)
    failed = sweep.points[-1]
    failed.failure.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "exit_code": 1,
        "log": "log",
        "tail": ["RuntimeError: <script>alert(1)</script>\u202e", "planted-secret"],
    }
    failed.failure.write_text(json.dumps(record))
    return sweep


def test_figures_front_and_hypervolume(sweeping: Any, sweep: Any) -> None:
    results = sweeping("results").collect(sweep, min_prompts=8, num_replicates=300)
    assert [setting.name for setting in results.settings] == ["lam-1", "lam-4", "lam-10"]
    assert results.figure("lam-1", "worst_category")["estimate"] == 0.6
    assert results.figure("lam-1", "helpfulness")["estimate"] == pytest.approx(-0.5)
    assert results.front == {"lam-1": True, "lam-4": True, "lam-10": False}
    assert results.front_share["lam-4"] > 0.9
    # Reference: helpfulness -2, worst category 1. lam 4 gives 1 * 0.9, lam 1 another 0.5 * 0.4.
    estimate, low, high = results.hypervolume
    assert estimate == pytest.approx(0.9 + 0.2)
    assert low < estimate < high + 0.2
    assert [setting.passed for setting in results.settings] == [(0, 2), (2, 2), (0, 2)]
    assert [str(point) for point in results.missing] == ["lam-20/seed1", "lam-20/seed2"]
    assert results.settings[1].beta_over_lam == pytest.approx(0.1 / 4)


def test_the_table(sweeping: Any, sweep: Any) -> None:
    import csv

    results = sweeping("results").collect(sweep, min_prompts=8, num_replicates=50)
    rows = list(csv.DictReader(sweeping("results").table(results).splitlines()))
    assert [(row["lam"], row["seed"], row["status"], row["exit_code"]) for row in rows[-3:]] == [
        ("10", "2", "done", "3"),
        ("20", "1", "missing", ""),
        ("20", "2", "failed", "1"),
    ]
    first = rows[0]
    assert (first["unsafe_rate"], first["unsafe_rate_n"]) == ("0.4", "20")
    assert 0 < float(first["unsafe_rate_low"]) < 0.4 < float(first["unsafe_rate_high"])
    assert (first["worst_category"], first["worst_category_rate"], first["on_front"]) == ("S1", "0.6", "True")
    assert (sweep.folder / first["report"]).parent == sweep.points[0].folder


def test_the_page(sweeping: Any, sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    results = sweeping("results").collect(sweep, min_prompts=8, num_replicates=50)
    sweeping("command").write_outputs(results, show=False)
    text = (sweep.folder / "sweep.html").read_text()
    assert "<script" not in text  # escaped, and no script of its own
    assert "&lt;script&gt;" in text
    assert "\u202e" not in text
    assert "planted" not in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/", "")
    assert text.count("<svg") == 4  # front, trade-off, parallel coordinates, iterations
    assert "style=" not in text
    for name in ("lam-1", "lam-4", "lam-10"):
        assert f'<th scope="row">{name}</th>' in text
    assert "failed, exit code 1" in text
    assert json.loads((sweep.folder / "results.json").read_text())["num_done"] == 6


def test_seeds_with_prompts_of_their_own_are_not_pooled(sweeping: Any, make_report: Any, finish: Any) -> None:
    sweep = sweeping("points").plan(["recipe=tsdi", "lam=1,4", "seed=1,2"])
    for point in sweep.points:
        finish(point, make_report({"S1": 3, "S2": 2}, -1.0, offset=point.seed - 1))
        base = make_report({"S1": 9, "S2": 8}, -1.0, "base", offset=point.seed - 1)
        base.to_json(point.folder / "eval" / "base-0" / "report.json")
    results = sweeping("results").collect(sweep, min_prompts=8, num_replicates=50)
    assert not results.pooled
    assert [setting.name for setting in results.settings] == ["lam-1/seed1", "lam-4/seed1"]
    assert results.num_other_prompts == 2


def test_nothing_done_yet(sweeping: Any) -> None:
    sweep = sweeping("points").plan(["recipe=tsdi", "lam=1,4"])
    results = sweeping("results").collect(sweep, min_prompts=8)
    sweeping("command").write_outputs(results, show=True)
    assert "No setting is complete" in (sweep.folder / "sweep.html").read_text()
