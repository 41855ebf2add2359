"""Peak memory of the phases of a training step: sampling, scoring, updating; phases may lie inside one another."""

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = "5"
"""proc(5): what sets the peak resident set back to the current one."""


@dataclass(eq=False)  # phases that have seen the same peak are still two
class _Phase:
    """One that is being measured."""

    peak: int = 0


_running: list[_Phase] = []
"""Of this process, as the peak is that is set back: whoever sets it back tells those that are still measuring."""
_highest = _Phase()
"""The highest resident set that was seen before the peak was set back."""


class PhaseMemory:
    """Keeps the highest peak of every phase, in bytes.

    On CUDA: what the caching allocator gave out. On Linux without CUDA: the process's resident set. Elsewhere nothing
    is known, and `peaks` stays empty.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = device.type == "cuda" or _can_reset()
        self.peaks: dict[str, int] = {}

    @contextmanager
    def measured(self, phase: str) -> Iterator[None]:
        """Measure what runs inside as part of `phase`."""
        if not self._known:
            yield
            return
        mine = _Phase()
        self._tell()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _RESET.write_text(_PEAK)
        _running.append(mine)
        try:
            yield
        finally:
            self._tell()
            _running.remove(mine)
            self.peaks[phase] = max(mine.peak, self.peaks.get(phase, 0))

    def _tell(self) -> None:
        if self._device.type == "cuda":
            _seen(torch.cuda.max_memory_allocated(self._device), _running)
        else:
            _seen(_resident_peak(), [*_running, _highest])


def highest_resident_set() -> int:
    """The most memory that this process ever held, bytes: the system's figure, which a phase may have set back."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, _highest.peak)


def _seen(peak: int, phases: Iterable[_Phase]) -> None:
    for phase in phases:
        phase.peak = max(phase.peak, peak)


def _resident_peak() -> int:
    """Bytes, since it was set back."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _can_reset() -> bool:
    """Whether this is a Linux that lets a process reset its own peak (some containers do not)."""
    if not _STATUS.exists():
        return False
    _seen(_resident_peak(), [*_running, _highest])
    try:
        _RESET.write_text(_PEAK)
    except OSError:
        return False
    return True
