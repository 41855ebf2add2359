from collections.abc import Callable

import pytest

from equipoise.eval.category_report import CategoryReport
from equipoise.eval.report.content import ReportContent
from equipoise.eval.report.markdown import escaped, markdown, rate_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("dpo_tsdi *x* `y` [z](w)", r"dpo\_tsdi \*x\* \`y\` \[z\]\(w\)"),
        ("<script>&amp;", "&lt;script&gt;&amp;amp;"),
        ("@team fixes #12", "@<!-- -->team fixes #<!-- -->12"),
        ("see https://x.y or www.x.y", "see https:<!-- -->//x.y or www<!-- -->.x.y"),
        ("two\nlines\u202e", "two lines⟦U+202E⟧"),
        ("$x$ ~y~ \\", r"\$x\$ \~y\~ \\"),
    ],
)
def test_names_are_shown_as_they_are(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_every_table_is_whole_and_nothing_becomes_markup(content: ReportContent) -> None:
    text = markdown(content)
    assert "<script" not in text
    assert "<img" not in text
    assert "\u202e" not in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    for lines in tables:
        widths = {
            len([sign for i, sign in enumerate(line) if sign == "|" and line[i - 1] != "\\"])
            for line in lines
        }
        assert len(widths) == 1


def test_verdict_changes_and_the_judge_are_there(content: ReportContent) -> None:
    lines = markdown(content).splitlines()
    assert any(line.startswith(("**INCONCLUSIVE**: aligned", "**FAIL**: aligned")) for line in lines)
    [total] = [line for line in lines if line.startswith("| All categories")]
    # 18 of 36 before, 3 of 36 after: 15 prompts newly safe.
    assert "| 50 % [34, 66] 18/36 | 8.3 % [2.9, 22] 3/36; corrected 0 %" in total
    assert "| −42 [" in total
    assert total.endswith("| 36 | **< 0.001** |")
    assert any("| 30 % [17, 48] 9/30 +6? (25–42 %) |" in line for line in lines)
    assert any(line.startswith("Judge: fake judge, a stand-in") for line in lines)
    assert any("sensitivity 80 %" in line for line in lines)


def test_a_lone_state_lists_its_categories(make_report: Callable[..., CategoryReport]) -> None:
    text = markdown(ReportContent("run", {"base": make_report("base", 6)}))
    assert "| S1 | 50 % [25, 75] 6/12 |" in text
    assert "against" not in text.replace("held against", "")


def test_a_rate_of_nothing_is_a_dash() -> None:
    assert rate_text(None) == "–"
