import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("benchmarks.evaluation")


def test_ratios_by_hand(evaluation: ModuleType) -> None:
    result = evaluation.summarise(
        {
            "seconds": {"engine": [2.0, 1.0, 4.0], "generate": [4.0, 3.0, 8.0], "lm_eval": [6.0, 3.0, 4.0]},
            "repeat_ratios": [0.01, 0.03, 0.02],
            "tsdi_ratios": [1.0, 1.25, 0.75],
            "num_different_answers": 0,
        }
    )
    assert result["generate_ratio"] == 2.0  # of 2, 3 and 2
    assert result["lm_eval_ratio"] == 3.0  # of 3, 3 and 1
    assert (result["repeat_ratio"], result["tsdi_ratio"]) == (0.02, 1.0)
    assert result["generate_ratio_spread"]["max"] == 3.0


def test_lm_eval_left_out_has_no_ratio(evaluation: ModuleType) -> None:
    measured = {"seconds": {"engine": [1.0], "generate": [2.0]}, "repeat_ratios": [0.1], "tsdi_ratios": [1.0]}
    assert evaluation.summarise(measured | {"num_different_answers": 0})["lm_eval_ratio"] is None


@pytest.mark.slow
def test_it_runs_and_both_sides_answer_alike(tiny_model_folder: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPTS / "benchmark"),
        "evaluation",
        "--model",
        str(tiny_model_folder),
        "--json",
    ]
    command += [
        "--num-prompts",
        "8",
        "--max-new-tokens",
        "6",
        "--batch-size",
        "3",
        "--repeats",
        "1",
        "--without-lm-eval",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_different_answers"] == 0
    assert result["setting"]["num_prompts"] == 8
    assert all(result[name] > 0 for name in ("generate_ratio", "repeat_ratio", "tsdi_ratio"))
    assert result["repeat_ratio"] < 1
