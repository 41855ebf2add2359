import argparse
import importlib
import json
from pathlib import Path

import pytest


def test_the_data_benchmark_measures_every_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "scripts")
    data = importlib.import_module("benchmarks.data")
    parser = argparse.ArgumentParser()
    data.add_command(parser.add_subparsers())
    assert data.run(parser.parse_args(["data", "--num-pairs", "200", "--json"]), Path("benchmark")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_pairs"] == 200
    assert set(result["seconds"]) == {"generate", "clean", "split", "categorise"}
    assert result["total_seconds"] > 0
    assert result["peak_memory_bytes"] > 2**20
