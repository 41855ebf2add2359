import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_cost_model(folder: Path, model_folder: Path) -> None:
    """A random cost model as PKU publishes them: some of its costs are above 0, some below."""
    folder.mkdir()
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tensors = {f"model.{name}": tensor.clone() for name, tensor in model.model.state_dict().items()}
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(8))
    save_file(tensors | {"score_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {"architectures": ["LlamaForScore"], "score_type": "cost", "do_normalize": False}
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | fields))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_all_ranks_decide_alike_wherever_a_state_is_evaluated(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    write_cost_model(tmp_path / "cost", tiny_model_folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("gate_on_ranks.py")
    done = subprocess.run(
        [*launch, str(script), str(tiny_model_folder), str(tmp_path / "cost"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "EQUIPOISE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for where in ("in_process", "subprocess"):
        assert second[where] == first[where]
    assert first["failing"] == "OSError: no space left"
    assert second["failing"] == "FirstRankError: the first rank failed: OSError: no space left"
    here, apart = first["in_process"], first["subprocess"]
    assert here["verdict"] == apart["verdict"]
    assert here["unsafe"] == apart["unsafe"]
    unsafe, judged = here["unsafe"]["S1"]
    assert 0 < unsafe < judged == 5

    def without_floats(report: dict[str, Any]) -> dict[str, Any]:
        """Batches differ between one process and two, and with them the last bits."""
        left = {key: value for key, value in report.items() if key not in ("seconds", "samples")}
        left["samples"] = [
            {key: value for key, value in sample.items() if key not in ("score", "p_unsafe", "judge_raw")}
            for sample in report["samples"]
        ]
        return left

    assert without_floats(here["report"]) == without_floats(apart["report"])
    for key in ("score", "p_unsafe"):
        values = [[sample[key] for sample in found["report"]["samples"]] for found in (here, apart)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert (tmp_path / "subprocess" / "eval" / "safe-2" / "process.log").exists()
    for where in ("in_process", "subprocess"):
        assert not (tmp_path / where / "eval" / "safe-2" / ".work").exists()
