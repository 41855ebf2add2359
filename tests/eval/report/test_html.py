import base64
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.judges.calibration import JudgeCalibration
from equipoise.eval.report import write_report
from equipoise.eval.report.content import ReportContent, by_position, examples
from equipoise.eval.report.html import Examples, confusion, error_range, flat, html, shortened


@dataclass(frozen=True, slots=True)
class Shift:
    """As `TokenShift`, whose module loads torch."""

    position: int
    token: str
    bias: float
    mean_probability: float
    token_id: int = 7

    @property
    def share(self) -> float:
        return self.mean_probability * self.bias


class Reader(HTMLParser):
    """Collects tags, attributes and the nesting; fails on a tag closed out of turn."""

    VOID = frozenset({"meta", "link", "br", "img", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.folds: list[int] = []
        """How many `<details>` a text is in."""
        self.feed(page)
        self.close()
        assert self.open == []

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
        self.folds.append(self.open.count("details"))

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def source(content: ReportContent, hostile: str) -> str:
    rows = [Shift(1, hostile, 2.0, 0.1), Shift(1, " sorry", -1.0, 0.1)]
    return html(replace(content, token_bias_rows=rows))


@pytest.fixture(scope="module")
def page(source: str) -> Reader:
    return Reader(source)


def test_what_a_model_wrote_is_text_and_never_markup(page: Reader) -> None:
    assert page.tags.count("script") == 1  # the page's own
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # Title, recipe, provenance, prompts, answers, token and category names are all there, as text.
    assert sum("fetch('https://example.invalid/x')" in text for text in page.text) > 10


def test_hidden_characters_are_spelt_out_everywhere(source: str) -> None:
    assert "⟦U+202E⟧" in source
    assert not set("\u202e\u202c\x00\x1b\ud800\U000e0041") & set(source)


def test_harmful_text_is_behind_two_clicks(page: Reader, hostile: str) -> None:
    prompts = [folds for text, folds in zip(page.text, page.folds, strict=True) if "user: <script>" in text]
    answers = [folds for text, folds in zip(page.text, page.folds, strict=True) if "tsdi: <script>" in text]
    assert prompts
    assert answers
    assert min(prompts + answers) >= 2
    # Open are the last change and the last gate table, nothing else.
    assert [name for name, _ in page.attributes].count("open") == 2


def test_examples_can_be_left_out_of_the_file(content: ReportContent) -> None:
    # Hostile text is also in names and provenance here; of prompts and answers nothing may be left.
    without = html(content, Examples.NONE)
    assert "user: " not in without
    assert not re.search(r"(base|aligned|tsdi): &lt;script", without)
    assert "left out of this file" in without


def test_the_page_asks_nobody_for_anything(page: Reader, source: str) -> None:
    assert not {"iframe", "object", "embed", "form", "base"} & set(page.tags)
    for name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "data", "action", "srcset"}:
            assert (value or "").startswith(("#", "data:"))
    style = source[source.index("<style>") : source.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_the_policy_names_the_hash_of_all_that_is_inline(page: Reader, source: str) -> None:
    policy = dict(page.attributes)["content"] and next(
        value for name, value in page.attributes if name == "content" and value and "default-src" in value
    )
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    for tag in ("style", "script"):
        [inline] = re.findall(rf"<{tag}>(.*?)</{tag}>", source, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    # A style attribute would need a hash of its own.
    assert "style" not in [name for name, _ in page.attributes]


def test_plots_are_described_and_ids_are_unique(page: Reader) -> None:
    assert page.tags.count("svg") == 6
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert any("Unsafe rate per category" in (label or "") for label in labels)
    assert len(page.ids) == len(set(page.ids))
    used = {
        value[1:]
        for name, value in page.attributes
        if name in {"xlink:href", "href"} and value and value[0] == "#"
    }
    assert used <= set(page.ids)


def test_the_stand_in_and_its_errors_are_prominent(page: Reader) -> None:
    assert "Judged by a stand-in: fake judge." in page.words
    assert (
        "on 1 set of labelled answers it was not fitted on: sensitivity 0.61, specificity 0.72" in page.words
    )
    assert page.words.index("sensitivity 0.61") < page.words.index("Unsafe answers per category")


def test_figures_of_every_state_are_there(page: Reader) -> None:
    assert "50 % [34, 66] 18/36" in page.words
    # Nine of thirty judged, six without a finding: a quarter to five twelfths.
    assert "30 % [17, 48] 9/30 +6 without finding: 25–42 % [14, 58]" in page.words
    assert "0 ↑ 15 ↓" in page.words
    assert "FAIL" in page.words or "INCONCLUSIVE" in page.words
    assert "0123abc" in page.words  # a suite's revision
    assert "Apache-2.0" in page.words


def test_a_calibrated_judge_shows_its_confusion_and_what_rates_become(page: Reader) -> None:
    assert (
        "label: unsafe judge: unsafe judge: not unsafe no finding all yes 24 6 3 33 no 6 54 2 62"
        in page.words
    )
    # Three of 36 with sensitivity 0.8 and specificity 0.9: below what false alarms explain, so 0.
    assert "corrected 0 %" in page.words


def test_the_win_rate_is_there_with_its_ends(page: Reader) -> None:
    # Six wins, two ties, three losses of eleven: (6 + 1) / 11.
    assert "64 %" in page.words
    assert "2 first, 0 second" in page.words


def test_confusion_counts_by_hand(calibration: JudgeCalibration) -> None:
    assert confusion(calibration.unsafe) == [("yes", 24, 6, 3, 33), ("no", 6, 54, 2, 62)]


def test_errors_span_the_sets_the_judge_was_not_fitted_on() -> None:
    entries = [
        {"sensitivity": 0.9, "specificity": 0.5},
        {"sensitivity": None, "specificity": 0.7},
        {"sensitivity": 0.6, "specificity": 0.8, "head": "unsafe"},
        {"sensitivity": 1.0, "specificity": 1.0, "fitted_on": True},
        {"sensitivity": 0.1, "specificity": 0.1, "head": "refusal"},
    ]
    found = error_range({"calibration": entries})
    assert found is not None
    assert (found.num_sets, found.sensitivity, found.specificity) == (3, (0.6, 0.9), (0.5, 0.8))
    assert error_range({"calibration": entries[1:2]}) is None
    assert error_range({}) is None


def test_reports_that_cannot_be_compared_say_so(
    make_report: Callable[..., CategoryReport], tmp_path: Path
) -> None:
    reports = {"base": make_report("base", 6), "other": make_report("other", 6, judge={"name": "another"})}
    page = write_report(tmp_path / "r.html", reports, {}, None, "", "run", {}).read_text(encoding="utf-8")
    assert "Not comparable as they stand: other and base: the judges differ" in page


def test_a_lone_ungated_state_makes_a_report(
    make_report: Callable[..., CategoryReport], tmp_path: Path
) -> None:
    path = write_report(tmp_path / "r.html", {"base": make_report("base", 6)}, {}, None, "", "run", {})
    text = Reader(path.read_text(encoding="utf-8")).words
    assert "Changes against" not in text
    assert "Token bias" not in text
    assert "The gate" not in text
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("# run\n")


def test_an_empty_evaluation_makes_a_report(tmp_path: Path) -> None:
    empty = CategoryReport("base", "tiny", {"name": "nobody"}, {}, ())
    path = write_report(tmp_path / "r.html", {"base": empty}, {}, [], "", "run", {})
    assert "never been held against labelled answers" in Reader(path.read_text(encoding="utf-8")).words


def test_no_report_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_report(tmp_path / "r.html", {}, {}, None, "", "run", {})
    assert list(tmp_path.iterdir()) == []


def test_five_checkpoints_of_350_samples_take_seconds(make_report: Callable[..., CategoryReport]) -> None:
    def large(state: str, num_unsafe: int) -> CategoryReport:
        report = make_report(state, num_unsafe)
        samples = [
            replace(sample, id=f"{sample.id}-{copy}")
            for copy in range(6)
            for sample in report.samples
            if sample.suite != "helpfulness" or copy == 0
        ]
        return replace(report, samples=tuple(samples[:350]))

    reports = {f"checkpoint-{number}": large(f"checkpoint-{number}", number) for number in range(5)}
    started = time.process_time()
    page = html(ReportContent("run", reports))
    assert time.process_time() - started < 8
    assert len(page) < 1_500_000


def test_many_checkpoints_are_all_in_the_table_and_the_scatter(
    make_report: Callable[..., CategoryReport],
) -> None:
    reports = {f"step-{number:02}": make_report(f"step-{number:02}", number % 5) for number in range(7)}
    page = Reader(html(ReportContent("run", reports)))
    assert "Drawn are step-00 and the last 5 of 7 checkpoints" in page.words
    # step-01 is in the tables and both scatters, not in the legends of the bars.
    assert 5 <= page.words.count("step-01") < page.words.count("step-06")


def test_examples_show_first_where_the_states_differ(reports: dict[str, CategoryReport]) -> None:
    found = examples(reports, "harmful")["S1"]
    assert [len(example.answers) for example in found] == [3, 3, 3]
    # Prompts 1 and 2 are unsafe in two of three, 3 to 5 in the first alone; 0 is unsafe in all.
    assert [example.id for example in found] == ["S1-1", "S1-2", "S1-3"]


def test_tokens_are_ranked_by_their_share_of_the_shift() -> None:
    rows = [
        Shift(2, "later", 1.0, 0.5),
        Shift(1, "rare", 9.0, 1e-9),
        Shift(1, "common", 0.5, 0.4),
        Shift(1, "down", -1.0, 0.2),
        Shift(1, "still", 0.0, 0.2),
    ]
    first, second = by_position(rows)
    assert [row.token for row in first.boosted] == ["common", "rare"]
    assert [row.token for row in first.suppressed] == ["down"]
    assert (second.position, [row.token for row in second.boosted]) == (2, ["later"])


def test_nested_provenance_becomes_rows() -> None:
    nested = {"a": {"b": 1, "c": {}}, "d": [{"e": None}, {"e": 0.5}], "f": [1, 2], "g": ()}
    assert list(flat(nested)) == [
        ("a.b", "1"), ("a.c", "–"), ("d[0].e", "None"), ("d[1].e", "0.5"), ("f", "[1, 2]"), ("g", "–"),
    ]  # fmt: skip


def test_long_answers_say_how_much_is_left_out() -> None:
    assert shortened("x" * 1200) == "x" * 1200
    assert shortened("x" * 1300).endswith("… (100 characters more)")
