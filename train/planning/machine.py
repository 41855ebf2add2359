"""The device that a plan is for: this machine's, measured, or one out of a table of data sheets."""

import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Self

import psutil
import torch

from equipoise.train.planning.engine import Engine, local_processes

GPUS_A_NODE = 8
HEADROOM = 0.9
"""Share of a device that a plan may fill: CUDA's context, buffers of NCCL and fragmentation are not in it."""
CPU_EFFICIENCY = 1 / 3
"""Share of a large matrix product's speed that training reaches; measured on the embedded model on CPU."""
GPU_EFFICIENCY = 0.5
"""The same on GPUs: published trainings are between 0.38 and 0.52 of the peak (scripts/scaling/README.md)."""
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of version 2 and of version 1; a limit that is none reads `max`, or as a number larger than any memory."""


@dataclass(frozen=True)
class GPU:
    """A device and how it is connected; bandwidths in bytes a second and direction, for each GPU."""

    memory: float
    """Bytes."""
    flops: float
    """bf16 matrix products, dense, a second."""
    within_node: float
    between_nodes: float


GPUS = {
    "a100": GPU(memory=80e9, flops=312e12, within_node=300e9, between_nodes=25e9),
    "h100": GPU(memory=80e9, flops=989e12, within_node=450e9, between_nodes=50e9),
}
"""80 GB SXM modules of NVIDIA's data sheets: NVLink is half its bidirectional figure; one 200 (400) Gb/s port a GPU."""


@dataclass(frozen=True)
class Machine:
    """One device of the launch that is planned."""

    name: str
    memory: float
    """Bytes, all of it."""
    flops: float
    """Of matrix products in the training's dtype, a second."""
    efficiency: float
    """Share of them that training reaches."""
    bandwidth: float | None = None
    """Bytes a second that a device sends; None: not known, and traffic is left out of the time."""
    process: float = 0.0
    """Bytes that this process takes already, where it shares the memory with what it trains."""

    @classmethod
    def here(cls, dtype: torch.dtype) -> Self:
        """This rank's device, its speed measured just now."""
        flops = measured_flops(dtype)
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            return cls(properties.name, properties.total_memory, flops, GPU_EFFICIENCY)
        threads = torch.get_num_threads()
        name = f"{threads} CPU thread{'s'[: threads != 1]}"
        process = float(psutil.Process().memory_info().rss)
        return cls(name, ram() / local_processes(), flops, CPU_EFFICIENCY, process=process)

    @classmethod
    def of_table(cls, name: str, engine: Engine) -> Self:
        """A GPU of `GPUS`, connected as the number of processes wants it."""
        gpu = GPUS[name]
        link = gpu.within_node if engine.num_processes <= GPUS_A_NODE else gpu.between_nodes
        return cls(name.upper(), gpu.memory, gpu.flops, GPU_EFFICIENCY, link)

    def with_memory(self, num_bytes: float) -> Self:
        """The same with so much memory, all of it for what is planned."""
        return replace(self, memory=num_bytes, process=0.0)

    @property
    def room(self) -> float:
        """Bytes that a plan may fill."""
        return HEADROOM * self.memory - self.process


def ram() -> float:
    """Bytes of memory that this process may use: the machine's, or its control group's limit where that is less."""
    limits = [float(psutil.virtual_memory().total)]
    for path in _CGROUP_LIMITS:
        if path.exists() and (text := path.read_text().strip()).isdigit():
            limits.append(float(text))
    return min(limits)


@cache
def measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on this rank's device, the best of five; measured once in a process.

    On a CPU of the size that training has; on CUDA large enough (a millisecond) to be the device's peak.
    """
    cuda = torch.cuda.is_available()
    rows, inner = (8192, 8192) if cuda else (2048, 1024)
    device = "cuda" if cuda else "cpu"
    a = torch.ones(rows, inner, device=device, dtype=dtype)
    b = torch.ones(inner, rows, device=device, dtype=dtype)
    best = 0.0
    for _ in range(6):  # the first one warms up
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # the item waits for a GPU
        best = max(best, 2 * rows * inner * rows / (time.perf_counter() - started))
    return best
