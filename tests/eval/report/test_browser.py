"""The report in a real browser: what is hidden, sorted, asked for and run there."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.report.content import ReportContent
from equipoise.eval.report.formats import percent
from equipoise.eval.report.html import html

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (the dev extra has it)"
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = os.environ.get("EQUIPOISE_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on the path, EQUIPOISE_CHROMIUM not set")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report_file(content: ReportContent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html(content), encoding="utf-8")
    return path


class Visit:
    """A page and everything that went on in it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.console: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.console.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.console.append("a dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())


@pytest.fixture
def visit(browser: Any, report_file: Path) -> Iterator[Visit]:
    visit = Visit(browser, report_file)
    yield visit
    visit.context.close()


def open_everything(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")


def test_nothing_that_a_model_wrote_runs_and_nobody_is_asked(visit: Visit, report_file: Path) -> None:
    open_everything(visit.page)
    visit.page.wait_for_timeout(200)
    assert visit.page.title().startswith("run <script>")
    assert visit.page.locator("script").count() == 1
    assert visit.page.locator("img").count() == 0
    assert visit.console == []
    assert visit.requests == [report_file.as_uri()]


def test_the_policy_stops_a_script_that_slipped_through(browser: Any, report_file: Path) -> None:
    """The last line of defence, should escaping ever fail."""
    path = report_file.with_name("slipped.html")
    page = report_file.read_text(encoding="utf-8")
    path.write_text(
        page.replace(
            "</main>", "<script>document.title = 'owned'</script><img src='https://example.invalid/x'></main>"
        ),
        encoding="utf-8",
    )
    visit = Visit(browser, path)
    visit.page.wait_for_timeout(200)
    assert visit.page.title() != "owned"
    assert sum("Content Security Policy" in line for line in visit.console) == 2
    visit.context.close()


def test_texts_are_behind_two_clicks_and_can_be_hidden_again(visit: Visit) -> None:
    page = visit.page
    category = page.locator("#answers ~ details").first
    text = category.locator("pre").first
    hide = page.locator("#hide-texts")
    assert not text.is_visible()
    category.locator("summary").first.click()
    assert category.locator(".verdict").first.is_visible()
    assert not text.is_visible()
    assert not hide.is_visible()
    category.locator("details.reveal > summary").first.click()
    assert text.is_visible()
    assert "<script>" in text.inner_text()
    assert "⟦U+202E⟧" in text.inner_text()
    hide.click()
    assert not text.is_visible()
    assert not hide.is_visible()


def test_the_keyboard_opens_and_sorts(visit: Visit) -> None:
    page = visit.page
    summary = page.locator("#answers ~ details > summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("#answers ~ details").first.get_attribute("open") is not None
    page.locator("#table-categories thead button").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator("#table-categories th").nth(1).get_attribute("aria-sort") == "descending"


def test_tables_sort_by_the_numbers_behind_the_text(
    browser: Any, tmp_path: Path, reports: dict[str, CategoryReport]
) -> None:
    # S1 gets four fewer unsafe answers, S10 none at all: 2/12, 6/12, 0/12.
    def fewer(report: CategoryReport) -> CategoryReport:
        samples = report.samples
        kept = {"S1": 2, "S2": 6, "S10": 0}
        changed = [
            replace(sample, verdict=type(sample.verdict)("safe"))
            if sample.suite == "harmful" and int(sample.id.split("-")[1]) >= kept[sample.category]
            else sample
            for sample in samples
        ]
        return replace(report, samples=tuple(changed))

    path = tmp_path / "report.html"
    path.write_text(html(ReportContent("run", {"base": fewer(reports["base"])})), encoding="utf-8")
    visit = Visit(browser, path)
    table = visit.page.locator("#table-categories")

    def order() -> list[str]:
        rows = table.locator("tbody tr").all()
        return [row.get_attribute("data-category") for row in rows]

    assert order() == ["S1", "S2", "S10"]
    by_rate = table.locator("thead button").nth(1)
    by_rate.click()
    assert order() == ["S2", "S1", "S10"]
    by_rate.click()
    assert order() == ["S10", "S1", "S2"]
    assert table.locator("th[aria-sort]").count() == 1
    table.locator("thead button").nth(0).click()
    assert order() == ["S1", "S2", "S10"]  # names, with numbers in them in their order
    # The line of totals stays below.
    assert "All categories" in table.locator("tfoot").inner_text()
    assert visit.console == []
    visit.context.close()


def test_the_numbers_shown_are_those_of_report_json(
    visit: Visit, reports: dict[str, CategoryReport], tmp_path: Path
) -> None:
    num_compared = 0
    for column, (state, report) in enumerate(reports.items(), start=1):
        report.to_json(tmp_path / f"{state}.json")
        summary = json.loads((tmp_path / f"{state}.json").read_text(encoding="utf-8"))["summary"]
        for category, rate in summary["unsafe_rate"]["categories"].items():
            row = visit.page.locator(f"#table-categories tr[data-category='{category}']")
            cell = row.locator("td").nth(column - 1)
            assert float(cell.get_attribute("data-value") or "nan") == rate["rate"]
            text = cell.inner_text()
            assert text.startswith(percent(rate["rate"]))
            assert f"{rate['count']}/{rate['n']}" in text
            assert (f"+{rate['num_no_finding']} without finding" in text) == (rate["num_no_finding"] > 0)
            num_compared += 1
        overall = summary["unsafe_rate"]["overall"]
        shown = visit.page.locator("#table-checkpoints tbody tr").nth(column - 1).locator("td").nth(1)
        assert float(shown.get_attribute("data-value") or "nan") == overall["rate"]
    assert num_compared == 9


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Any, report_file: Path, scheme: str) -> None:
    visit = Visit(browser, report_file, width=400, color_scheme=scheme)
    open_everything(visit.page)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 400
    ink, paper = visit.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    brightness = [sum(int(part) for part in colour[4:-1].split(",")) for colour in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    # Plots take the page's ink.
    label = visit.page.locator("figure svg text").first
    assert label.evaluate("(text) => getComputedStyle(text).fill") == ink
    visit.context.close()


def test_it_can_be_read_without_a_script(browser: Any, report_file: Path) -> None:
    visit = Visit(browser, report_file, java_script_enabled=False)
    page = visit.page
    assert page.locator("#table-categories tbody tr").first.is_visible()
    assert page.locator("button:visible").count() == 0
    page.locator("#answers ~ details > summary").first.click()
    page.locator("details.reveal > summary").first.click()
    assert page.locator("details.reveal pre").first.is_visible()
    visit.context.close()
