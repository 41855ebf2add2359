"""A killed rank ends the run within a minute; real processes under torchrun. One that fails: test_distributed.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equipoise.train import cli

SCRIPT = Path(__file__).parents[1] / "dying_rank.py"


@pytest.mark.slow
def test_the_others_do_not_wait_for_a_rank_that_was_killed(tmp_path: Path, tiny_model_folder: Path) -> None:
    pairs = [
        {
            "id": f"{c}-{i}",
            "prompt": f"Question {i} of {c}",
            "chosen": f"No {i}",
            "rejected": f"Yes {i}",
            "category": c,
        }
        for c in ("S1", "helpful")
        for i in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = [
        "recipe=sft",
        "model=hub",
        f"model.id={tiny_model_folder}",
        "model.dtype=float32",
        "data=jsonl",
        f"data.path={tmp_path / 'pairs.jsonl'}",
        "evaluation.baseline=false",
        "stages.sft.evaluate=false",
        "stages.sft.num_steps=3",
        "stages.sft.per_device_batch_size=2",
        f"output_dir={tmp_path / 'outputs'}",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    done = subprocess.run(
        [*launch, str(SCRIPT), "kill", str(tmp_path / "died"), *arguments],
        env={**own, "OMP_NUM_THREADS": "1", cli.EXIT_CODE_FILE: str(tmp_path / "code")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    assert done.returncode != 0
    assert "equipoise: another rank is gone" in done.stderr
    assert "Traceback" not in done.stderr.partition("elastic")[0]  # of ours: what follows is the launcher's
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert (tmp_path / "code").read_text() == "1\n"
    assert not (tmp_path / "outputs/sft/seed0/stages/sft/done.json").exists()
