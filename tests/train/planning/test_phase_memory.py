from pathlib import Path

import pytest
import torch

from equipoise.train.planning import phase_memory
from equipoise.train.planning.phase_memory import PhaseMemory

CPU = torch.device("cpu")


@pytest.mark.skipif(
    not phase_memory._can_reset(), reason="this system does not tell a process its peak memory"
)
def test_every_phase_has_a_peak_of_its_own() -> None:
    memory = PhaseMemory(CPU)
    with memory.measured("large"):
        torch.ones(64 * 2**20).sum()  # 256 MiB, given back
    with memory.measured("small"):
        torch.ones(8).sum()
    with memory.measured("large"):  # a smaller one later does not hide it
        torch.ones(8).sum()
    assert memory.peaks["large"] - memory.peaks["small"] > 200 * 2**20


def test_where_nothing_is_known_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(phase_memory, "_RESET", tmp_path / "absent" / "clear_refs")
    memory = PhaseMemory(CPU)
    with memory.measured("any"):
        pass
    assert memory.peaks == {}


@pytest.mark.skipif(
    not phase_memory._can_reset(), reason="this system does not tell a process its peak memory"
)
def test_a_phase_inside_another_hides_nothing_from_it() -> None:
    """The peak is one of the process: the inner phase sets it back, and the outer one still has seen it."""
    memory, inner = PhaseMemory(CPU), PhaseMemory(CPU)
    before = phase_memory.highest_resident_set()
    with memory.measured("whole"):
        torch.ones(64 * 2**20).sum()  # 256 MiB in front of it
        PhaseMemory(CPU)  # looking whether it can be set back sets it back
        with inner.measured("part"):
            torch.ones(8).sum()
        with inner.measured("part"):
            torch.ones(32 * 2**20).sum()  # 128 MiB inside
    assert memory.peaks["whole"] - inner.peaks["part"] > 100 * 2**20
    assert phase_memory.highest_resident_set() >= max(before, memory.peaks["whole"])


@pytest.mark.skipif(
    not phase_memory._can_reset(), reason="this system does not tell a process its peak memory"
)
def test_phases_of_the_same_peak_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase_memory, "_resident_peak", lambda: 7)
    memory = PhaseMemory(CPU)
    with memory.measured("whole"), memory.measured("part"):
        pass
    assert memory.peaks == {"whole": 7, "part": 7}
    assert phase_memory._running == []
