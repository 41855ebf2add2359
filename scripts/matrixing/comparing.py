"""Whether a cell did what one process does: curves, sums, states, verdicts, weights, and the end of a resumed run."""

import json
import math
from pathlib import Path
from typing import Any

from matrixing.cells import ENGINES, ONE, TRAINERS
from safetensors import safe_open
from torch import Tensor

TOLERANCE = 1e-4
"""Largest difference of a metric, of a weight and of a state, in fp32: sums are added up in another order."""
WHOLE = 0.7
"""A rank that has read less than this share of a model has read a shard: of two ranks, half, rounded up a parameter."""
EXACT = ("/num_", "num_episodes", "held_out/num_pairs")
"""Metrics that are counts: of the same examples they are the same."""


def compare(folder: Path, cell: tuple[str, str], dtype: str) -> dict[str, Any]:
    """Check -> what was found; `passed` says whether all are as they should be.

    In bfloat16 two ranks round otherwise than one, and may sample other answers: how far they are from it is shown, and
    not judged.
    """
    trainer, engine = cell
    mine, one = folder / trainer / engine, folder / trainer / ONE
    stage = TRAINERS[trainer].stage
    ranks = [
        json.loads((mine / f"rank{i}.json").read_text(encoding="utf-8"))
        for i in range(ENGINES[engine].num_ranks)
    ]
    curves, counts, steps = _metrics(_logged(mine / "whole"), _logged(one / "whole"))
    found: dict[str, Any] = {
        "steps": steps,
        "metrics_max_difference": curves,
        "counts_differ": counts,
        "ranks_differ": _differing_ranks(ranks),
        "last_rank_read": (read := ranks[-1]["whole"]["smallest_share_read"]),
        "read_as_sharded": (read < WHOLE) == ENGINES[engine].shards_weights,
        "weights_max_difference": _weights(mine / "whole", one / "whole", stage),
        "state_max_difference": _states(ranks[0], one),
        "same_verdict": _verdicts(ranks[0]) == _verdicts(json.loads((one / "rank0.json").read_text())),
        "resumed_max_difference": _weights(mine / "told", mine / "whole", stage),
        "resumed_metrics_max_difference": _metrics(_logged(mine / "told"), _logged(mine / "whole"))[0],
    }
    differences = [value for name, value in found.items() if is_judged(name, dtype)]
    found["passed"] = (
        not (found["counts_differ"] and dtype == "float32")
        and not found["ranks_differ"]
        and found["same_verdict"]
        and found["read_as_sharded"]
        and all(value <= TOLERANCE for value in differences)
    )
    return found


def is_judged(name: str, dtype: str) -> bool:
    """Whether the check is a difference that has to be within the tolerance."""
    return name.endswith("max_difference") and (dtype == "float32" or name.startswith("resumed"))


def _logged(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without times and the evaluations (which only one pass has)."""
    lines = (run / "seed0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    return [
        {name: value for name, value in line.items() if name not in ("time", "exit_code")}
        for line in metrics
        if line["stage"] != "end" and not any(name.startswith(("eval/", "gate/")) for name in line)
    ]


def _metrics(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, list[str], int]:
    """(largest difference, counts that differ and lines that are missing, lines compared)."""
    largest, differing = 0.0, []
    if len(mine) != len(theirs):
        differing.append(f"{len(mine)} lines of metrics, {len(theirs)} of one process")
    for a, b in zip(mine, theirs, strict=False):
        where = f"{b['stage']} {b['step']}"
        differing += [f"{where}: {name} in one of them only" for name in a.keys() ^ b.keys()]
        for name in a.keys() & b.keys() - {"stage"}:
            if any(part in name for part in EXACT):
                if a[name] != b[name]:
                    differing.append(f"{where}: {name} is {a[name]}, of one process {b[name]}")
            else:
                largest = max(largest, _apart(a[name], b[name]))
    return largest, differing, len(mine)


def _apart(a: float, b: float) -> float:
    """|a - b|, in units of b where b is more than 1: a sum over an answer's tokens is as exact as its size allows."""
    if math.isnan(a) and math.isnan(b):
        return 0.0
    return abs(a - b) / max(1.0, abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf


def _weights(mine: Path, theirs: Path, stage: str) -> float:
    """Largest difference between the weights that two runs' stage left."""
    a, b = (_tensors(run / "seed0" / "stages" / stage) for run in (mine, theirs))
    if a.keys() != b.keys():
        return math.inf
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in b)


def _tensors(stage: Path) -> dict[str, Tensor]:
    """A stage's model, or the scorer it trained."""
    place = stage / "scorer" if (stage / "scorer").is_dir() else stage / "model"
    found = {}
    for file in place.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {f"{file.name}: {name}": tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert found, f"no weights in {place}"
    return found


def _differing_ranks(ranks: list[dict[str, Any]]) -> list[str]:
    """What two ranks do not hold alike: state after any step, verdicts, trained weights, exit code."""
    return [
        f"{label}: {name} of rank {i}"
        for i, rank in enumerate(ranks[1:], start=1)
        for label in rank
        for name in ("states", "verdicts", "weights", "exit_code")
        if rank[label][name] != ranks[0][label][name]
    ]


def _states(rank: dict[str, Any], one: Path) -> float:
    """Largest difference between the last step's category state, multipliers and windows, and one process'."""
    theirs = json.loads((one / "rank0.json").read_text(encoding="utf-8"))
    return _deep(rank["whole"]["states"][-1], theirs["whole"]["states"][-1])


def _deep(a: Any, b: Any) -> float:
    if isinstance(a, dict) and isinstance(b, dict):
        return math.inf if a.keys() != b.keys() else max((_deep(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list):
        return (
            math.inf
            if len(a) != len(b)
            else max((_deep(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
        )
    if isinstance(a, float | int) and isinstance(b, float | int):
        return _apart(float(a), float(b))
    return 0.0 if a == b else math.inf


def _verdicts(rank: dict[str, Any]) -> list[str]:
    return [verdict["verdict"] for verdict in rank["whole"]["verdicts"]]
