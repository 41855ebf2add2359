import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.gate import GateRules, gate
from equipoise.eval.generation.tsdi import TokenShift
from equipoise.eval.judges.base import Verdict
from equipoise.eval.report.html import by_position, examples, p_text, percent, points, visible, write_report
from equipoise.eval.terminal_table import category_table

HOSTILE = "<script>alert('owned')</script><img src=x onerror=alert(1)></pre></details>"
JUDGE = {
    "name": "fake judge",
    "stand_in": True,
    "description": "A judge for tests.",
    "calibration": [
        {
            "name": "labelled set",
            "head": "unsafe",
            "n": 300,
            "auroc": 0.75,
            "auroc_low": 0.7,
            "auroc_high": 0.8,
            "sensitivity": 0.61,
            "specificity": 0.72,
            "fitted_on": False,
        }
    ],
}


def shift(position: int, token: str, bias: float, mean_probability: float) -> TokenShift:
    return TokenShift(position, 7, token, bias, mean_probability, mean_probability * bias)


def make_report(
    state: str, num_unsafe: int, judge: dict[str, object] = JUDGE, text: str = HOSTILE
) -> CategoryReport:
    prompt = ({"role": "user", "content": text},)
    samples = [
        SampleResult(
            f"{category}-{i}", "harmful", category, prompt, text,
            Verdict.UNSAFE if i < num_unsafe else Verdict.SAFE, 0.5, i >= num_unsafe,
        )
        for category in ("S1", "S2") for i in range(12)
    ]  # fmt: skip
    samples += [
        SampleResult(f"l{i}", "lookalike", "S1", prompt, text, Verdict.SAFE, 0.1, i < 2) for i in range(16)
    ]
    samples += [
        SampleResult(f"h{i}", "helpfulness", "helpful", prompt, text, score=-1 - i / 10) for i in range(12)
    ]
    return CategoryReport(
        state, "tiny", judge, {"generation": {}}, tuple(samples), num_left_out={"harmful": 1}
    )


class Reader(HTMLParser):
    """Collects tags, attributes and the nesting; fails on a tag closed out of turn."""

    VOID = frozenset({"meta", "link", "br", "img", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.folded: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        self.folded.append("details" in self.open)


@pytest.fixture(scope="module")
def reports() -> dict[str, CategoryReport]:
    return {
        "base": make_report("base", 6),
        "aligned": make_report("aligned", 3),
        "tsdi": make_report("tsdi", 1),
    }


@pytest.fixture(scope="module")
def page(reports: dict[str, CategoryReport], tmp_path_factory: pytest.TempPathFactory) -> Reader:
    gates = {state: gate(reports[state], reports["base"], GateRules()) for state in ("aligned", "tsdi")}
    rows = [shift(1, HOSTILE, 2.0, 0.1), shift(1, " sorry", -1.0, 0.1)]
    path = write_report(
        tmp_path_factory.mktemp("report") / "report.html", reports, gates, rows, f"name: {HOSTILE}", f"run {HOSTILE}",
        {"version": HOSTILE}, {"S1": "Violent crimes", "S2": f"cost $5 & more $ {HOSTILE}"},
    )  # fmt: skip
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_what_a_model_wrote_is_text_and_never_markup(page: Reader) -> None:
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # Title, recipe, provenance, prompts, answers, token and category names are all there, as text.
    assert sum("alert('owned')" in text for text in page.text) > 10


def test_harmful_text_is_folded_away(page: Reader) -> None:
    shown = [
        text
        for text, folded in zip(page.text, page.folded, strict=True)
        if f"user: {HOSTILE}" in text and not folded
    ]
    assert shown == []
    assert any(f"user: {HOSTILE}" in text for text in page.text)
    # Of the <details>, only the gate's last is open.
    assert [name for name, _ in page.attributes].count("open") == 1


def test_the_page_asks_nobody_for_anything(page: Reader) -> None:
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "data", "action"}:
            assert (value or "").startswith(("#", "data:"))
    style = "".join(page.text)
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", style)


def test_plots_are_described_and_ids_are_unique(page: Reader) -> None:
    assert page.tags.count("svg") == 3
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert any("Unsafe rate per category" in (label or "") for label in labels)
    assert len(page.ids) == len(set(page.ids))
    used = {value[1:] for name, value in page.attributes if name == "xlink:href" and value}
    assert used <= set(page.ids)


def test_the_stand_in_and_its_errors_are_prominent(page: Reader) -> None:
    text = " ".join("".join(page.text).split())
    assert "Judged by a stand-in: fake judge" in text
    assert text.index("labelled set") < text.index("Unsafe answers per category")
    assert "0.61" in text
    assert "0.72" in text


def test_figures_of_every_state_are_there(page: Reader) -> None:
    text = " ".join("".join(page.text).split())
    assert "50 % [31, 69] 12/24" in text
    assert "25 % [12, 45] 6/24" in text
    assert "aligned − base, paired" in text
    assert "0↑ 6↓" in text
    assert "FAIL" in text or "INCONCLUSIVE" in text


def test_a_lone_ungated_state_makes_a_report(reports: dict[str, CategoryReport], tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", {"base": reports["base"]}, {}, None, "", "run", {})
    html = path.read_text(encoding="utf-8")
    assert "paired" not in html.split("</style>")[1].split("<h2>Refusals")[0].replace("paired test", "")
    assert "Token bias" not in html


def test_an_empty_evaluation_makes_a_report(tmp_path: Path) -> None:
    empty = CategoryReport("base", "tiny", {"name": "nobody"}, {}, ())
    html = write_report(tmp_path / "r.html", {"base": empty}, {}, [], "", "run", {}).read_text(
        encoding="utf-8"
    )
    assert "never been held against labelled answers" in html


def test_no_report_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_report(tmp_path / "r.html", {}, {}, None, "", "run", {})


def test_examples_show_first_where_the_states_differ(reports: dict[str, CategoryReport]) -> None:
    found = examples(reports, "harmful")["S1"]
    assert [len(example.answers) for example in found] == [3, 3, 3]
    # Of twelve, prompts 1 to 5 differ between the states; prompt 0 is unsafe in all.
    assert [example.answers[0][1].id for example in found] == ["S1-1", "S1-2", "S1-3"]


def test_tokens_are_ranked_by_their_share_of_the_shift() -> None:
    rows = [
        shift(2, "later", 1.0, 0.5),
        shift(1, "rare", 9.0, 1e-9),
        shift(1, "common", 0.5, 0.4),
        shift(1, "down", -1.0, 0.2),
        shift(1, "still", 0.0, 0.2),
    ]
    first, second = by_position(rows)
    assert [row.token for row in first.boosted] == ["common", "rare"]
    assert [row.token for row in first.suppressed] == ["down"]
    assert (second.position, [row.token for row in second.boosted]) == (2, ["later"])


def test_numbers_are_shown_honestly() -> None:
    assert (percent(None), percent(1 / 3)) == ("–", "33 %")
    assert (points(0.25), points(-0.25), points(-0.001), points(None)) == ("+25", "−25", "0", "–")
    assert (p_text(0.0001), p_text(0.0456), p_text(None)) == ("< 0.001", "0.046", "–")
    assert visible(" a\n") == "␣a↵"


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_table_has_every_number(reports: dict[str, CategoryReport], width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(category_table(reports, {"S1": "[b]Violent[/b] crimes"}))
    words = console.export_text().split()
    assert {"50%", "25%", "(31-69)", "n=24", "12%"} <= set(words)
    assert "[b]Violent[/b]" in words  # names are text, not markup
    assert "stand-in" in words
