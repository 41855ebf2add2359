import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from equipoise.data.crosswalk import crosswalk_names
from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL, Exchange
from equipoise.data.sources.hub import HubSet
from equipoise.data.taxonomy import load_taxonomy
from equipoise.eval.suites import sources
from equipoise.eval.suites.base import COMPLIANCE, HARMFUL, HELPFULNESS, LOOKALIKE, SUITES
from equipoise.eval.suites.published import SOURCES
from equipoise.eval.suites.sources import load_suite, spread

# Rows with the columns that the authors publish; the texts are this test's own.
UPSTREAM: dict[str, tuple[str, list[dict[str, object]], list[str]]] = {
    "beavertails_evaluation": (
        "test.jsonl",
        [
            {"prompt": "q1", "category": "self_harm", "category_id": 1},
            {"prompt": "q2", "category": "child_abuse"},
        ],
        ["S11", "S4"],
    ),
    "salad": (
        "base_set.json",
        [
            {
                "qid": 7,
                "question": "q1",
                "source": "x",
                "1-category": "O5: a",
                "3-category": "O37: Malware Generation",
            },
            {
                "qid": 8,
                "question": "q2",
                "source": "x",
                "1-category": "O1: a",
                "3-category": "O1: Hate Speech",
            },
        ],
        ["S2", "S10"],
    ),
    "ailuminate": (
        "demo.csv",
        [
            {
                "release_prompt_id": "airr_1",
                "prompt_text": "q1, quoted",
                "hazard": "cse",
                "persona": "normal",
            },
            {"release_prompt_id": "airr_2", "prompt_text": "q2", "hazard": "spc_ele", "persona": "skilled"},
        ],
        ["S4", "S6"],
    ),
    "harmbench": (
        "behaviors.csv",
        [
            {"Behavior": "q1", "SemanticCategory": "illegal", "ContextString": "", "BehaviorID": "b1"},
            {
                "Behavior": "q2",
                "SemanticCategory": "copyright",
                "ContextString": "Read this.",
                "BehaviorID": "b2",
            },
        ],
        ["S2", "S8"],
    ),
    "strongreject": (
        "strongreject.csv",
        [
            {"category": "Violence", "source": "custom", "forbidden_prompt": "q1"},
            {"category": "Hate, harassment and discrimination", "source": "custom", "forbidden_prompt": "q2"},
        ],
        ["S1", "S10"],
    ),
    "do_not_answer": (
        "train.parquet",
        [
            {
                "id": 0,
                "question": "q1",
                "risk_area": "x",
                "types_of_harm": "Adult Content",
                "specific_harm": "y",
            },
            {"id": 1, "question": "q2", "risk_area": "x", "types_of_harm": "Assisting illegal activities"},
        ],
        ["S12", "S2"],
    ),
    "catqa": (
        "catqa_english.json",
        [
            {"Category": "Malware Viruses", "Subcategory": "Worms", "Question": "q1"},
            {"Category": "Physical Harm", "Subcategory": "x", "Question": "q2"},
        ],
        ["S2", "S1"],
    ),
    "xstest": (
        "xstest_prompts.csv",
        [
            {"id": "1", "prompt": "q1", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
            {"id": "2", "prompt": "q2", "type": "definitions", "label": "safe", "focus": "x", "note": ""},
            {
                "id": "3",
                "prompt": "bad",
                "type": "contrast_homonyms",
                "label": "unsafe",
                "focus": "x",
                "note": "",
            },
        ],
        ["homonyms", "definitions"],
    ),
    "or_bench": (
        "or-bench-hard-1k.csv",
        [{"prompt": "q1", "category": "self-harm"}, {"prompt": "q2", "category": "hate"}],
        ["S11", "S10"],
    ),
}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            cells = [list(rows[0]), *([str(row.get(name, "")) for name in rows[0]] for row in rows)]
            path.write_text("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in cells))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_every_source_is_tried_here() -> None:
    assert UPSTREAM.keys() == SOURCES.keys()


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_file_with_the_authors_columns_is_read(name: str, tmp_path: Path) -> None:
    file, rows, categories = UPSTREAM[name]
    path = write(tmp_path / file, rows)
    suite = load_suite(SOURCES[name].suites[0], name, path=str(path))
    assert [exchange.category for exchange in suite.exchanges] == categories
    texts = [exchange.prompt[-1]["content"] for exchange in suite.exchanges]
    assert [text.rsplit("\n\n", 1)[-1].split(",")[0] for text in texts] == ["q1", "q2"]
    assert suite.facts["licence"] == SOURCES[name].licence
    assert suite.facts["faults"] == list(SOURCES[name].faults)
    # The same from a folder, as a download leaves it.
    assert load_suite(SOURCES[name].suites[0], name, path=str(tmp_path)).exchanges == suite.exchanges


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.hub is not None])
def test_a_mirror_of_the_hub_is_read(name: str, tmp_path: Path) -> None:
    hub = SOURCES[name].hub
    assert hub is not None
    rows = [dict(row) for row in UPSTREAM[name][1]]
    for row in rows:  # the hub's copies have names of their own
        for field, columns in SOURCES[name].fields.items():
            for column in columns:
                if column in row and columns[-1] != column:
                    row[columns[-1]] = row.pop(column)
            assert field
    file = (
        hub.files[0]
        .replace("*.parquet", "0.parquet")
        .replace("jsonl*", "jsonl")
        .replace("train-*", "train-0")
    )
    write(tmp_path / hub.repo / file, rows)
    suite = load_suite(SOURCES[name].suites[0], name, mirror=str(tmp_path))
    assert [exchange.category for exchange in suite.exchanges] == UPSTREAM[name][2]
    assert suite.facts["repository"] == hub.repo
    assert suite.facts["revision"] == "local copy"


def test_another_revision_is_read_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[HubSet] = []

    def read_rows(hub: HubSet, mirror: str | None, num_rows: int | None) -> list[dict[str, Any]]:
        read.append(hub)
        return [dict(row) for row in UPSTREAM["beavertails_evaluation"][1]]

    monkeypatch.setattr(sources, "read_rows", read_rows)
    commit = "0123456789abcdef0123456789abcdef01234567"
    suite = load_suite(HARMFUL, "beavertails_evaluation", revision=commit)
    assert suite.facts["revision"] == commit
    pinned = SOURCES["beavertails_evaluation"].hub
    assert pinned is not None
    assert read == [replace(pinned, revision=commit)]


def test_the_table_is_sound() -> None:
    for source in SOURCES.values():
        assert set(source.suites) <= set(SUITES)
        assert source.taxonomy is None or source.taxonomy in crosswalk_names()
        assert source.licence
        assert source.faults
        assert source.paper.startswith("arXiv:")
        if source.hub is not None and len(source.hub.revision) != 40:
            assert any("no commit of it is pinned" in fault for fault in source.faults), (
                "an unpinned revision is a known fault"
            )


def test_harmful_prompts_carry_their_context(tmp_path: Path) -> None:
    file, rows, _ = UPSTREAM["harmbench"]
    suite = load_suite(HARMFUL, "harmbench", path=str(write(tmp_path / file, rows)))
    assert [exchange.prompt[-1]["content"] for exchange in suite.exchanges] == ["q1", "Read this.\n\nq2"]
    assert [exchange.id for exchange in suite.exchanges] == ["b1", "b2"]


def test_unsafe_contrasts_are_not_asked_and_counted(tmp_path: Path) -> None:
    file, rows, _ = UPSTREAM["xstest"]
    suite = load_suite(LOOKALIKE, "xstest", path=str(write(tmp_path / file, rows)))
    assert len(suite.exchanges) == 2
    assert suite.facts["left_out"] == {"label is not safe": 1}


def test_a_users_file_with_names_and_labels_of_its_own(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": "q", "harm": "Violence"},
        {"question": "r", "harm": "Sexual content"},
    ]
    path = write(tmp_path / "mine.jsonl", rows)
    fields = {"prompt": "question", "category": "harm"}
    suite = load_suite(HARMFUL, "file", path=str(path), fields=fields, taxonomy="strongreject")
    assert [(e.id, e.category) for e in suite.exchanges] == [("mine:1", "S1"), ("mine:2", "S12")]
    assert suite.exchanges[0].meta == {"labels": ["Violence"]}


def test_every_problem_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"category": "Violence", "forbidden_prompt": ""},
        {"category": "Violins", "forbidden_prompt": "q"},
        {"category": "Violence", "prompts": "q"},
    ]
    path = write(tmp_path / "s.jsonl", rows)
    with pytest.raises(DataError) as error:
        load_suite(HARMFUL, "strongreject", path=str(path))
    message = str(error.value)
    assert "s.jsonl:1: prompt: is empty" in message
    assert "s.jsonl:2: category: found 'Violins', expected" in message
    assert "s.jsonl:3: forbidden_prompt or prompt: no such column; found category, prompts" in message


def test_a_reference_answer_is_asked_for_by_helpfulness_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "h.jsonl", [{"prompt": "q"}])
    (asked,) = load_suite(COMPLIANCE, "file", path=str(path)).exchanges
    assert asked.category == HELPFUL
    with pytest.raises(DataError, match="response: is missing; helpfulness is the likelihood"):
        load_suite(HELPFULNESS, "file", path=str(path))


def test_an_id_that_occurs_twice_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, [{"id": "same", "prompt": name, "category": "S1"}])
    with pytest.raises(DataError, match="'same' occurs twice"):
        load_suite(HARMFUL, "file", path=str(tmp_path))


@pytest.mark.parametrize(("text", "reason"), [("[1]", "is no JSON object"), ("[{", "is no JSON array")])
def test_a_broken_array_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        load_suite(HARMFUL, "file", path=str(tmp_path / "a.json"))


def test_json_lines_in_a_file_called_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"prompt": "q", "category": "S1"}\n{"prompt": "r", "category": "S2"}\n')
    suite = load_suite(HARMFUL, "file", path=str(tmp_path / "a.json"))
    assert [exchange.category for exchange in suite.exchanges] == ["S1", "S2"]


def exchanges(categories: str) -> list[Exchange]:
    return [Exchange(f"{i}", ({"role": "user", "content": "q"},), c) for i, c in enumerate(categories)]


def test_a_limit_takes_evenly_from_every_category_in_order() -> None:
    taken = spread(exchanges("AAAAABBBC"), 5)
    assert [(e.id, e.category) for e in taken] == [("0", "A"), ("1", "A"), ("5", "B"), ("6", "B"), ("8", "C")]
    assert spread(exchanges("AB"), None) == exchanges("AB")
    assert spread(exchanges("AB"), 9) == exchanges("AB")


def test_the_shipped_samples_and_a_limit_over_them() -> None:
    whole = load_suite(HARMFUL, "samples")
    part = load_suite(HARMFUL, "samples", limit=26)
    assert part.num_available == len(whole.exchanges) > 26
    counts = Counter(exchange.category for exchange in part.exchanges)
    assert set(counts.values()) == {2}
    assert part.facts["num_prompts"] == 26


FILES = {
    "strongreject_prompts.jsonl": ("strongreject", 313),
    "catqa_prompts.jsonl": ("catqa", 550),
    "do_not_answer_prompts.jsonl": ("do_not_answer_area", 939),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.skipif(
    "EQUIPOISE_DATA" not in os.environ, reason="EQUIPOISE_DATA names no folder of public data"
)
def test_public_sets_as_files_of_ones_own(file: str) -> None:
    taxonomy, number = FILES[file]
    path = Path(os.environ["EQUIPOISE_DATA"]) / file
    suite = load_suite(HARMFUL, "file", path=str(path), taxonomy=taxonomy)
    assert len(suite.exchanges) == number
    assert {exchange.category for exchange in suite.exchanges} <= set(load_taxonomy().ids)
