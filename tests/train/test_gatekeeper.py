import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.data.sources import SafetyData
from equipoise.eval.fingerprint import model_fingerprint
from equipoise.eval.gate import GateRules, GateVerdict
from equipoise.eval.generation.tsdi import TokenBias, TSDISettings
from equipoise.eval.generation.tsdi_decoding import TOKEN_BIAS_FILE
from equipoise.train.evaluation_process import EvaluationError
from equipoise.train.gatekeeper import ALIGNED, BASE, TSDI, Gatekeeper, promote
from equipoise.train.model import save_folder
from equipoise.train.recipe import EvaluationConfig, ModelConfig, Recipe, RecipeError
from equipoise.train.stages.context import StageContext

# With an alpha like this two prompts a category are enough to say something.
LENIENT = {
    "alpha": 0.9,
    "category_limit": 1.0,
    "overall_limit": 1.0,
    "over_refusal_margin": 1.0,
    "min_samples": 1,
}
REPORTS = {"report.json", "report.html", "report.md"}
STRICT = {"category_limit": 0.0, "overall_limit": 0.0, "min_samples": 1}


def safe(prompt: str, response: str) -> bool:
    return False


def unsafe(prompt: str, response: str) -> bool:
    return True


@pytest.fixture
def quick_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTML without plots: they take a second each, and have tests of their own."""
    monkeypatch.setattr(
        "equipoise.train.gatekeeper.write_report", lambda path, *_, **__: path.write_text("<html>")
    )


@pytest.fixture
def gatekeeper(
    tmp_path: Path,
    tiny_model_folder: Path,
    make_data: Callable[..., SafetyData],
    make_judge: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Gatekeeper:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))  # the base's report is shared between runs
    recipe = Recipe(
        name="test",
        stages={},
        model=ModelConfig(id=str(tiny_model_folder), dtype="float32"),
        evaluation=EvaluationConfig(max_new_tokens=3, batch_size=8),
    )
    logged: list[tuple[dict[str, float], int, str]] = []
    context = StageContext(
        recipe=recipe,
        data=make_data(1),
        run_dir=tmp_path / "run",
        base_folder=str(tiny_model_folder),
        log=lambda metrics, step, stage: logged.append((dict(metrics), step, stage)),
        rewind=lambda stage, step: None,
        say=lambda text: None,
        progress=lambda *call: None,
    )
    context.run_dir.mkdir()
    (context.run_dir / "recipe.yaml").write_text(yaml.safe_dump({"name": "test"}))
    keeper = Gatekeeper(context, make_judge(safe), GateRules(**LENIENT))
    keeper.logged = logged  # type: ignore[attr-defined]
    return keeper


def verdicts(gatekeeper: Gatekeeper) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (gatekeeper.context.run_dir / "gate.jsonl").read_text().splitlines()]


def test_a_report_is_written_logged_and_fed_back(gatekeeper: Gatekeeper, make_judge: Any) -> None:
    context = gatekeeper.context
    gatekeeper.judge = make_judge(lambda prompt, response: "S2" in prompt)
    report = gatekeeper.evaluate(BASE, "base-0", context.base_folder)
    assert {p.name for p in (context.run_dir / "eval" / "base-0").iterdir()} == REPORTS
    assert (report.state, report.model, len(report.samples)) == (BASE, context.base_folder, 6 + 6 + 4)
    assert context.unsafe_counts == {"S1": (0, 2), "S2": (2, 2), "S10": (0, 2)}
    [(metrics, step, label)] = gatekeeper.logged  # type: ignore[attr-defined]
    assert (step, label) == (0, "base-0")
    assert metrics["eval/unsafe_rate/S2"] == 1
    assert metrics["eval/unsafe_rate"] == pytest.approx(1 / 3)
    assert metrics["eval/over_refusal_rate"] == pytest.approx(1 / 3)
    assert metrics["eval/helpfulness"] < 0


@pytest.mark.usefixtures("quick_reports")
def test_a_report_that_is_there_is_not_made_again(gatekeeper: Gatekeeper) -> None:
    first = gatekeeper.evaluate(BASE, "base-0", gatekeeper.context.base_folder)
    again = Gatekeeper(gatekeeper.context, None, gatekeeper.rules)  # nobody to judge
    gatekeeper.context.unsafe_counts = None
    assert again.evaluate(BASE, "base-0", gatekeeper.context.base_folder) == first
    assert gatekeeper.context.unsafe_counts == {"S1": (0, 2), "S2": (0, 2), "S10": (0, 2)}
    metrics, once_more = gatekeeper.logged  # type: ignore[attr-defined]
    assert once_more == metrics  # the file leaves out what it has


@pytest.mark.usefixtures("quick_reports")
def test_of_runs_that_start_together_one_judges_the_base(gatekeeper: Gatekeeper, tmp_path: Path) -> None:
    context = gatekeeper.context
    keepers = []
    for name in ("a", "b"):
        shutil.copytree(context.run_dir, tmp_path / name)
        keepers.append(replace(gatekeeper, context=replace(context, run_dir=tmp_path / name), reports={}))
    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(lambda keeper: keeper.evaluate(BASE, "base-0", context.base_folder), keepers))
    assert gatekeeper.judge is not None
    assert gatekeeper.judge.num_judged == 12  # type: ignore[attr-defined]
    assert reports[0] == reports[1]


@pytest.mark.usefixtures("quick_reports")
def test_a_torn_report_is_made_again(gatekeeper: Gatekeeper) -> None:
    folder = gatekeeper.context.run_dir / "eval" / "safe-4"
    first = gatekeeper.evaluate(ALIGNED, "safe-4", gatekeeper.context.base_folder)
    (folder / "report.json").write_text((folder / "report.json").read_text()[:100])
    assert gatekeeper.evaluate(ALIGNED, "safe-4", gatekeeper.context.base_folder).samples == first.samples
    assert gatekeeper.judge is not None
    assert gatekeeper.judge.num_judged == 24  # type: ignore[attr-defined]


@pytest.mark.usefixtures("quick_reports")
def test_a_report_of_other_weights_is_made_again(gatekeeper: Gatekeeper, tmp_path: Path) -> None:
    """A run that was interrupted behind an evaluation may come to other weights where training is not deterministic."""
    base, other = gatekeeper.context.base_folder, tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: -weight for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    first = gatekeeper.evaluate(ALIGNED, "safe-4", base)
    assert gatekeeper.evaluate(ALIGNED, "safe-4", base) == first
    second = gatekeeper.evaluate(ALIGNED, "safe-4", str(other))
    assert second.engine["weights"] == model_fingerprint(str(other)) != first.engine["weights"]
    assert [s.response for s in second.samples] != [s.response for s in first.samples]
    third = gatekeeper.evaluate(ALIGNED, "safe-4", str(other), token_bias=no_bias())
    assert third.engine["tsdi"] is not None


@pytest.mark.usefixtures("quick_reports")
def test_another_verdict_on_the_same_step_is_recorded_beside_the_first(
    gatekeeper: Gatekeeper, make_judge: Any
) -> None:
    """Where training is not deterministic, a resumed run may come to other weights: both verdicts were given."""
    folder = gatekeeper.context.base_folder
    gatekeeper.evaluate(BASE, "base-0", folder)
    gatekeeper.evaluate(ALIGNED, "safe-4", folder)
    gatekeeper.decide(ALIGNED, "safe-4", folder)
    gatekeeper.judge, gatekeeper.rules = make_judge(unsafe), GateRules(**STRICT)
    shutil.rmtree(gatekeeper.context.run_dir / "eval" / "safe-4")
    gatekeeper.evaluate(ALIGNED, "safe-4", folder)
    gatekeeper.decide(ALIGNED, "safe-4", folder)
    assert [(line["label"], line["promoted"]) for line in verdicts(gatekeeper)] == [
        ("safe-4", True),
        ("safe-4", False),
    ]
    assert [line["weights"] for line in verdicts(gatekeeper)] == [model_fingerprint(folder)] * 2
    assert gatekeeper.promoted == ALIGNED  # what is in promoted/ has its PASS on record


@pytest.mark.usefixtures("quick_reports")
def test_an_evaluation_apart_that_fails_gives_no_verdict(
    gatekeeper: Gatekeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = gatekeeper.context
    context.recipe.gate.where = "subprocess"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EvaluationError, match="ended with exit code 1"):
        gatekeeper.evaluate(ALIGNED, "safe-4", context.base_folder)
    assert gatekeeper.reports == {}
    assert not (context.run_dir / "gate.jsonl").exists()
    assert not (context.run_dir / "promoted").exists()
    assert {p.name for p in (context.run_dir / "eval" / "safe-4").iterdir()} == {"process.log"}
    context.recipe.gate.where = "in_process"
    assert gatekeeper.evaluate(ALIGNED, "safe-4", context.base_folder).samples


def test_vllm_has_to_be_there_before_anything_is_trained(gatekeeper: Gatekeeper) -> None:
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    gatekeeper.context.recipe.gate.where = "vllm"
    with pytest.raises(RecipeError, match=r"gate\.where: found 'vllm', but vLLM is not installed"):
        Gatekeeper(gatekeeper.context, gatekeeper.judge, gatekeeper.rules)


def test_pass_is_promoted(gatekeeper: Gatekeeper, tiny_model_folder: Path) -> None:
    context = gatekeeper.context
    gatekeeper.evaluate(BASE, "base-0", context.base_folder)
    gatekeeper.evaluate(ALIGNED, "safe-4", str(tiny_model_folder))
    result = gatekeeper.decide(ALIGNED, "safe-4", str(tiny_model_folder))
    assert (result.verdict, gatekeeper.promoted) == (GateVerdict.PASS, ALIGNED)
    promoted = context.run_dir / "promoted"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(promoted), AutoTokenizer.from_pretrained(promoted)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hm?"}], return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=2).shape[0] == 1
    [line] = verdicts(gatekeeper)
    assert (line["label"], line["promoted"], line["verdict"]) == ("safe-4", True, "PASS")
    assert {p.name for p in (context.run_dir / "eval" / "safe-4").iterdir()} == REPORTS


@pytest.mark.usefixtures("quick_reports")
@pytest.mark.parametrize(
    ("rules", "verdict"),
    [(STRICT, GateVerdict.FAIL), (LENIENT | {"min_samples": 1000}, GateVerdict.INCONCLUSIVE)],
)
def test_nothing_else_is_promoted(
    rules: dict[str, Any], verdict: GateVerdict, gatekeeper: Gatekeeper, make_judge: Any
) -> None:
    gatekeeper.judge, gatekeeper.rules = make_judge(unsafe), GateRules(**rules)
    gatekeeper.evaluate(BASE, "base-0", gatekeeper.context.base_folder)
    gatekeeper.evaluate(ALIGNED, "safe-4", gatekeeper.context.base_folder)
    assert gatekeeper.decide(ALIGNED, "safe-4", gatekeeper.context.base_folder).verdict is verdict
    assert gatekeeper.promoted is None
    assert not (gatekeeper.context.run_dir / "promoted").exists()
    assert [line["promoted"] for line in verdicts(gatekeeper)] == [False]


@pytest.mark.usefixtures("quick_reports")
def test_a_verdict_is_recorded_once(gatekeeper: Gatekeeper) -> None:
    folder = gatekeeper.context.base_folder
    gatekeeper.evaluate(BASE, "base-0", folder)
    for label in ("safe-2", "safe-4", "safe-4"):  # the last: an interrupted run, started again
        gatekeeper.evaluate(ALIGNED, label, folder)
        gatekeeper.decide(ALIGNED, label, folder)
    assert [line["label"] for line in verdicts(gatekeeper)] == ["safe-2", "safe-4"]
    logged = [entry for entry in gatekeeper.logged if "gate/exit_code" in entry[0]]  # type: ignore[attr-defined]
    assert [label for _, _, label in logged] == ["safe-2", "safe-4", "safe-4"]
    assert logged[1] == logged[2]  # the file leaves out what it has


@pytest.mark.usefixtures("quick_reports")
def test_a_run_killed_while_it_logs_a_promoted_model_logs_it_again(gatekeeper: Gatekeeper) -> None:
    folder = gatekeeper.context.base_folder
    logged: list[tuple[str, ...]] = []

    def killed_once(promoted: Path, aliases: tuple[str, ...], verdict: object) -> None:
        logged.append(aliases)
        if len(logged) == 1:
            raise KeyboardInterrupt

    gatekeeper.context.log_promoted = killed_once
    gatekeeper.evaluate(BASE, "base-0", folder)
    gatekeeper.evaluate(ALIGNED, "safe-4", folder)
    with pytest.raises(KeyboardInterrupt):
        gatekeeper.decide(ALIGNED, "safe-4", folder)
    for _ in range(2):
        gatekeeper.decide(ALIGNED, "safe-4", folder)
    assert logged == [("promoted", ALIGNED, "safe-4")] * 2
    assert len(verdicts(gatekeeper)) == 1


@pytest.mark.usefixtures("quick_reports")
def test_going_through_old_verdicts_again_promotes_nothing(gatekeeper: Gatekeeper, tmp_path: Path) -> None:
    """A run that is resumed decides anew on the stages that are finished; the state promoted after them stays."""
    base = gatekeeper.context.base_folder
    later = tmp_path / "later"
    shutil.copytree(base, later)
    (later / "later.txt").touch()
    gatekeeper.evaluate(BASE, "base-0", base)
    for label, folder in (("helpful-2", base), ("safe-4", str(later)), ("helpful-2", base)):
        gatekeeper.evaluate(ALIGNED, label, folder)
        gatekeeper.decide(ALIGNED, label, folder)
    assert (gatekeeper.context.run_dir / "promoted" / "later.txt").exists()
    assert [line["label"] for line in verdicts(gatekeeper)] == ["helpful-2", "safe-4"]


def no_bias() -> TokenBias:
    tables = {name: torch.zeros(2, 259) for name in ("bias", "mean_probability")}
    return TokenBias(settings=TSDISettings(num_prompts=1, num_positions=2), **tables)


@pytest.mark.usefixtures("quick_reports")
def test_a_promoted_token_bias_goes_with_its_model(gatekeeper: Gatekeeper) -> None:
    bias = no_bias()
    folder = gatekeeper.context.base_folder
    gatekeeper.evaluate(BASE, "base-0", folder)
    report = gatekeeper.evaluate(TSDI, "token_bias-0", folder, token_bias=bias)
    # A bias of nothing changes nothing.
    assert [s.response for s in report.samples] == [s.response for s in gatekeeper.reports[BASE].samples]
    gatekeeper.decide(TSDI, "token_bias-0", folder, bias)
    promoted = gatekeeper.context.run_dir / "promoted"
    assert torch.equal(TokenBias.load(promoted / TOKEN_BIAS_FILE).bias, bias.bias)
    assert "lm_head.weight" in load_file(promoted / "model.safetensors")


def test_a_later_promotion_replaces_an_earlier_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    promote(tmp_path / "first", no_bias(), tmp_path / "promoted")
    assert {p.name for p in (tmp_path / "promoted").iterdir()} == {
        "first.txt",
        TOKEN_BIAS_FILE,
        "custom_generate",
    }
    promote(tmp_path / "second", None, tmp_path / "promoted")
    assert {p.name for p in (tmp_path / "promoted").iterdir()} == {"second.txt"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    save_folder(tmp_path / "model", lambda aside: (aside / "a").write_text("old") and None)

    def fail(aside: Path) -> None:
        (aside / "a").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_folder(tmp_path / "model", fail)
    assert (tmp_path / "model" / "a").read_text() == "old"
