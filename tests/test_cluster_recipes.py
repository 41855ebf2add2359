"""The files for launchers and clusters against the packages that read them."""

import signal
import subprocess
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


def test_the_batch_script_queues_itself_again(tmp_path: Path) -> None:
    """With srun and scontrol played by shell scripts: USR1 becomes TERM, 75 becomes a requeue."""
    calls = tmp_path / "calls"
    fakes = {
        "scontrol": f'echo "scontrol $*" >> {calls}; [ "$1" = show ] && echo host0; true',
        "srun": f"trap 'echo 75 > $EQUIPOISE_EXIT_CODE_FILE; echo term >> {calls}; exit 1' TERM\n"
        f"echo started >> {calls}; while true; do sleep 0.05; done",
    }
    (tmp_path / "bin").mkdir()
    for name, body in fakes.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "host[0-1]",
        "SLURM_JOB_ID": "7",
    }
    shell = subprocess.Popen(["bash", RECIPES / "cluster" / "train.sbatch", "recipe=tsdi"], env=environment)
    try:
        while not calls.exists() or "started" not in calls.read_text():
            assert shell.poll() is None
        shell.send_signal(signal.SIGUSR1)
        assert shell.wait(20) == 75
    finally:
        shell.kill()
    assert calls.read_text().splitlines() == [
        "scontrol show hostnames host[0-1]",
        "started",
        "term",
        "scontrol requeue 7",
    ]


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
