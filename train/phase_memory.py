"""Peak memory of the phases of a training step: sampling, scoring, updating."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PhaseMemory:
    """Keeps the highest peak of every phase, in bytes.

    On CUDA: what the caching allocator gave out. On Linux without CUDA: the process's resident set. Elsewhere nothing
    is known, and `peaks` stays empty.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peaks: dict[str, int] = {}

    @contextmanager
    def measured(self, phase: str) -> Iterator[None]:
        """Measure what runs inside as part of `phase`."""
        self._reset()
        yield
        peak = self._peak()
        if peak is not None:
            self.peaks[phase] = max(peak, self.peaks.get(phase, 0))

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _RESET.exists():
            _RESET.write_text("5")  # proc(5): resets the peak resident set to the current one

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not _STATUS.exists():
            return None
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
