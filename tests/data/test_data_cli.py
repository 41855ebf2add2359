import json
from pathlib import Path

import pytest

from equipoise.data.cli import main
from equipoise.data.config import DataConfig
from equipoise.data.sources import load_records


def pairs_file(folder: Path) -> Path:
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"Question number {i} <b>&</b>?",
            "chosen": f"No {i}.",
            "rejected": f"Sure, here is {i}.",
            "category": "S2" if i % 2 else "S10",
            "chosen_safe": True,
            "rejected_safe": False,
            "rater": i,
        }
        for i in range(30)
    ]
    rows.append({**rows[0], "id": "again"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(command: str, tmp_path: Path, *more: str) -> int:
    path = pairs_file(tmp_path)
    return main([command, "data=jsonl", f"data.path={path}", f"out={tmp_path / 'out'}", *more])


def test_inspect_prints_and_writes_a_report_with_every_text_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("inspect", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "S10" in printed
    assert "agrees with the preference" in printed
    folder = tmp_path / "out" / "jsonl"
    page = (folder / "data_report.html").read_text()
    assert "&lt;b&gt;&amp;&lt;/b&gt;?" in page
    assert "<b>" not in page
    assert page.index("Show the first records of each category") < page.index("Question number")
    assert not list(folder.glob("*.parquet"))


def test_clean_writes_what_is_left_and_what_was_dropped_with_its_reason(tmp_path: Path) -> None:
    assert call("clean", tmp_path) == 0
    folder = tmp_path / "out" / "jsonl"
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert [(row["id"], row["dropped_by"], row["reason"]) for row in dropped] == [
        ("again", "exact_duplicates", "repeats p0")
    ]
    config = DataConfig(source="parquet", path=str(folder / "pairs.parquet"))
    again = load_records("parquet", config).pairs
    assert (
        again
        == load_records("jsonl", DataConfig(source="jsonl", path=str(tmp_path / "pairs.jsonl"))).pairs[:30]
    )
    assert again[3].meta == {"rater": 3}


def test_split_writes_both_sides(tmp_path: Path) -> None:
    assert call("split", tmp_path, "data.held_out_fraction=0.3", "data.max_suite_overlap=1") == 0
    folder = tmp_path / "out"
    training = load_records(
        "parquet", DataConfig(source="parquet", path=str(folder / "training_pairs.parquet"))
    ).pairs
    assert 10 < len(training) < 30
    assert (folder / "held_out_harmful_prompts.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weigh"], "'weigh' is no command; possible: inspect, clean, categorise, split"),
        (["inspect", "data=nothing"], "nothing"),
        (["inspect", "model=x"], "'model=x': expected data=NAME, data.key=value"),
        (["clean", "data.cleaning.pii=burn"], "data.cleaning.pii: found 'burn', possible: keep, mark, drop"),
        (["inspect", "data.cleaning.pij=drop"], "pij"),
        (["split"], "samples have held-out prompts of their own"),
    ],
)
def test_bad_input_is_the_users_to_mend(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
