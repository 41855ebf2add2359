import errno
import fcntl
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from equipoise.train import locks, preemption, ranks
from equipoise.train.locks import FolderInUseError, locked_folder, made_once
from equipoise.train.preemption import Preempted


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said; waiting is said at once, and locks are looked at often."""
    found: list[str] = []
    monkeypatch.setattr(locks, "say", found.append)
    monkeypatch.setattr(locks, "QUIET", 0.0)
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_LOOKS", 0.01)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "made"


def until(happened: Callable[[], object]) -> None:
    for _ in range(3000):
        if happened():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen within 30 seconds")


@pytest.fixture
def another_process(holding: Any) -> Any:
    """`with another_process(path)`: it makes the file, and holds its lock until it is killed."""

    def held(path: Path) -> Any:
        path.parent.mkdir(exist_ok=True)
        return holding(
            "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire()", f"{path}.lock"
        )

    return held


def test_one_run_makes_the_file_and_the_others_wait_for_it(path: Path, said: list[str]) -> None:
    makers: list[str] = []
    found: list[str] = []

    def run(name: str) -> None:
        with made_once(path, "make it"):
            if not path.exists():
                makers.append(name)
                until(lambda: len(said) == 2)
                path.write_text(name)
            found.append(path.read_text())

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(makers) == 1
    assert found == makers * 3
    assert said == [f"waiting for another run to make it ({path}.lock)"] * 2  # once each


def test_a_process_that_dies_lets_go(path: Path, said: list[str], another_process: Any) -> None:
    with another_process(path) as other:
        killer = threading.Thread(target=lambda: (until(lambda: said), other.kill()))
        killer.start()
        with made_once(path, "make it"):
            assert other.wait(10) < 0
        killer.join()
    assert len(said) == 1


def test_a_run_that_fails_lets_go(path: Path, said: list[str]) -> None:
    with pytest.raises(OSError, match="no space"), made_once(path, "make it"):
        raise OSError("no space")
    with made_once(path, "make it"):
        pass
    assert said == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_each_run_makes_it(
    number: int, path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS without a lock manager."""

    def refuse(*_: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with made_once(path, "make it"):
        path.write_text("mine")
    assert len(said) == 1
    assert "No locks available" in said[0]
    assert "other runs may make it at the same time" in said[0]


def test_a_lock_that_never_comes_free_is_not_waited_for_for_ever(
    path: Path, said: list[str], another_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.05)
    with another_process(path) as other, made_once(path, "make it"):
        assert other.poll() is None
    assert [line.split(" within ")[0] for line in said[1:]] == ["no other run was seen to make it"]


def test_a_run_that_is_told_to_end_does_not_wait(
    path: Path, said: list[str], another_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption._request, "asked", True)
    with made_once(path, "make it"):  # nobody to wait for
        pass
    with another_process(path), pytest.raises(Preempted), made_once(path, "make it"):
        pass


def test_the_first_rank_alone_takes_it(path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ranks, "PartialState", lambda: SimpleNamespace(num_processes=2, is_main_process=False)
    )
    monkeypatch.setattr(ranks, "_told", lambda _: ranks._Outcome())
    with made_once(path, "make it"):
        assert not path.parent.exists()


def test_nothing_is_locked_where_nothing_is_shared(said: list[str]) -> None:
    with made_once(None, "make it"):
        pass
    assert said == []


def test_a_folder_is_one_process_s(tmp_path: Path, folder_in_use: Any) -> None:
    folder = tmp_path / "new" / "folder"
    with (
        folder_in_use(folder),
        pytest.raises(FolderInUseError, match=r"folder is in use by process 17 on there\. Wait\.$"),
        locked_folder(folder, "Wait."),
    ):
        pass
    for _ in range(2):
        with locked_folder(folder, "Wait."):
            assert (folder / ".lock").read_text().startswith("process ")
