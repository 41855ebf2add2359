import json
from typing import Any

import pytest


@pytest.mark.parametrize(("min_prompts", "expected"), [("8", [1, 2]), ("20", [None, None])])
def test_the_report_follows_every_point(
    min_prompts: str,
    expected: list[int | None],
    sweeping: Any,
    make_report: Any,
    finish: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And where none can be made, the other points run on."""
    command = sweeping("command")
    sweep = sweeping("points").plan(["recipe=tsdi", "lam=1,4", "seed=1"])
    points = {str(point): point for point in sweep.points}
    num_done: list[int | None] = []

    def run_jobs(jobs: Any, told: Any, **_: object) -> None:
        for job in jobs:
            finish(points[job.name], make_report({"S1": 3, "S2": 2}, -1.0))
            told(job.name, 0)
            path = sweep.folder / "results.json"
            num_done.append(json.loads(path.read_text())["num_done"] if path.exists() else None)

    monkeypatch.setattr(command, "run_jobs", run_jobs)
    options = command.argument_parser("sweep").parse_intermixed_args(
        ["recipe=tsdi", "lam=1,4", "seed=1", "--min-prompts", min_prompts]
    )
    command.run_points(sweep, options)
    assert num_done == expected
    assert (sweep.folder / "sweep.html").exists() == (expected[-1] is not None)
    assert capsys.readouterr().out.count("no report of the sweep") == expected.count(None)
