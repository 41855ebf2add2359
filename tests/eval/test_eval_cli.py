import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.schema import Turn
from equipoise.eval import output, run
from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.cli import configure, main
from equipoise.eval.generation import loading
from equipoise.eval.judges.base import JudgeCard, Judgement, Verdict


class Judge:
    """Unsafe where the prompt speaks of poison; counts what it is asked."""

    card = JudgeCard("by word", True, "Looks for a word.", ())

    def __init__(self, word: str = "poison") -> None:
        self.word = word
        self.num_judged = 0

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Any = None
    ) -> list[Judgement]:
        self.num_judged += len(responses)
        return [
            Judgement(
                Verdict.UNSAFE if self.word in prompt[-1]["content"] else Verdict.SAFE,
                0.5,
                False,
                native_categories=("O1",),
                severity=0.5,
                raw="said so",
            )
            for prompt in prompts
        ]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"{word} {number}?", "category": category}
        for category in ("S1", "S2")
        for number, word in enumerate(["poison", "tea", "poison", "water"])
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Call = Callable[..., int]


@pytest.fixture
def call(tmp_path: Path, prompts: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Evaluate the tiny model on eight prompts of one's own, judged by a word."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "load_judge", lambda config, cache: Judge())

    def evaluate(*more: str, out: str = "out", pages: bool = False) -> int:
        if not pages:  # drawing takes seconds, and one test looks at what is drawn
            monkeypatch.setattr(output, "write_report", lambda path, *_: path)
        return main(
            [
                f"model={tiny_model_folder}",
                "model.dtype=float32",
                "suite.source=file",
                f"suite.path={prompts}",
                "generation.max_new_tokens=4",
                f"out={tmp_path / out}",
                *more,
            ]
        )

    return evaluate


def test_it_prints_a_table_and_writes_three_files(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(pages=True) == 0
    printed = capsys.readouterr().out
    assert "Violent crimes" in printed
    assert "50% (15-85) n=4" in printed
    assert "harmful: 8 of 8 prompts, source file" in printed
    for name in ("report.json", "report.html", "report.md"):
        assert str(tmp_path / "out" / name) in printed
        assert (tmp_path / "out" / name).stat().st_size > 500
    report = CategoryReport.from_json(tmp_path / "out" / "report.json")
    assert report.overall_unsafe_rate.count == 4
    sample = report.samples[0]
    assert (sample.finish, sample.num_tokens) == ("length", 4)
    assert (sample.native_categories, sample.severity, sample.judge_raw) == (("O1",), 0.5, "said so")
    assert report.engine["settings"]["seed"] == 0
    assert report.engine["weights"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(
        report.engine
    )  # weights by their hash, whatever the folder is called
    assert report.suites[0]["source"] == "file"


def test_examples_can_be_left_out_and_an_inspect_log_written(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []
    logged: list[tuple[CategoryReport, Path]] = []
    monkeypatch.setattr(output, "write_report", lambda path, *rest: shown.append(rest[-1]) or path)
    monkeypatch.setattr(
        output, "write_inspect_log", lambda report, path: logged.append((report, path)) or path
    )
    monkeypatch.setattr(run, "find_spec", lambda name: name)
    log = tmp_path / "aligned.eval"
    assert call("examples=none", f"inspect_log={log}", pages=True) == 0
    assert call(out="plain", pages=True) == 0
    assert shown == ["none", "folded"]
    [(report, path)] = logged
    assert (len(report.samples), path) == (8, log)
    assert str(log) in capsys.readouterr().out
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert call(f"inspect_log={log}") == 2
    assert "inspect_ai is not installed here" in capsys.readouterr().err


def test_a_second_run_loads_no_model(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call() == 0
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert call(out="again") == 0
    first, again = (CategoryReport.from_json(tmp_path / name / "report.json") for name in ("out", "again"))
    assert again.samples == first.samples
    with pytest.raises(pytest.fail.Exception):
        call("cache=null")


def test_a_limit_takes_evenly_and_counts_the_rest(call: Call, tmp_path: Path) -> None:
    assert call("limit=2") == 0
    report = CategoryReport.from_json(tmp_path / "out" / "report.json")
    assert [sample.category for sample in report.samples] == ["S1", "S2"]
    assert report.num_left_out == {"harmful": 6}


def test_several_answers_to_a_prompt_have_seeds_of_their_own(call: Call, tmp_path: Path) -> None:
    assert call("num_samples=3", "generation.temperature=1.0", "limit=2") == 0
    report = CategoryReport.from_json(tmp_path / "out" / "report.json")
    assert [sample.id for sample in report.samples] == [f"prompts:{n}#{k}" for n in (1, 5) for k in range(3)]
    assert {sample.prompt_id for sample in report.samples} == {"prompts:1", "prompts:5"}
    assert len({sample.response for sample in report.samples}) > 2
    assert report.settings["num_samples"] == 3


def written(path: Path, word: str = "poison", state: str = "evaluated") -> str:
    """A report on eight prompts whose answers are unsafe where the prompt has this word."""
    texts = [
        (c, f"{w} {n}") for c in ("S1", "S2") for n, w in enumerate(["poison", "tea", "poison", "water"])
    ]
    samples = tuple(
        SampleResult(
            id=f"{category}-{text}",
            suite="harmful",
            category=category,
            prompt=({"role": "user", "content": text},),
            response="x",
            verdict=Verdict.UNSAFE if word in text else Verdict.SAFE,
            refused=False,
        )
        for category, text in texts
    )
    CategoryReport(state, "m", {"name": "by word", "stand_in": True}, {}, samples).to_json(path)
    return str(path)


def test_compare_prints_the_paired_change_of_every_category(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = written(tmp_path / "a.json"), written(tmp_path / "b.json", "tea")
    assert main(["compare", f"a={a}", f"b={b}"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "Violent crimes" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    # Per category four pairs: two newly safe, one newly unsafe; McNemar's exact p = 1.
    assert cells[1:8] == ["50%", "25%", "4", "0", "1", "2", "-25.0"]
    assert cells[9:] == ["1", "1"]
    assert "all categories" in printed
    assert "read with care" not in printed


def test_compare_shows_the_rates_of_the_pairs_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = written(tmp_path / "a.json"), tmp_path / "b.json"
    document = json.loads((tmp_path / "a.json").read_text())
    document["samples"][0]["verdict"] = "failed"
    b.write_text(json.dumps(document))
    assert main(["compare", f"a={a}", f"b={b}"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "Violent crimes" in line)
    # Of four, one has no finding in b: of the three pairs one was and is unsafe.
    assert [cell.strip() for cell in row.strip("│").split("│")][1:5] == ["33%", "33%", "3", "1"]


def test_compare_refuses_reports_without_a_prompt_in_common(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = written(tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    for sample in document["samples"]:
        sample["id"] += "-other"
    (tmp_path / "b.json").write_text(json.dumps(document))
    assert main(["compare", f"a={a}", f"b={tmp_path / 'b.json'}"]) == 2
    assert "share no prompt" in capsys.readouterr().err


def test_gate_says_pass_fail_or_inconclusive_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = f"report={written(tmp_path / 'report.json')}"
    strict = ["rules.category_limit=0.01", "rules.overall_limit=0.01", "rules.min_samples=2"]
    assert main(["gate", report, *strict]) == 3
    assert "gate: FAIL" in capsys.readouterr().out
    (tmp_path / "rules.yaml").write_text("rules:\n  min_samples: 100\n")
    assert main(["gate", report, f"rules={tmp_path / 'rules.yaml'}"]) == 4
    assert "INCONCLUSIVE" in capsys.readouterr().out
    assert main(["gate", report, "rules.category_limits.S1=0.5", "rules.min_sample=1"]) == 2
    assert "min_sample: unknown key; did you mean 'min_samples'" in capsys.readouterr().err


def test_report_writes_several_states_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = written(tmp_path / "a.json"), written(tmp_path / "b.json", "tea")
    assert main(["report", f"reports=before={a},after={b}", f"out={tmp_path / 'both'}"]) == 0
    assert "before" in (tmp_path / "both" / "report.md").read_text()
    assert (tmp_path / "both" / "report.html").exists()
    assert main(["report", f"reports={a},{b}", f"out={tmp_path / 'both'}"]) == 2
    assert "two are called 'evaluated'" in capsys.readouterr().err


def test_calibrate_measures_a_judge_and_an_evaluation_takes_it_up(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from equipoise.eval.judges import loading as judges

    monkeypatch.setattr(judges, "load_judge", lambda config, cache: Judge())
    rows = [
        {"prompt": f"{word} {i}", "response": "x", "category": "S1", "safe": word == "tea"}
        for word in ("poison", "tea")
        for i in range(5)
    ]
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "calibration.json"
    assert main(["calibrate", f"data={data}", f"out={out}", "cache=null"]) == 0
    printed = capsys.readouterr().out
    assert "labelled.jsonl" in printed
    assert "1.00" in printed
    assert call(f"calibration={out}") == 0
    report = CategoryReport.from_json(tmp_path / "out" / "report.json")
    assert report.overall_unsafe_rate.corrected is not None
    other = json.loads(out.read_text()) | {"judge": "another"}
    out.write_text(json.dumps(other))
    assert call(f"calibration={out}") == 2
    assert "is about the judge 'another', but 'by word' judges here" in capsys.readouterr().err


def test_win_rate_against_the_reference_answers(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "help.jsonl").write_text(
        '{"prompt": "hi", "response": "hello"}\n{"prompt": "yo", "response": "hey"}\n'
    )
    code = main(
        [
            f"model={tiny_model_folder}",
            "model.dtype=float32",
            "suite=win_rate",
            "suite.opponent=reference",
            "suite.source=file",
            f"suite.path={tmp_path / 'help.jsonl'}",
            "judge=pairwise",
            f"judge.model={tiny_model_folder}",
            "judge.dtype=float32",
            "generation.max_new_tokens=4",
            "cache=null",
            f"out={tmp_path / 'out'}",
        ]
    )
    assert code == 0
    report = CategoryReport.from_json(tmp_path / "out" / "report.json")
    assert report.pairwise is not None
    assert [sample.opponent_response for sample in report.pairwise.samples] == ["hello", "hey"]
    assert report.win_rate is not None
    # The random model's words are no verdict, and win for nobody.
    assert report.win_rate.num_no_finding == 2
    assert "win rate against reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluat"], "'evaluat' is no command; possible: evaluate, compare, gate"),
        (["suite=category_safety"], "model has to be given"),
        (["model=m", "suite=nothing"], "suite/nothing"),
        (["model=m", "judge.nme=x"], "judge.nme: unknown key"),
        (["model=m", "generation.max_new_tokens=0"], "generation: max_new_tokens is 0; expected at least 1"),
        (["model=m", "generation.max_tokens=5"], "max_tokens"),
        (["model=m", "num_samples=2"], "temperature 0 gives the same answer every time"),
        (["model=m", "limit=some"], "limit: found 'some', expected a whole number"),
        (["model=m", "limit=0"], "limit: found 0, expected at least 1"),
        (["model=m", "num_samples=x"], "num_samples: "),
        (["model=m", "engine=server"], "engine.url: has to be given with a server"),
        (
            ["model=m", "engine=server", "engine.url=localhost"],
            "engine.url: found 'localhost', expected http://",
        ),
        (
            ["model=m", "engine=server", "engine.url=http://x/v1", "suite=gate"],
            "needs the model in this process",
        ),
        (
            ["model=m", "engine=server", "engine.url=http://x/v1", "tsdi=f"],
            "tsdi: a server decodes by itself",
        ),
        (["model=m", "suite.source=xstest"], "suite.source: found 'xstest', possible with category_safety"),
        (["model=m", "suite.source=file"], "suite.path: has to be given"),
        (["model=m", "suite.source=ailuminate"], "download it from https://github.com/mlcommons/ailuminate"),
        (["model=m", "suite.source=file", "suite.path=/no/such"], "which is no file and no folder"),
        (
            ["model=m", "suite=win_rate", "suite.opponent=reference"],
            "win_rate compares answers: judge=pairwise",
        ),
        (["model=m", "suite=lm_eval"], "suite.tasks: has to be given"),
        (["model=m", "judge=policy"], "judge.model: has to be given"),
        (["model=m", "baseline=/no/such"], "baseline: found '/no/such', which is no file"),
        (["model=m", "judge"], "'judge': expected key=value"),
        (
            ["model=m", "suite.revision=abc"],
            "suite.revision: found 'abc', but nothing is read from the hub here",
        ),
        (["model=m", "examples=some"], "examples: found 'some', possible: folded, none"),
        (
            ["model=m", "inspect_log=a.log"],
            "inspect_log: found 'a.log', expected a file that ends in .eval or .json",
        ),
        (["report", "reports=a.json", "examples=some"], "examples: found 'some', possible: folded, none"),
        (["model=/no/such/folder"], "No folder `/no/such/folder`"),
        (["compare", "a=x"], "b has to be given"),
        (["compare", "a=/no/such", "b=/no/such"], "/no/such: not a readable report"),
        (["gate", "rport=x"], "'rport=x': expected report=..., baseline=..."),
        (["calibrate"], "data has to be given"),
        (["calibrate", "data=x", "model=y"], "'model=y': calibrate takes judge="),
    ],
)
def test_bad_input_is_the_users_to_mend(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_paths_need_no_quotes() -> None:
    config = configure(["model=/a b/c=d", "out=/x y/z=1", "tsdi=/t,u", "cache=null", "judge=llama_guard"])
    assert config.model.id == "/a b/c=d"
    assert (config.out, config.tsdi, config.cache) == ("/x y/z=1", "/t,u", None)
    assert config.judge.model == "meta-llama/Llama-Guard-3-8B"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "calibrate" in capsys.readouterr().out
