"""A few cells of `scripts/matrix` in real processes: sharded parameters on two ranks; the rest is run by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MATRIX = Path(__file__).resolve().parents[3] / "scripts" / "matrix"
CELLS = ("kto:fsdp2", "safe_rlhf:fsdp2")


@pytest.mark.slow
def test_sharded_parameters_train_as_one_process_does(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(MATRIX), "--cells", *CELLS, "--limit", "400", "--json", str(figures)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert figures.exists(), done.stderr[-3000:]
    cells = json.loads(figures.read_text())["cells"]
    assert cells.keys() == set(CELLS)
    for name, found in cells.items():
        assert found["passed"], f"{name}: {found}"
        assert found["steps"] >= 4
    assert done.returncode == 0
