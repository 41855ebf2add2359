import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def make_job(sweeping: Any, tmp_path: Path) -> Callable[..., Any]:
    """`make_job(name, python)`: a job that runs this Python text; `result` and `code` are its files."""

    def make(name: str, text: str) -> Any:
        folder = tmp_path / "jobs" / name
        text = f"result, code = {str(folder / 'summary.json')!r}, {str(folder / 'code')!r}\n{text}"
        return sweeping("jobs").Job(
            name=name,
            command=[sys.executable, "-c", text],
            log=str(folder / "log"),
            failure=str(folder / "failed.json"),
            result=str(folder / "summary.json"),
            exit_code_file=str(folder / "code"),
            exit_code_variable="EXIT_CODE_FILE",
        )

    return make


DONE = "open(result, 'w').write('{}'); open(code, 'w').write('3'); raise SystemExit(1)"
"""As `accelerate launch` makes 1 of train.py's 3."""
CRASH = "print('reading', flush=True); raise RuntimeError('out of luck')"
WAIT = "import time\nopen(result + '.started', 'w')\ntime.sleep(60)"


def test_a_result_is_no_failure_and_a_crash_is_recorded(make_job: Any) -> None:
    job = make_job("a", CRASH)
    assert job() == 1
    failure = json.loads(Path(job.failure).read_text())
    assert failure["exit_code"] == 1
    assert "reading" in failure["tail"]
    assert failure["tail"][-1] == "RuntimeError: out of luck"
    assert make_job("a", DONE)() == 3
    assert not Path(job.failure).exists()
    log = Path(job.log).read_text()
    assert log.count("$ ") == 2  # both attempts


def test_a_command_that_does_not_exist(make_job: Any) -> None:
    job = make_job("a", "")
    job.command = ["no-such-launcher"]
    assert job() == 127
    assert "cannot be started" in json.loads(Path(job.failure).read_text())["tail"][-1]


def test_exit_code_zero_without_a_result_is_a_failure(make_job: Any) -> None:
    job = make_job("a", "")
    assert job() == 1
    assert Path(job.failure).exists()


def run(sweeping: Any, jobs: Sequence[Any], launcher: str, folder: Path, **options: Any) -> dict[str, int]:
    codes: dict[str, int] = {}
    arguments = {"num_jobs": 2, "gpus_per_point": 0, "cluster": None} | options
    sweeping("launchers").run_jobs(
        jobs, launcher=launcher, folder=folder, told=codes.__setitem__, **arguments
    )
    return codes


CLUSTER = {"cluster": "local", "parameters": {"timeout_min": 1}}


@pytest.mark.parametrize("launcher", ["local", "joblib", pytest.param("submitit", marks=pytest.mark.slow)])
def test_a_point_that_fails_does_not_stop_the_others(
    launcher: str, sweeping: Any, make_job: Any, tmp_path: Path
) -> None:
    if launcher == "submitit":
        pytest.importorskip("submitit")
    jobs = [make_job("a", DONE), make_job("b", CRASH), make_job("c", DONE)]
    codes = run(sweeping, jobs, launcher, tmp_path, cluster=CLUSTER)
    assert codes == {"a": 3, "b": 1, "c": 3}
    assert [Path(job.failure).exists() for job in jobs] == [False, True, False]


def test_every_place_has_gpus_of_its_own(
    sweeping: Any, make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    launchers = sweeping("launchers")
    assert launchers.slots(2, 2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(sweeping("points").SweepError, match="needs 6 GPUs, found 4"):
        launchers.slots(3, 2)
    seen = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    jobs = [make_job(str(number), seen + DONE) for number in range(2)]
    assert len(run(sweeping, jobs, "local", tmp_path, gpus_per_point=1)) == 2
    assert {Path(job.log).read_text().splitlines()[-1] for job in jobs} <= {"4", "5"}


def test_ctrl_c_ends_what_runs_starts_nothing_more_and_is_no_failure(
    sweeping: Any, make_job: Any, tmp_path: Path
) -> None:
    jobs = [make_job(name, WAIT) for name in "abc"]
    started = [Path(f"{job.result}.started") for job in jobs]

    def interrupt() -> None:
        while not all(path.exists() for path in started[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    # A process that a shell started in the background ignores the signal unless told otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(sweeping, jobs, "local", tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 50
    assert not started[2].exists()
    assert not any(Path(job.failure).exists() for job in jobs)
    assert not any(sweeping("jobs")._alive([job._group]) for job in jobs if job._group)


def test_a_group_that_does_not_listen_is_killed(sweeping: Any, make_job: Any) -> None:
    """And one whose launcher dies at once while its child is saving is not."""
    jobs = sweeping("jobs")
    deaf = make_job("deaf", f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WAIT}")
    child = (
        "import signal, time\n"
        "def save(*_):\n    time.sleep(1); open('saved', 'w'); raise SystemExit\n"
        "signal.signal(signal.SIGTERM, save)\n" + WAIT
    )
    saving = make_job("saving", "")
    saving.command = [
        "bash",
        "-c",
        '"$0" -c "$1" & wait',
        sys.executable,
        f"result = {saving.result!r}\n{child}",
    ]
    threads = [threading.Thread(target=job) for job in (deaf, saving)]
    for thread in threads:
        thread.start()
    while not all(Path(f"{job.result}.started").exists() for job in (deaf, saving)):
        time.sleep(0.02)
    jobs.stop([deaf, saving], grace=5)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert Path("saved").exists()


def test_the_command_of_a_point(sweeping: Any) -> None:
    command = sweeping("command")
    train = str(SCRIPTS.parent / "train.py")
    assert command.launch_command("python -X dev") == [sys.executable, "-X", "dev", train]
    assert command.launch_command("accelerate launch --cpu")[0].endswith("/accelerate")
    assert command.launch_command("srun accelerate launch")[:2] == ["srun", "accelerate"]
    assert command.launch_command("/opt/torchrun")[0] == "/opt/torchrun"


def test_the_ranks_of_a_point_have_the_time_that_a_point_has(
    sweeping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (point,) = sweeping("points").plan(["recipe=tsdi", "lam=1"]).points
    limit = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    monkeypatch.delenv(limit, raising=False)
    told = sweeping("command").job_of(point, ["torchrun"]).environment
    assert 30 < int(told[limit]) < sweeping("jobs").GRACE_SECONDS
    monkeypatch.setenv(limit, "7")
    assert sweeping("command").job_of(point, ["torchrun"]).environment[limit] == "7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters: {gpus: 1}\n", "submitit refuses the settings.*gpus"),
        ("partition: a\n", "expected the keys cluster and parameters"),
        ("parameters: {}\ntime: 1\n", "unknown time"),
    ],
)
def test_settings_of_a_cluster(text: str, message: str, sweeping: Any, make_job: Any, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    path = tmp_path / "mine.yaml"
    path.write_text(text)

    def read_and_run() -> None:
        settings = sweeping("launchers").cluster_settings(path)
        run(sweeping, [make_job("a", DONE)], "submitit", tmp_path, cluster=settings | {"cluster": "local"})

    with pytest.raises(sweeping("points").SweepError, match=message):
        read_and_run()
