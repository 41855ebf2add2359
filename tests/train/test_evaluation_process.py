import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.schema import Exchange
from equipoise.eval.config import EngineConfig, JudgeConfig, ModelChoice
from equipoise.eval.evaluator import EvaluationSettings
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.job import EvaluationJob, Prompts
from equipoise.train import evaluation_process, preemption
from equipoise.train.evaluation_process import EvaluationError, clean_environment, evaluate_apart


def job(**changes: Any) -> EvaluationJob:
    exchanges = tuple(
        Exchange(f"{i}", ({"role": "user", "content": f"{i} \ud800"},), "S1", "yes") for i in range(2)
    )
    values = {
        "model": ModelChoice("somewhere", dtype="float32"),
        "prompts": Prompts(exchanges, exchanges[:1], exchanges[1:]),
        "judge": JudgeConfig("ensemble", judges={"a": {"name": "embedded"}}, unsure=[0.1, 0.9]),
        "settings": EvaluationSettings(GenerationSettings(max_new_tokens=3), max_prompts_per_category=2),
        "state": "aligned",
    }
    return EvaluationJob(**values | changes)


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`child(script, timeout=..., calls=...)`: an evaluation by that shell script; `calls` gets its progress."""

    def run(script: str, timeout: float = 30.0, calls: list[tuple[int, int, str]] | None = None) -> None:
        executable = tmp_path / "python"
        executable.write_text(f"#!/bin/sh\n{script}\n")
        executable.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(executable))
        told = [] if calls is None else calls
        log = tmp_path / "eval" / "process.log"
        evaluate_apart(job(), tmp_path, log, timeout, None, lambda *call: told.append(call))

    return run


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = job(engine=EngineConfig("vllm", options={"tensor_parallel_size": 2}), tsdi="folder")
    written.save(tmp_path / "job.json")
    assert EvaluationJob.load(tmp_path / "job.json") == written


def test_an_evaluation_that_fails_is_an_error_with_the_end_of_its_log(child: Any, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError) as raised:
        child(r"""for i in $(seq 30); do echo "line $i" >&2; done; printf 'bad\033[2J\n' >&2; exit 7""")
    message = str(raised.value)
    assert "the evaluation of aligned (somewhere) in a process of its own ended with exit code 7" in message
    assert "nothing is promoted" in message
    assert str(tmp_path / "eval" / "process.log") in message
    assert "line 30" in message
    assert "line 15\n" not in message
    assert message.endswith("bad⟦U+001B⟧[2J")


def test_its_log_keeps_no_key(child: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-secret-1")
    with pytest.raises(EvaluationError) as raised:
        child('echo "asked with $SOME_API_KEY, https://me:planted@hub" >&2; exit 1')
    log = (tmp_path / "eval" / "process.log").read_text()
    assert log == "asked with ***, https://***@hub\n"
    assert "planted" not in str(raised.value)


def test_a_killed_one_says_so(child: Any) -> None:
    with pytest.raises(EvaluationError, match="was killed by SIGKILL"):
        child("kill -9 $$")


def test_its_progress_is_passed_on(child: Any) -> None:
    calls: list[tuple[int, int, str]] = []
    with pytest.raises(EvaluationError, match="exit code 1"):
        child("""echo '[1, 4, "harmful: generating"]'; exit 1""", calls=calls)
    assert calls == [(1, 4, "harmful: generating")]


def test_one_that_takes_too_long_is_ended_with_all_it_started(child: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(EvaluationError, match=r"took longer than gate\.timeout=0\.5 seconds"):
        child(f"sleep 60 & echo $! > {tmp_path}/pid; wait", timeout=0.5)
    assert time.monotonic() - started < 10
    worker = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text()


def test_told_to_end_with_its_run_it_is_no_failure(child: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "asked", lambda: True)
    with pytest.raises(preemption.Preempted):
        child("kill -TERM $$")
    with pytest.raises(EvaluationError, match="exit code 2"):
        child("exit 2")


def test_an_interrupted_run_ends_it(tmp_path: Path, child: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(line: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_process.json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        child(f"echo $$ > {tmp_path}/pid; echo '[1, 2, \"x\"]'; sleep 60")
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_it_joins_no_group() -> None:
    ranks = (
        "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GROUP_RANK ROLE_RANK ROLE_NAME"
    )
    engines = "TORCHELASTIC_RUN_ID ACCELERATE_USE_DEEPSPEED FSDP_VERSION OMPI_COMM_WORLD_SIZE"
    launched = dict.fromkeys(f"{ranks} {engines}".split(), "1")
    kept = {"PATH": "/bin", "HF_HOME": "/hub", "PYTHONPATH": "here", "RANKING": "mine"}
    cleaned = clean_environment(launched | kept, devices="6,7")
    assert cleaned.pop("OMP_NUM_THREADS").isdigit()
    assert cleaned == kept | {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert "CUDA_VISIBLE_DEVICES" not in clean_environment(kept)


def test_a_child_ends_when_nobody_waits_for_it() -> None:
    waits = "import equipoise.eval.job as job, threading, time; threading.Thread(target=job._end_with_parent).start(); "
    process = subprocess.Popen(
        [sys.executable, "-c", waits + "print('ready', flush=True); time.sleep(60)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        assert process.wait(20) == -signal.SIGKILL
