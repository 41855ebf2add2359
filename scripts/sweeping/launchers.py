"""Who runs the jobs: this machine, joblib's workers, or a cluster through submitit.

Each takes the jobs, calls `told` as they end, and returns when all have. An interrupted one leaves no process behind:
points that were running have saved a checkpoint, and the same command goes on from there.
"""

import importlib.util
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import yaml
from sweeping import jobs as jobs_module
from sweeping.jobs import Job, Told, stop
from sweeping.points import SweepError

LAUNCHERS = ("local", "joblib", "submitit")
POLL_SECONDS = 0.2


def visible_gpus() -> list[str]:
    """The GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi names."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu.strip() for gpu in listed.split(",") if gpu.strip()]
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return [str(number) for number in range(len(found.stdout.splitlines()))] if not found.returncode else []


def slots(num_jobs: int, gpus_per_point: int) -> list[dict[str, str]]:
    """The environment of each of `num_jobs` places; with `gpus_per_point`, each has GPUs of its own.

    Raises SweepError where there are too few GPUs.
    """
    if not gpus_per_point:
        return [{} for _ in range(num_jobs)]
    gpus = visible_gpus()
    if len(gpus) < num_jobs * gpus_per_point:
        raise SweepError(
            f"--jobs {num_jobs} with --gpus-per-point {gpus_per_point} needs {num_jobs * gpus_per_point} GPUs, found "
            f"{len(gpus)}; lower one of them"
        )
    starts = range(0, num_jobs * gpus_per_point, gpus_per_point)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[start : start + gpus_per_point])} for start in starts]


def run_local(jobs: Sequence[Job], num_jobs: int, gpus_per_point: int, told: Told) -> None:
    """`num_jobs` at a time on this machine."""
    places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for place in slots(num_jobs, gpus_per_point):
        places.put(place)
    stopped = threading.Event()

    def run(job: Job) -> int | None:
        if stopped.is_set():
            return None
        place = places.get()
        try:
            return job(place)
        finally:
            places.put(place)

    with ThreadPoolExecutor(num_jobs) as pool:
        waiting: dict[Future[int | None], Job] = {pool.submit(run, job): job for job in jobs}
        try:
            while waiting:
                ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    job, code = waiting.pop(future), future.result()
                    if code is not None:
                        told(job.name, code)
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            stop(waiting.values())
            raise


def run_joblib(jobs: Sequence[Job], num_jobs: int, told: Told) -> None:
    """Through joblib, whose backend (loky, or one that `joblib.parallel_config` set up) has the workers."""
    import joblib

    results = joblib.Parallel(n_jobs=num_jobs, return_as="generator_unordered")(
        joblib.delayed(_named)(job) for job in jobs
    )
    for name, code in results:
        told(name, code)


def _named(job: Job) -> tuple[str, int]:
    return job.name, job()


def cluster_settings(path: Path) -> dict[str, Any]:
    """The keys of a file as recipes/cluster/slurm.yaml is one; raises SweepError where they cannot be read."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SweepError(f"{path}: cannot be read as the settings of a cluster: {error}") from error
    if not isinstance(settings, Mapping) or not isinstance(settings.get("parameters"), Mapping):
        raise SweepError(
            f"{path}: expected the keys cluster and parameters, as recipes/cluster/slurm.yaml has them"
        )
    unknown = sorted(set(settings) - {"cluster", "max_num_timeout", "parameters"})
    if unknown:
        raise SweepError(
            f"{path}: unknown {', '.join(unknown)}; possible: cluster, max_num_timeout, parameters"
        )
    return dict(settings)


def run_submitit(
    jobs: Sequence[Job], num_jobs: int, settings: Mapping[str, Any], folder: Path, told: Told
) -> None:
    """One submitit job a point, at most `num_jobs` at a time; interrupted, the queued and running ones are cancelled.

    settings: `cluster` (slurm, local or debug; null: slurm where there is one), `max_num_timeout`, and `parameters` for
    submitit's `AutoExecutor.update_parameters`. Raises SweepError for parameters that it does not take.
    """
    if importlib.util.find_spec("submitit") is None:
        raise SweepError("--launcher submitit: submitit is not installed; pip install 'equipoise[sweep]'")
    import cloudpickle
    import submitit

    cloudpickle.register_pickle_by_value(jobs_module)
    cluster = settings.get("cluster")
    options = (
        {"slurm_max_num_timeout": settings["max_num_timeout"]} if settings.get("max_num_timeout") else {}
    )
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster, **options)
        parameters = dict(settings["parameters"])
        if executor.cluster == "slurm":
            parameters["slurm_array_parallelism"] = num_jobs
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise SweepError(f"submitit refuses the settings of the cluster: {error}") from error
    # Elsewhere than on Slurm, whose arrays count for themselves, no more are submitted than may run.
    at_once = len(jobs) if executor.cluster == "slurm" else num_jobs
    running: dict[Any, Job] = {}
    left = list(jobs)
    try:
        while running or left:
            batch = left[: at_once - len(running)]
            del left[: len(batch)]
            if batch:
                with executor.batch():
                    handles = [executor.submit(job) for job in batch]
                running |= dict(zip(handles, batch, strict=True))
            for handle in [handle for handle in running if handle.done()]:
                job = running.pop(handle)
                error = handle.exception()
                told(job.name, handle.result() if error is None else _lost(job, str(error)))
            time.sleep(POLL_SECONDS if executor.cluster != "slurm" else 10 * POLL_SECONDS)
    finally:
        for handle in running:
            handle.cancel(check=False)


def _lost(job: Job, why: str) -> int:
    """A job that ended without a word of its own: cancelled, out of memory, its node gone."""
    with Path(job.log).open("a", encoding="utf-8") as output:
        output.write(f"submitit: {why}\n")
    return job.record(1)


def run_jobs(
    jobs: Sequence[Job],
    launcher: str,
    num_jobs: int,
    gpus_per_point: int,
    cluster: Mapping[str, Any] | None,
    folder: Path,
    told: Told,
) -> None:
    """Run `jobs` by the launcher of that name. Raises SweepError."""
    if gpus_per_point and launcher != "local":
        raise SweepError(f"--gpus-per-point is for --launcher local; {launcher} hands out GPUs itself")
    if launcher == "submitit":
        run_submitit(jobs, num_jobs, cluster or {"parameters": {}}, folder / "submitit", told)
    elif launcher == "joblib":
        run_joblib(jobs, num_jobs, told)
    else:
        run_local(jobs, num_jobs, gpus_per_point, told)
    sys.stdout.flush()
