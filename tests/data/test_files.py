import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from equipoise.data.errors import DiskFullError
from equipoise.data.files import drop_torn_line, full_disk_named, write_aside

BIG = torch.zeros(200_000)


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_aside(path, "before")
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(
        DiskFullError, match=r"file.json could not be written: no space left \([\d.]+ MiB are free"
    ):
        write_aside(path, "after")
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
    ids=["full", "quota", "safetensors", "torch"],
)
def test_whoever_writes_a_full_disk_has_one_name(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError) as raised, full_disk_named(tmp_path / "not" / "there" / "file"):
        raise error
    assert raised.value.__cause__ is error
    assert f"free in {tmp_path}; {error})" in str(raised.value)


def test_other_errors_keep_theirs(tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "Permission denied"), RuntimeError("shapes differ")):
        with pytest.raises(type(error)) as raised, full_disk_named(tmp_path):
            raise error
        assert raised.value is error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"a": BIG}, path),
        lambda path: save_file({"a": BIG}, path),
        lambda path: path.write_text("x" * 300_000),
    ],
    ids=["torch", "safetensors", "text"],
)
def test_what_really_happens_on_a_full_disk_is_recognised(
    write: Callable[[Path], None], small_disk: Path
) -> None:
    with (
        pytest.raises(DiskFullError, match=f"MiB are free in {small_disk}"),
        full_disk_named(small_disk / "file"),
    ):
        write(small_disk / "file")


def test_a_torn_line_goes_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    drop_torn_line(path)
    assert not path.exists()
    for text, kept in (("a\nb\nhal", "a\nb\n"), ("half", ""), ("a\n", "a\n")):
        path.write_text(text)
        drop_torn_line(path)
        assert path.read_text() == kept
