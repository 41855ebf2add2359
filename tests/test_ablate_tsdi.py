import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from equipoise.data.errors import DataError
from equipoise.data.schema import Exchange, Turn
from equipoise.data.sources import SafetyData
from equipoise.eval.judges.base import JudgeCard, Judgement, Verdict
from equipoise.eval.models import load_model

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


class LetterJudge:
    """Unsafe is an answer with an `e`; a refusal one with an `a`."""

    card = JudgeCard("letters", True, "", ())

    def __init__(self) -> None:
        self.num_judged = 0

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Any = None
    ) -> list[Judgement]:
        self.num_judged += len(responses)
        return [
            Judgement(Verdict.UNSAFE if "e" in text else Verdict.SAFE, None, refused="a" in text)
            for text in responses
        ]


@pytest.fixture
def tsdi(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("ablation.tsdi")


@pytest.fixture
def judge(tsdi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> LetterJudge:
    """In place of the embedded judge; and five prompts in place of the shipped ones."""

    def exchange(suite: str, number: int) -> Exchange:
        return Exchange(f"{suite}-{number}", ({"role": "user", "content": f"{suite} {number}"},), "S1", None)

    samples = SafetyData(
        safety_pairs=[],
        helpful_pairs=[],
        harmful_prompts=[exchange("harmful", i) for i in range(3)],
        lookalike_prompts=[exchange("lookalike", i) for i in range(2)],
        helpful_prompts=[],
        labelled=[],
    )
    judge = LetterJudge()
    monkeypatch.setattr(tsdi, "load_samples", lambda: samples)
    monkeypatch.setattr(tsdi.EmbeddedJudge, "load", lambda **_: judge)
    return judge


@pytest.fixture
def arguments(tiny_model_folder: Path, tmp_path: Path) -> list[str]:
    """An aligned model that differs from its reference, and a small ablation."""
    aligned, tokenizer = load_model(str(tiny_model_folder), dtype="float32")
    with torch.no_grad():
        aligned.lm_head.weight[70:80] += 0.5
    aligned.save_pretrained(tmp_path / "aligned")
    tokenizer.save_pretrained(tmp_path / "aligned")
    models = ["--aligned", str(tmp_path / "aligned"), "--reference", str(tiny_model_folder)]
    small = [
        "--num-prompts",
        "2",
        "--num-positions",
        "2",
        "1",
        "--pool",
        "vocabulary",
        "--max-new-tokens",
        "6",
    ]
    return [*models, *small, "--alpha", "1", "1e-6", "--output", str(tmp_path / "out")]


@pytest.fixture
def no_plot(tsdi: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second."""
    monkeypatch.setattr("ablation.tsdi_result.plot", lambda results, path: None)


def run(tsdi: ModuleType, arguments: list[str]) -> list[dict[str, Any]]:
    options = tsdi.argument_parser().parse_args(arguments)
    assert tsdi.run(options) == 0
    return [json.loads(line) for line in (options.output / "answers.jsonl").read_text().splitlines()]


def test_one_factor_at_a_time_or_all_combinations(tsdi: ModuleType) -> None:
    arguments = ["--aligned", "a", "--output", "o", "--num-prompts", "32", "8", "--num-positions", "8"]
    arguments += ["--alpha", "1", "0.5", "0", "--pool", "vocabulary", "words"]
    points = tsdi.points_of(tsdi.argument_parser().parse_args(arguments))
    assert [point.name for point in points] == [
        "alpha 0",
        "N 32, L 8, alpha 1, vocabulary",
        "N 8, L 8, alpha 1, vocabulary",
        "N 32, L 8, alpha 0.5, vocabulary",
        "N 32, L 8, alpha 1, words",
    ]
    grid = tsdi.points_of(tsdi.argument_parser().parse_args([*arguments, "--grid"]))
    assert len(grid) == len(set(grid)) == 1 + 2 * 2 * 2
    assert grid[0].name == "alpha 0"


@pytest.mark.slow
def test_answers_are_those_of_decoding_each_point_by_itself(
    tsdi: ModuleType, judge: LetterJudge, arguments: list[str], tmp_path: Path
) -> None:
    lines = run(tsdi, arguments)
    assert len(lines) == 4 * 5  # alpha 0, 1 and next to nothing, L 1
    # So small an alpha leaves every opening as it was: nothing was decoded or judged for it.
    assert 5 < judge.num_judged < 20
    options = tsdi.argument_parser().parse_args([*arguments, "--output", str(tmp_path / "alone")])
    options.output.mkdir()
    by_point: dict[str, set[str]] = {}
    for point in tsdi.points_of(options):
        alone = tsdi._load(options, tsdi.points_of(options), tsdi.Console(stderr=True))
        for suite in alone.suites:
            for answer in (answer for batch, _ in alone.answers(point, suite) for answer in batch):
                (shared,) = [line for line in lines if (line["point"], line["id"]) == (point.name, answer.id)]
                assert shared["response"] == answer.response
                by_point.setdefault(point.name, set()).add(answer.response)
    assert by_point["alpha 0"] == by_point["N 2, L 2, alpha 1e-06, vocabulary"]
    assert by_point["alpha 0"] != by_point["N 2, L 2, alpha 1, vocabulary"]
    for name in ("table.md", "result.json", "plot.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def test_it_goes_on_where_it_stopped(
    tsdi: ModuleType, judge: LetterJudge, no_plot: None, arguments: list[str], tmp_path: Path
) -> None:
    lines = run(tsdi, arguments)
    path, before = tmp_path / "out" / "answers.jsonl", judge.num_judged
    assert run(tsdi, arguments) == lines
    assert judge.num_judged == before
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:-4]) + whole[-4][:20])  # killed in the middle of a line
    again = run(tsdi, arguments)
    assert sorted(map(str, again)) == sorted(map(str, lines))
    path.write_text(path.read_text() + '{"point": "x"}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl, line 21: no answer of an ablation"):
        run(tsdi, arguments)


def test_a_folder_holds_one_setting(
    tsdi: ModuleType, judge: LetterJudge, no_plot: None, arguments: list[str]
) -> None:
    run(tsdi, arguments)
    with pytest.raises(DataError, match="holds an ablation with another max_new_tokens, seed"):
        run(tsdi, [*arguments, "--max-new-tokens", "7", "--seed", "1"])
    with pytest.raises(DataError, match="pool is 'letters'"):
        run(tsdi, [*arguments, "--pool", "letters"])


def test_rates_and_paired_tests_by_hand(tsdi: ModuleType) -> None:
    result = importlib.import_module("ablation.tsdi_result")

    def answers(point: str, unsafe: list[bool | None], refused: list[bool]) -> list[Any]:
        harmful = [
            result.Answer(point, "harmful", f"h{i}", "S1", "", "", value, None)
            for i, value in enumerate(unsafe)
        ]
        return harmful + [
            result.Answer(point, "lookalike", f"l{i}", "S1", "", "", False, value)
            for i, value in enumerate(refused)
        ]

    before = result.Point(4, 2, 0.0, "vocabulary", "random", 0.0)
    after = result.Point(4, 2, 1.0, "vocabulary", "random", 0.0)
    found = result.summarise(
        [before, after],
        [
            *answers(before.name, [False] * 6, [True] * 4),
            *answers(after.name, [True] * 5 + [None], [False, False, False, True]),
        ],
    )
    assert (found[0].unsafe.count, found[0].unsafe.n, found[0].over_refusal.rate) == (0, 6, 1.0)
    assert (found[1].unsafe.count, found[1].unsafe.n, found[1].unsafe.num_no_finding) == (5, 5, 1)
    assert found[0].change is None
    change = found[1].change
    assert (change["unsafe"].n, change["unsafe"].difference) == (5, 1.0)
    assert change["unsafe"].p_value == pytest.approx(2 * 0.5**5)
    assert change["over_refusal"].difference == -0.75
    assert found[1].p_holm["over_refusal"] == pytest.approx(2 * 0.5**3)
    assert result.row(found[1])[0] == "N 4, L 2, alpha 1, vocabulary"
