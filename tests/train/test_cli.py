import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.data.errors import DataError, EquipoiseError, FirstRankError
from equipoise.train import cli
from equipoise.train.preemption import Preempted
from equipoise.train.recipe import Recipe, RecipeError

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One rank, in an empty folder, with Hydra's variable as a shell has it."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.delenv(cli.EXIT_CODE_FILE, raising=False)
    monkeypatch.chdir(tmp_path)


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command line that is the user's to mend; nothing else is printed, nothing is written."""
    assert cli.main(arguments) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("equipoise: ")
    assert "Traceback" not in captured.err
    assert list(Path.cwd().iterdir()) == []
    return captured.err.removeprefix("equipoise: ").strip()


def test_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(capsys)
    assert message == ("No recipe is named. Add recipe=NAME; possible: " + ", ".join(RECIPES))


def test_an_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(capsys, "recipe=tdsi")
    assert message.startswith(
        "recipe=tdsi: there is no such option; did you mean 'tsdi'? possible: category_dro"
    )


def test_an_unknown_option_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert "possible: apo_zero, hinge, ipo, robust, safedpo, sigmoid" in failed(
        capsys, "recipe=tsdi", "loss=dpo"
    )


def test_misspelt_keys_and_wrong_values_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(capsys, "recipe=tsdi", "modle=hub", "beta=abc", "stages.safe.kl.coeff=1", "lam=-1")
    assert "The recipe has 4 problems:" in message
    assert "modle: unknown key; did you mean 'model'?" in message
    assert "beta: found 'abc', expected a number" in message
    assert "stages.safe.kl.coeff: unknown key; did you mean 'coef'?" in message
    assert "lam: found -1.0, expected a number above 0" in message


def test_a_lambda_that_the_recipe_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert "lam: no stage of this recipe refers to ${lam}" in failed(capsys, "recipe=dpo", "lam=4")


def test_overrides_that_hydra_cannot_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(capsys, "recipe=tsdi", "beta").startswith("Error parsing override 'beta'")
    message = failed(capsys, "recipe=tsdi", "lam=1,2")
    assert message.startswith("Ambiguous value for argument 'lam=1,2'")
    assert "multirun" not in message


@pytest.mark.parametrize("flag", ["-m", "--multirun", "hydra.mode=MULTIRUN"])
def test_multirun_is_refused(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert "Start one launch a point" in failed(capsys, "recipe=tsdi", flag)


def test_an_unknown_flag_exits_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--foo"]) == 2
    assert "unrecognized arguments: --foo" in capsys.readouterr().err


def test_only_the_first_rank_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main([]) == cli.USER_ERROR
    assert capsys.readouterr() == ("", "")


def test_cfg_job_prints_the_composed_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe=tsdi", "lam=4", "stages.safe.kl.coef=0.1", "--cfg", "job", "--resolve"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert list(printed["stages"]) == ["helpful", "safe", "token_bias"]
    assert printed["stages"]["safe"]["lam"] == 4
    assert printed["stages"]["safe"]["kl"] == {"coef": 0.1}
    assert "hydra" not in printed


def test_help_lists_recipes_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert f"recipe: {', '.join(RECIPES)}" in printed
    assert "Exit codes: 0 the gate passed" in printed


def test_a_users_own_folder_of_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [tsdi, _self_]\nname: careful\nbeta: 0.5\n"
    (tmp_path / "mine" / "recipe" / "careful.yaml").write_text(text)
    cfg = cli.compose(["--config-dir", str(tmp_path / "mine"), "recipe=careful"])
    assert cfg is not None
    assert (cfg.name, cfg.stages.safe.beta) == ("careful", 0.5)


def test_composing_leaves_no_trace() -> None:
    before = list(sys.argv)
    assert cli.compose(["recipe=dpo"]) is not None
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("code", [0, 3, 4])
def test_the_runs_exit_code_is_passed_on(code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Recipe] = []

    def run(recipe: Recipe) -> int:
        seen.append(recipe)
        return code

    monkeypatch.setattr("equipoise.train.run.run", run)
    monkeypatch.setenv(cli.EXIT_CODE_FILE, str(tmp_path / "code"))
    assert cli.main(["recipe=tsdi", "lam=4"]) == code
    assert (tmp_path / "code").read_text() == f"{code}\n"
    assert [recipe.lam for recipe in seen] == [4.0]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("mend the data"), 2, "equipoise: mend the data\n"),
        (KeyboardInterrupt(), 130, "equipoise: interrupted; the same command resumes.\n"),
    ],
)
def test_what_a_run_raises_becomes_an_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(recipe: Recipe) -> int:
        raise error

    monkeypatch.setattr("equipoise.train.run.run", run)
    assert cli.main(["recipe=tsdi"]) == code
    assert capsys.readouterr().err == message


def test_a_crash_shows_its_traceback_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(recipe: Recipe) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr("equipoise.train.run.run", run)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["recipe=tsdi"]) == cli.CRASH
    assert "RuntimeError: a defect" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train.py"], ["-m", "equipoise.train"]])
def test_a_mistake_is_found_without_importing_torch(command: list[str], tmp_path: Path) -> None:
    entry = [str(ROOT / "train.py")] if command == ["train.py"] else command
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *entry, "recipe=tsdi", "modle=hub"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "modle: unknown key" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "omegaconf" in imported
    assert not imported & {"torch", "transformers"}
    assert list(tmp_path.iterdir()) == []


# ---- one rank among several -----------------------------------------------------------------------------------------


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, BaseException], int]:
    """`ends(rank, error)`: the exit code of one of two ranks whose run raises; codes are written to `code`."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(cli.EXIT_CODE_FILE, str(tmp_path / "code"))

    def end(rank: int, error: BaseException) -> int:
        def run(recipe: Recipe) -> int:
            raise error

        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr("equipoise.train.run.run", run)
        return cli.main(["recipe=tsdi"])

    return end


def test_a_rank_says_what_it_alone_has_met(ends: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(1, EquipoiseError("the disk is full")) == cli.USER_ERROR
    assert capsys.readouterr().err == "equipoise, rank 1: the disk is full\n"
    assert ends(1, ZeroDivisionError()) == cli.CRASH
    assert capsys.readouterr().err.startswith("equipoise, rank 1 crashed:\nTraceback")
    for of_all in (
        DataError("no such file"),
        RecipeError("no such key"),
        FirstRankError("the first rank failed"),
    ):
        assert ends(1, of_all) == cli.USER_ERROR
        assert capsys.readouterr().err == ""


def test_what_a_rank_meets_because_another_is_gone(ends: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    assert ends(0, gone) == cli.CRASH
    assert capsys.readouterr().err == (
        "equipoise: another rank is gone; what ended it stands in its own lines\n"
    )


@pytest.mark.parametrize("consequence", [Preempted(), RuntimeError("Connection reset by peer")])
def test_a_rank_that_failed_decides_the_exit_code(
    consequence: BaseException, ends: Any, tmp_path: Path
) -> None:
    """The launcher tells the others to end, and a run that seems preempted would be queued again."""
    ends(1, EquipoiseError("the disk is full"))
    ends(0, consequence)
    assert (tmp_path / "code").read_text() == "2\n"


def test_ranks_that_are_all_told_to_end_are_preempted(ends: Any, tmp_path: Path) -> None:
    ends(1, Preempted())
    assert not (tmp_path / "code").exists()
    ends(0, Preempted())
    assert (tmp_path / "code").read_text() == "75\n"
