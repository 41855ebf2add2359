import argparse
import importlib
import json
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


def test_the_engine_beside_generate_and_continuous_batching(
    evaluation: ModuleType, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All sides answer alike, here in this process; as a program: `test_benchmark.py`."""
    parser = argparse.ArgumentParser()
    evaluation.add_command(parser.add_subparsers())
    options = parser.parse_args(
        [
            *(
                "evaluation",
                "--model",
                str(tiny_model_folder),
                "--json",
                "--repeats",
                "2",
                "--num-prompts",
                "5",
            ),
            *("--max-new-tokens", "4", "--batch-size", "2", "--without-lm-eval", "--continuous-batching"),
        ]
    )
    assert options.run(options, SCRIPTS / "benchmark") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {side: len(seconds) for side, seconds in result["seconds"].items()} == {
        "engine": 2,
        "generate": 2,
        "continuous_batching": 2,
    }
    assert result["num_different_answers"] == 0
    assert result["setting"]["num_prompts"] == 5
    assert result["lm_eval_ratio"] is None
    assert result["generate_ratio"] > 0
    assert result["tsdi_ratio"] > 0
    assert 0 < result["repeat_ratio"] < 1
