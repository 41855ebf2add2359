from pathlib import Path

import psutil
import pytest
import torch

from equipoise.train.planning import machine
from equipoise.train.planning.engine import Engine
from equipoise.train.planning.machine import GPUS, Machine


def test_a_control_groups_limit_is_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (limit,))
    assert machine.ram() == psutil.virtual_memory().total
    limit.write_text("max\n")
    assert machine.ram() == psutil.virtual_memory().total
    limit.write_text("1048576\n")
    assert machine.ram() == 2**20


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ram", lambda: 8e9)
    monkeypatch.setattr(machine, "measured_flops", lambda dtype: 1e9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    here = Machine.here(torch.float32)
    assert here.memory == 2e9
    assert here.room == pytest.approx(0.9 * 2e9 - here.process)
    assert here.with_memory(10e9).room == 9e9  # all of it for the plan


def test_more_than_a_node_waits_for_the_network() -> None:
    assert Machine.of_table("h100", Engine("fsdp2", 8)).bandwidth == GPUS["h100"].within_node
    assert Machine.of_table("h100", Engine("fsdp2", 16)).bandwidth == GPUS["h100"].between_nodes


def test_the_peak_is_measured_once() -> None:
    machine.measured_flops.cache_clear()
    first = machine.measured_flops(torch.float32)
    assert first > 1e8
    assert machine.measured_flops(torch.float32) == first
    assert machine.measured_flops.cache_info().misses == 1
