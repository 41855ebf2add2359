import json
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.eval.category_report import (
    CategoryReport,
    ReportError,
    SampleResult,
)
from equipoise.eval.comparison import compare
from equipoise.eval.judges.base import Verdict
from equipoise.eval.judges.calibration import HeadCalibration, JudgeCalibration
from equipoise.eval.judges.pairwise import Preference
from equipoise.eval.rates import Rate
from equipoise.eval.statistics import wilson_interval
from equipoise.eval.suites.win_rate import PairSample, Pairwise

PROMPT = ({"role": "user", "content": "question"},)


def sample(id: str, category: str = "S1", suite: str = "harmful", **found: object) -> SampleResult:
    return SampleResult(id, suite, category, PROMPT, "answer", **found)  # type: ignore[arg-type]


def report(*samples: SampleResult, **fields: object) -> CategoryReport:
    return CategoryReport("base", "tiny", {"name": "fake", "stand_in": True}, {}, samples, **fields)  # type: ignore[arg-type]


@pytest.fixture
def mixed() -> CategoryReport:
    return report(
        sample("a", "S10", verdict=Verdict.UNSAFE, p_unsafe=0.9, refused=False),
        sample("b", "S10", verdict=Verdict.SAFE, p_unsafe=0.1, refused=True),
        sample("c", "S10", verdict=Verdict.UNPARSED),
        sample("d", "S2", verdict=Verdict.CONTROVERSIAL, refused=False),
        sample("e", "S2", suite="lookalike", verdict=Verdict.SAFE, refused=True),
        sample("f", "S2", suite="lookalike", verdict=Verdict.SAFE, refused=False),
        sample("g", "helpful", suite="helpfulness", score=-1.0),
        sample("h", "helpful", suite="helpfulness", score=-2.0),
        sample("i", "helpful", suite="helpfulness"),
        num_left_out={"harmful": 3},
        seconds=1.5,
    )


def test_rate_counts_the_unparsed_beside_and_bounds_them() -> None:
    rate = Rate.of([True, False, False, None])
    assert (rate.count, rate.n, rate.rate, rate.num_no_finding) == (1, 3, pytest.approx(1 / 3), 1)
    assert (rate.low, rate.high) == wilson_interval(1, 3)
    assert rate.best_low == wilson_interval(1, 4)[0]
    assert rate.worst_high == wilson_interval(2, 4)[1]


def test_rate_of_nothing_parsed_is_no_rate() -> None:
    rate = Rate.of([None, None])
    assert (rate.rate, rate.n, rate.low, rate.high, rate.num_no_finding) == (None, 0, 0, 1, 2)


def test_figures_follow_from_the_samples(mixed: CategoryReport) -> None:
    assert mixed.categories == ("S2", "S10")
    assert mixed.unsafe_rate["S10"].count == 1
    assert mixed.unsafe_rate["S10"].num_unparsed == 1
    assert mixed.unsafe_rate["S2"].rate == 1.0  # controversial counts as unsafe unless told otherwise
    assert (mixed.overall_unsafe_rate.count, mixed.overall_unsafe_rate.n) == (2, 3)
    assert (mixed.compliance_rate["S10"].count, mixed.compliance_rate["S10"].n) == (1, 2)
    assert (mixed.over_refusal.count, mixed.over_refusal.n) == (1, 2)
    assert mixed.over_refusal_rate["S2"].rate == 0.5
    assert (mixed.helpfulness.mean, mixed.helpfulness.n, mixed.num_unscored) == (-1.5, 2, 1)


def test_controversial_counts_as_the_report_says() -> None:
    controversial = sample("a", verdict=Verdict.CONTROVERSIAL)
    assert report(controversial, controversial_is_unsafe=False).overall_unsafe_rate.count == 0


def test_other_comes_last() -> None:
    rows = [sample(category, category) for category in ("OTHER", "S10", "S9")]
    assert report(*rows).categories == ("S9", "S10", "OTHER")


def test_round_trip_keeps_everything(mixed: CategoryReport, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    mixed.to_json(path)
    assert CategoryReport.from_json(path) == mixed
    assert json.loads(path.read_text())["summary"] == json.loads(json.dumps(mixed.summary()))
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]  # nothing left aside


def test_round_trip_keeps_calibration_and_pairs(mixed: CategoryReport, tmp_path: Path) -> None:
    head = HeadCalibration(80, Rate.of([True] * 36 + [False] * 4), Rate.of([True] * 40), 0.9, 0.8, 0.95, 80)
    calibration = JudgeCalibration(
        "fake", "labels", "2026-01-02", {}, True, 80, {"failed": 1}, head, {}, None
    )
    pairs = PairSample("a", "helpful", PROMPT, "x", "y", Preference.FIRST, Preference.UNPARSED, ("A", "?"))
    whole = replace(mixed, calibration=calibration, pairwise=Pairwise("base", {"name": "pairs"}, (pairs,)))
    whole.to_json(tmp_path / "report.json")
    again = CategoryReport.from_json(tmp_path / "report.json")
    assert again == whole
    assert again.unsafe_rate["S10"].corrected is not None
    assert again.win_rate is not None
    assert again.win_rate.num_no_finding == 1
    assert json.loads((tmp_path / "report.json").read_text())["summary"]["win_rate"]["n"] == 0


def test_the_calibration_of_another_judge_is_refused(mixed: CategoryReport) -> None:
    head = HeadCalibration(80, Rate.of([True] * 40), Rate.of([True] * 40), None, None, None, 0)
    calibration = JudgeCalibration("other", "labels", "2026-01-02", {}, True, 80, {}, head, {}, None)
    with pytest.raises(ReportError, match="calibration is of the judge 'other'"):
        replace(mixed, calibration=calibration)
    with pytest.raises(ReportError, match="counts controversial answers as unsafe: False"):
        replace(mixed, calibration=replace(calibration, judge="fake", controversial_is_unsafe=False))


def test_the_gap_and_the_counts_of_outcomes_are_in_the_summary(mixed: CategoryReport) -> None:
    summary = mixed.summary()
    assert (summary["gap"]["gap"], summary["gap"]["worst"], summary["gap"]["best"]) == (0.5, "S2", "S10")
    assert summary["unsafe_rate"]["categories"]["S10"]["num_unparsed"] == 1
    assert summary["win_rate"] is None


def test_several_answers_to_a_prompt_are_compared_by_prompt() -> None:
    def answers(verdict: Verdict) -> CategoryReport:
        return report(*(sample(f"{i}", verdict=verdict, prompt_id=f"p{i // 4}") for i in range(16)))

    changes = compare(answers(Verdict.UNSAFE), answers(Verdict.SAFE))
    assert (changes.unsafe["S1"].n, changes.unsafe["S1"].num_prompts) == (16, 4)
    assert changes.unsafe["S1"].p_value == pytest.approx(2 / 2**4)
    assert changes.unsafe["S1"].method == "bootstrap"
    assert changes.unsafe_q_values["S1"] == changes.unsafe_p_adjusted["S1"]
    assert answers(Verdict.UNSAFE).unsafe_rate["S1"].n_effective == 4


def test_round_trip_survives_text_that_utf_8_cannot_hold(tmp_path: Path) -> None:
    broken = report(SampleResult("a", "harmful", "S1", PROMPT, "half a pair: \ud83d", Verdict.SAFE))
    broken.to_json(tmp_path / "report.json")
    assert CategoryReport.from_json(tmp_path / "report.json") == broken


def test_a_failed_write_leaves_the_old_report(mixed: CategoryReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    mixed.to_json(path)
    with pytest.raises(ValueError, match="JSON"):
        report(sample("a", suite="harmful", p_unsafe=float("nan"))).to_json(path)
    assert CategoryReport.from_json(path) == mixed


def test_reading_names_the_file_and_the_fault(mixed: CategoryReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(ReportError, match=r"report\.json: not a readable report"):
        CategoryReport.from_json(path)
    path.write_text('{"schema_version": 99}')
    with pytest.raises(ReportError, match=r"report\.json: schema_version is 99, expected 2"):
        CategoryReport.from_json(path)
    path.write_text("[]")
    with pytest.raises(ReportError, match="schema_version is None"):
        CategoryReport.from_json(path)
    mixed.to_json(path)
    document = json.loads(path.read_text())
    document["samples"][0]["verdict"] = "fine"
    path.write_text(json.dumps(document))
    with pytest.raises(ReportError, match="'fine' is not a valid Verdict"):
        CategoryReport.from_json(path)
    del document["judge"]
    document["samples"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(ReportError, match="judge"):
        CategoryReport.from_json(path)


def test_ids_are_unique_within_a_suite() -> None:
    with pytest.raises(ReportError, match="'a' occurs twice in suite 'harmful'"):
        report(sample("a"), sample("a", "S2"))
    report(sample("a"), sample("a", suite="lookalike"))


def test_compare_pairs_by_id_and_leaves_out_what_is_unknown() -> None:
    before = report(
        sample("a", verdict=Verdict.SAFE),
        sample("b", verdict=Verdict.SAFE),
        sample("c", verdict=Verdict.UNPARSED),
        sample("x", suite="helpfulness", score=-1.0),
        sample("y", suite="helpfulness", score=-2.0),
        sample("z", suite="helpfulness"),
    )
    after = report(
        sample("c", verdict=Verdict.UNSAFE),
        sample("b", verdict=Verdict.SAFE),
        sample("a", verdict=Verdict.UNSAFE),
        sample("z", suite="helpfulness", score=-9.0),
        sample("y", suite="helpfulness", score=-2.5),
        sample("x", suite="helpfulness", score=-1.25),
    )
    changes = compare(after, before)
    assert (changes.unsafe["S1"].n, changes.unsafe["S1"].num_gained, changes.unsafe["S1"].num_lost) == (
        2,
        1,
        0,
    )
    assert changes.unsafe_p_adjusted == {"S1": changes.unsafe["S1"].p_value}
    assert (changes.helpfulness.n, changes.helpfulness.mean) == (2, pytest.approx(-0.375))


def test_summary_with_a_baseline_has_the_paired_changes(mixed: CategoryReport) -> None:
    summary = mixed.summary(mixed)
    assert set(summary["unsafe_rate"]["overall"]) >= {"rate", "n", "low", "high", "num_no_finding"}
    assert summary["unsafe_rate"]["change"]["overall"]["difference"] == 0
    assert summary["unsafe_rate"]["change"]["categories"]["S10"]["p_adjusted"] == 1
    assert summary["over_refusal"]["change"]["n"] == 2
    assert summary["helpfulness"]["change"]["mean"] == 0
    assert summary["judge_is_stand_in"] is True
    json.dumps(summary, allow_nan=False)
