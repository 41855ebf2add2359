"""Peak memory of the phases of a training step: sampling, scoring, updating."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = "5"
"""proc(5): what sets the peak resident set back to the current one."""


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
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._known:
            _RESET.write_text(_PEAK)
        yield
        if self._known:
            self.peaks[phase] = max(self._peak(), self.peaks.get(phase, 0))

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def _can_reset() -> bool:
    """Whether this is a Linux that lets a process reset its own peak (some containers do not)."""
    try:
        _RESET.write_text(_PEAK)
    except OSError:
        return False
    return _STATUS.exists()
