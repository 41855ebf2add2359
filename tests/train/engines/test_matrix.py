"""A few cells of `scripts/matrix` in real processes: sharded parameters on two ranks; the rest is run by hand."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise.train.locks import FolderInUseError

MATRIX = Path(__file__).resolve().parents[3] / "scripts" / "matrix"
CELLS = {"float32": ("kto:fsdp2", "safe_rlhf:fsdp2"), "bfloat16": ("preference:fsdp2",)}
"""In bfloat16 adapters are fp32: what FSDP makes of two dtypes is not seen in one."""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CELLS)
def test_sharded_parameters_train_as_one_process_does(dtype: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(MATRIX), "--cells", *CELLS[dtype], "--dtype", dtype]
    done = subprocess.run(
        [*command, "--limit", "400", "--json", str(figures)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert figures.exists(), done.stderr[-3000:]
    cells = json.loads(figures.read_text())["cells"]
    assert cells.keys() == set(CELLS[dtype])
    for name, found in cells.items():
        assert found["passed"], f"{name}: {found}"
        assert found["steps"] >= 4
    assert done.returncode == 0


def test_a_cell_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(MATRIX.parent)
    running = importlib.import_module("matrixing.running")
    launches: list[list[str]] = []

    def launch(
        folder: Path,
        engine: Any,
        trainers: Sequence[str],
        dtype: str,
        limit: float,
        ended: Callable[..., None],
    ) -> int:
        launches.append(list(trainers))
        for trainer in trainers:
            (folder / trainer / engine.name).mkdir(parents=True, exist_ok=True)
            late = len(launches) == 1 and trainer == "kto"
            ended(trainer, {"error": "not done after 1 s" if late else None, "seconds": 1.0, "tail": []})
        return len(trainers)

    monkeypatch.setattr(running, "_launch", launch)
    for _ in range(3):
        found = running.run_cells(
            tmp_path, "fsdp2", ["sft", "kto"], "float32", 1.0, lambda trainer, result: None
        )
    assert launches == [["sft", "kto"], ["kto"]]
    assert found["kto"]["error"] is None


def test_one_matrix_at_a_time_works_in_a_folder(
    tmp_path: Path, folder_in_use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(MATRIX.parent)
    command = importlib.import_module("matrixing.command")
    options = command.argument_parser("matrix").parse_args(["--cells", "sft:ddp", "--out", str(tmp_path)])
    with folder_in_use(tmp_path), pytest.raises(FolderInUseError, match=r"give another --out"):
        command.run(options)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
