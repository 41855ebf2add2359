"""The files for launchers and clusters against the packages that read them."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def read(path: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / path).read_text())


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes >= config.num_machines
    assert path.read_text().startswith("#")  # when to take it


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload", "multi_node"])
def test_keys_of_the_deepspeed_section(name: str) -> None:
    """Those that `accelerate launch` copies out of the section, each an argument of its own."""
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    assert set(read(f"accelerate/{name}.yaml")["deepspeed_config"]) <= known


def launched(name: str) -> Any:
    """The arguments that `accelerate launch` makes of a file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = RECIPES / "accelerate" / f"{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    return _validate_launch_command(arguments)[0]


def test_what_a_launch_tells_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through these variables: what accelerate's plug-ins make of them is what the file says."""
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    with monkeypatch.context() as patch:
        told = prepare_multi_gpu_env(launched("fsdp2"))
        for key, value in told.items():
            patch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert told["ACCELERATE_USE_FSDP"] == "true"
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert plugin.cpu_ram_efficient_loading is True
    for name, stage in (("zero2", 2), ("zero3", 3)):
        with monkeypatch.context() as patch:
            arguments = launched(name)
            # As `launch_command` does: these variables, not a DeepSpeed file of one's own.
            fields = read(f"accelerate/{name}.yaml")["deepspeed_config"]
            arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
            _, told = prepare_deepspeed_cmd_env(arguments)
            for key, value in told.items():
                patch.setenv(key, value)
            assert DeepSpeedPlugin().zero_stage == stage


def test_submitit_takes_the_cluster_file() -> None:
    submitit = pytest.importorskip("submitit")
    from submitit.auto.auto import AutoExecutor
    from submitit.slurm.slurm import SlurmExecutor

    parameters = read("cluster/slurm.yaml")["parameters"]
    generic = set(AutoExecutor._typed_parameters())
    slurm = {key.removeprefix("slurm_") for key in parameters if key not in generic}
    assert slurm <= SlurmExecutor._valid_parameters()
    assert submitit.__version__


def test_the_batch_script_is_shell(tmp_path: Path) -> None:
    script = RECIPES / "cluster" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)


SLURM = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && echo host0; true',
    "squeue": 'echo "$JOB_STATE"',
    # As srun does: USR1 goes to the task's first process alone, TERM kills it (SchedMD's srun_job.c, _srun_signal_mgr).
    "srun": """while [[ $1 == -* ]]; do shift; done
        "$@" & task=$!
        trap 'kill -USR1 $task' USR1
        trap 'kill -KILL $task; exit 137' TERM
        wait $task; code=$?
        while kill -0 $task 2>/dev/null; do wait $task; code=$?; done
        exit $code""",
}
"""The commands of Slurm that the batch script calls, played by shell scripts."""
SAVES = """echo "limit $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >> "$CALLS"
    trap 'sleep 0.5; echo 75 > "$EQUIPOISE_EXIT_CODE_FILE"; echo saved >> "$CALLS"; exit 1' TERM
    echo started >> "$CALLS"; while true; do sleep 0.05; done"""
"""A launcher whose ranks save when they are told to end."""
SAVES_BEHIND = f"({SAVES}) & wait"
"""One that is gone at once, as accelerate's is where there is one process; that one saves."""
KILLED = "trap 'exit 1' TERM; echo started >> \"$CALLS\"; while true; do sleep 0.05; done"
"""One whose ranks were killed before they had saved."""
CRASHES = 'echo started >> "$CALLS"; echo 1 > "$EQUIPOISE_EXIT_CODE_FILE"; exit 1'


@pytest.mark.parametrize(
    ("launcher", "number", "state", "code", "requeued"),
    [
        (SAVES, signal.SIGUSR1, "RUNNING", 75, True),
        (SAVES, signal.SIGTERM, "RUNNING", 75, True),  # preempted
        (SAVES, signal.SIGTERM, "COMPLETING", 75, False),  # cancelled
        (SAVES_BEHIND, signal.SIGUSR1, "RUNNING", 75, True),
        (KILLED, signal.SIGUSR1, "RUNNING", 75, True),
        (CRASHES, None, "RUNNING", 1, False),
    ],
)
def test_the_batch_script_queues_itself_again(
    launcher: str, number: signal.Signals | None, state: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    for name, body in (SLURM | {"accelerate": launcher}).items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "CALLS": str(calls),
        "JOB_STATE": state,
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "host[0-1]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "0",
        "SLURM_GPUS_ON_NODE": "8",
    }
    script = RECIPES / "cluster" / "train.sbatch"
    shell = subprocess.Popen(["bash", script, "recipe=tsdi"], env=environment, start_new_session=True)
    try:
        if number is not None:
            while not calls.exists() or "started" not in calls.read_text():
                assert shell.poll() is None
                time.sleep(0.02)
            shell.send_signal(number)
        assert shell.wait(20) == code
    finally:
        with suppress(ProcessLookupError):  # all that a failed test would leave behind
            os.killpg(shell.pid, signal.SIGKILL)
    told = calls.read_text().splitlines()
    assert ("saved" in told) == (launcher in (SAVES, SAVES_BEHIND))
    assert ("limit 270" in told) == ("saved" in told)  # below the 300 s of --signal
    assert ("scontrol requeue 7" in told) == requeued
    assert not list(tmp_path.glob(".exit_code*"))


def test_the_wandb_sweep_starts_a_run_of_its_own(tmp_path: Path) -> None:
    """The command as W&B's agent builds it, with the launcher played by a shell script."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = read("cluster/wandb_sweep.yaml")
    assert {"program", "method", "metric", "parameters", "command"} == set(sweep)
    arguments = {name: {"value": of["values"][0]} for name, of in sweep["parameters"].items()}
    macros = utils.create_sweep_command_args({"args": arguments}) | {
        "env": ["/usr/bin/env"],
        "program": [sweep["program"]],
    }
    command: list[str] = []
    for word in utils.create_sweep_command(sweep["command"]):
        command += macros[word[2:-1]] if word.startswith("${") else [word]
    (tmp_path / "accelerate").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WANDB_RUN_ID": "abc123"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "launch",
        "train.py",
        "recipe=tsdi",
        "tracking=wandb",
        "output_dir=outputs/wandb/abc123",
        "beta=0.05",
        "lam=1",
        "seed=1",
    ]


def test_the_cluster_file_has_the_sweeps_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES.parent / "scripts")
    from sweeping.launchers import cluster_settings

    settings = cluster_settings(RECIPES / "cluster" / "slurm.yaml")
    assert set(settings) == {"cluster", "max_num_timeout", "parameters"}
