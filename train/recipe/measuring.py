"""Keys of what is measured before and while a run trains: the plan, the alarms, the speed, the profile."""

from dataclasses import dataclass, field


@dataclass
class PlanConfig:
    """What `dry_run=true` plans for, where that is not this machine and this launch."""

    gpu: str | None = None
    """a100 | h100 (80 GB each, connected as in their data sheets); null: this machine's device, its speed measured."""
    memory_gib: float | None = None
    """GiB of one device, in place of what it has."""
    num_processes: int | None = None
    """Devices, one process each; null: as launched."""
    engine: str | None = None
    """single | ddp | zero1 | zero2 | zero3 | fsdp2; null: as launched, and ddp where num_processes asks for several."""
    offload: str = "none"
    """engine: what waits in the machine's memory: none | optimizer | all (the weights too)."""


@dataclass
class DiagnosticsConfig:
    """Alarms on what is logged, and how fast it goes; the first rank says them, the numbers are of all ranks."""

    window: int = 50
    """Logged steps that the loss of a new one is held against; there is no alarm before 20."""
    spike_z: float = 10.0
    """Robust z-score, (loss - median) / (1.4826 MAD) over the window, from which a loss is a spike; 0: no alarm."""
    falling_nats: float = 10.0
    """Nats by which the mean log-probability of a stage's chosen answers, over the last 10 logged steps, may fall below
    where the stage began; 0: no alarm."""
    speed: bool = True
    """Log examples and tokens a second, the share of the measured matmul peak, and the peak memory."""


@dataclass
class ProfileConfig:
    """torch.profiler on the first rank."""

    steps: list[int] = field(default_factory=list)
    """[first, last] optimizer step, from 1, of every training stage: `stages/<stage>/trace-<first>-<last>.json.gz` for
    chrome://tracing or Perfetto; []: none."""
