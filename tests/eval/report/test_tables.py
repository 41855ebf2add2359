from dataclasses import replace

import pytest

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.judges.base import Verdict
from equipoise.eval.report.content import ReportContent
from equipoise.eval.report.formats import percent, percent_range
from equipoise.eval.report.html import html
from equipoise.eval.report.markdown import markdown
from equipoise.eval.report.tables import category_table


def test_every_category_and_measure_has_its_row(
    reports: dict[str, CategoryReport], category_names: dict[str, str]
) -> None:
    table = category_table(reports["aligned"], reports["base"], category_names)
    rows = {(row[1], row[2]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    # Harmful prompts in three categories, look-alikes in one, each measure with a row over all.
    assert len(table.rows) == len(rows) == 4 + 4 + 2
    overall = rows["unsafe", "all"]
    assert (overall["count"], overall["n"], overall["num_no_finding"]) == (9, 30, 6)
    # Six of twelve before, three after; the last two have no finding now, so ten pairs.
    category = rows["unsafe", "S1"]
    assert (category["num_pairs"], category["num_gained"], category["num_lost"]) == (10, 0, 3)
    assert category["change"] == pytest.approx(-0.3)
    # Exact McNemar of 0 against 3: 2 * 0.5 ** 3; Holm over three like categories: three times that.
    assert category["p_value"] == pytest.approx(0.25)
    assert category["p_adjusted"] == pytest.approx(0.75)
    assert overall["p_adjusted"] == overall["p_value"] == pytest.approx(2 * 0.5**9)
    assert category["name"] == "Violent crimes"
    assert rows["refused_benign", "S1"]["rate"] == pytest.approx(2 / 16)
    assert rows["complied", "S1"]["change"] is None


def test_without_a_baseline_there_are_no_changes(reports: dict[str, CategoryReport]) -> None:
    table = category_table(reports["base"])
    changes = [dict(zip(table.columns, row, strict=True))["change"] for row in table.rows]
    assert changes == [None] * len(table.rows)


def test_ordinary_prompts_that_were_answered_are_in_every_form(reports: dict[str, CategoryReport]) -> None:
    prompt = ({"role": "user", "content": "hi"},)
    asked = [
        SampleResult(f"o{i}", "compliance", "helpful", prompt, "well", Verdict.SAFE, None, refused=i < 3)
        for i in range(12)
    ]
    report = replace(reports["aligned"], samples=reports["aligned"].samples + tuple(asked))
    # 9 of 12; Wilson's 95 % interval by hand: (0.75 + 1.92 / 12 +- 1.96 * sqrt(0.75 * 0.25 / 12 + 0.96 / 144)) / 1.32
    found = report.summary()["helpful_compliance"]
    assert (found["count"], found["n"], found["rate"]) == (9, 12, 0.75)
    assert (found["low"], found["high"]) == pytest.approx((0.468, 0.911), abs=5e-4)
    rows = {(row[1], row[2]): row for row in category_table(report).rows}
    assert rows["answered_ordinary", "all"][4] == 0.75
    content = ReportContent("title", {"base": reports["base"], "aligned": report})
    assert "answered ordinary" in html(content)
    assert f"{percent(0.75)} {percent_range(0.468, 0.911)} 9/12" in markdown(content)
    without = ReportContent("title", reports)
    assert "answered ordinary" not in html(without) + markdown(without)
    assert reports["base"].summary()["helpful_compliance"]["rate"] is None
