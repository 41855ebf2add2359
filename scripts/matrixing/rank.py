"""What every process of a launch runs: `python rank.py JOB.json ...`, a job a cell.

Three passes in one process, for importing takes longer than they do: the recipe from end to end (`whole`); the same,
its last rank told to end by SIGTERM in the middle of a step (`told`); the same again, which goes on from what that
saved (`resumed`). Each rank writes down what it holds itself, so that ranks can be compared.
"""

import gc
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOLD_IN_STEP = 2
"""Optimizer steps that are done when the signal comes; the step it comes in is finished and saved."""


def main(job_files: list[str]) -> int:
    """Run one job after the other; returns the exit code."""
    jobs = [json.loads(Path(file).read_text(encoding="utf-8")) for file in job_files]
    if jobs[0]["fsdp_on_cpu"]:
        from fsdp_on_cpu import allow_fsdp_on_cpu

        allow_fsdp_on_cpu()
    if jobs[0]["shard_all"]:
        from shard_all import shard_small_parameters

        shard_small_parameters()
    import equipoise.train.run  # noqa: F401

    gc.freeze()  # what is imported: every training ends in a collection, which takes as long as a step here
    for job in jobs:
        if os.environ.get("RANK", "0") == "0":
            print(f"===== cell: {job['trainer']}", flush=True)
        os.environ["EQUIPOISE_CACHE"] = f"{job['folder']}/cache"
        if not passes_of(job):
            return 1
    return 0


def passes_of(job: dict[str, Any]) -> bool:
    """Run the three passes and write down what this rank has seen; False where one did not end as it should."""
    from equipoise.data.files import write_aside
    from equipoise.train.preemption import REQUEUE

    rank = int(os.environ.get("RANK", "0"))
    passes: dict[str, dict[str, Any]] = {}
    for name, told, expected in (
        ("whole", False, (0, 3, 4)),
        ("told", True, (REQUEUE,)),
        ("told", False, (0, 3, 4)),
    ):
        label = "resumed" if name == "told" and not told else name
        started = time.perf_counter()
        with observed(told) as seen:
            judged = [f"{job['judged']}={str(name == 'whole').lower()}"] if job["judged"] else []
            seen["exit_code"] = run(
                [*job["overrides"], *judged, f"name={name}", f"output_dir={job['folder']}"]
            )
        seen["seconds"] = round(time.perf_counter() - started, 1)
        passes[label] = seen
        if seen["exit_code"] not in expected:
            print(f"rank {rank}: {label} left with {seen['exit_code']}", file=sys.stderr)
            return False
    target = Path(job["folder"]) / f"rank{rank}.json"
    write_aside(target, json.dumps(passes, indent=1) + "\n")
    return True


def run(overrides: list[str]) -> int:
    """The command line's own `main`: train, and turn what happens into an exit code."""
    from equipoise.train.cli import main as train

    return train(overrides)


@contextmanager
def observed(told: bool) -> Iterator[dict[str, Any]]:
    """What this rank holds: the state after each step, its trained weights in the end, the gate's verdicts.

    told: with SIGTERM to the last rank in the middle of a step.
    """
    from transformers import Trainer

    from equipoise.train import model as train_model
    from equipoise.train.gatekeeper import Gatekeeper
    from equipoise.train.trainers.optimizer_steps import OptimizerSteps
    from equipoise.train.trainers.safe_rlhf import SafeRLHFTrainer

    seen: dict[str, Any] = {"states": [], "verdicts": [], "weights": None, "smallest_share_read": 1.0}
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1

    def tell(step: int) -> None:
        if told and last and step == TOLD_IN_STEP:
            os.kill(os.getpid(), signal.SIGTERM)

    before = {
        (owner, name): getattr(owner, name)
        for owner, name in (
            (OptimizerSteps, "training_step"),
            (Trainer, "train"),
            (SafeRLHFTrainer, "_sample"),
            (SafeRLHFTrainer, "_finish_step"),
            (SafeRLHFTrainer, "train"),
            (Gatekeeper, "decide"),
            (train_model, "load_model"),
        )
    }

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        tell(self.state.global_step)
        loss = before[OptimizerSteps, "training_step"](self, *args, **kwargs)
        if self.accelerator.sync_gradients:
            seen["states"].append(self.state_dict())
        return loss

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = before[Trainer, "train"](self, *args, **kwargs)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        seen["weights"] = digest({n: p for n, p in model.named_parameters() if p.requires_grad})
        return found

    def sample(self: Any, step: int) -> Any:
        tell(step)
        return before[SafeRLHFTrainer, "_sample"](self, step)

    def finish_step(self: Any, *args: Any) -> None:
        before[SafeRLHFTrainer, "_finish_step"](self, *args)
        seen["states"].append(self.multipliers.state_dict())

    def train_safe_rlhf(self: Any, start: int = 0) -> None:
        before[SafeRLHFTrainer, "train"](self, start)
        seen["weights"] = digest(self.models.state_dict())

    def decide(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = before[Gatekeeper, "decide"](self, *args, **kwargs)
        seen["verdicts"].append(result.to_dict())
        return result

    def load_model(*args: Any, **kwargs: Any) -> Any:
        found = before[train_model, "load_model"](*args, **kwargs)
        seen["smallest_share_read"] = min(seen["smallest_share_read"], share_held(found[0]))
        return found

    functions = (training_step, train, sample, finish_step, train_safe_rlhf, decide, load_model)
    for (owner, name), function in zip(before, functions, strict=True):
        setattr(owner, name, function)
    try:
        yield seen
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)


def share_held(model: Any) -> float:
    """Of the elements of a model, those that have memory on this rank."""
    held = total = 0
    for parameter in model.parameters():
        total += getattr(parameter, "ds_numel", parameter.numel())
        held += 0 if parameter.is_meta else getattr(parameter, "ds_tensor", parameter).numel()
    return held / total


def digest(parameters: dict[str, Any]) -> str:
    """Hash of whole parameters, gathered by this rank itself where they are shards. Collective."""
    found = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        found.update(f"{name} ".encode())
        found.update(whole(parameter).detach().cpu().contiguous().float().numpy().tobytes())
    return found.hexdigest()


def whole(parameter: Any) -> Any:
    """The parameter as one tensor: of FSDP's DTensor, of ZeRO-3's partition, or itself."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


if __name__ == "__main__":
    from equipoise.train.cli import leave

    leave(main(sys.argv[1:]))
