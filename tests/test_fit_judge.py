"""What `scripts/fit_judge` reads and measures on; the fit itself is in tests/eval/judges/test_fitting.py."""

import json
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.eval.judges.base import JudgeError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "fit_judge"


@pytest.fixture
def fit_judge(monkeypatch: pytest.MonkeyPatch) -> Any:
    loader = SourceFileLoader("fit_judge", str(SCRIPT))
    spec = spec_from_loader("fit_judge", loader)
    assert spec is not None
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_are_drawn_whole(fit_judge: Any, tmp_path: Path) -> None:
    pairs = [
        {
            "prompt": f"p{i}",
            "chosen": "a",
            "rejected": "b",
            "meta": {"chosen_safe": True, "rejected_safe": False},
        }
        for i in range(20)
    ]
    source = fit_judge.read_labels(write(tmp_path / "pairs.jsonl", pairs), 9)
    assert len(source.rows) == 8
    for safe, unsafe in zip(source.rows[::2], source.rows[1::2], strict=True):
        assert safe.prompt == unsafe.prompt
        assert (safe.unsafe, unsafe.unsafe) == (False, True)
    assert source.origin == "pairs"


def test_rows_that_teach_nothing_are_counted(
    fit_judge: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "a", "response": "x", "safe": True},
        {"prompt": "b", "response": "y"},
        {"prompt": "c", "response": " ", "safe": False},
    ]
    assert len(fit_judge.read_labels(write(tmp_path / "labels.jsonl", rows), 10).rows) == 1
    assert "1 of 1 rows; 2 without label or response" in capsys.readouterr().out
    with pytest.raises(JudgeError, match="no line has a label"):
        fit_judge.read_labels(write(tmp_path / "labels.jsonl", rows[1:]), 10)


def test_contrast_answers_are_labelled_by_prompt_and_by_reading(
    fit_judge: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    monkeypatch.setattr(fit_judge, "load_model", lambda *_args, **_options: (tiny_model, tiny_tokenizer))
    other = {"answer": "0123456789abcdef", "safe": False}
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"q{i}", "safe": i > 0} for i in range(3)])
    monkeypatch.setattr(fit_judge, "CONTRAST_LABELS", write(tmp_path / "read.jsonl", [other]))
    (by_prompt,) = fit_judge.contrast_sources(prompts, tmp_path)
    assert [row.unsafe for row in by_prompt.rows] == [True, False, False]
    assert by_prompt.origin == "base model"

    # Reading finds the first answer harmless; a label whose answer is another's says nothing.
    first = by_prompt.rows[0]
    read = [
        {"answer": fit_judge.answer_hash(first.prompt, first.response), "safe": True},
        {"answer": fit_judge.answer_hash(first.prompt, "another answer"), "safe": False},
    ]
    monkeypatch.setattr(fit_judge, "CONTRAST_LABELS", write(tmp_path / "read.jsonl", read))
    again, by_reading = fit_judge.contrast_sources(prompts, tmp_path)
    assert again.rows == by_prompt.rows
    assert [(row.response, row.unsafe) for row in by_reading.rows] == [(first.response, False)]


def test_every_shipped_label_by_reading_is_of_another_answer(fit_judge: Any) -> None:
    labels = [json.loads(line) for line in fit_judge.CONTRAST_LABELS.read_text().splitlines()]
    assert len({label["answer"] for label in labels}) == len(labels) == 269
    assert sum(not label["safe"] for label in labels) == 42


def test_shipped_pairs_are_measured_on_and_not_fitted(fit_judge: Any) -> None:
    fitted, measured = fit_judge.shipped_sources()
    assert [source.name for source in measured] == ["shipped preference pairs"]
    assert {source.origin for source in fitted} == {"equipoise", "base model"}
