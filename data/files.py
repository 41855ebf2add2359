"""Writing files so that nobody ever reads half of one, whatever interrupts it: a kill, or a full disk."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from equipoise.data.errors import DiskFullError


def write_aside(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place, then renamed over it. Raises DiskFullError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # A lone surrogate becomes an escape, which JSON reads back as itself.
        with (
            full_disk_named(path),
            aside.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def drop_torn_line(path: Path) -> None:
    """Cut off what an interrupted write left behind the last complete line; a file that is not there is left so."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn what a full disk (or quota) raises inside the `with`, whoever wrote, into a DiskFullError about `path`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _is_full_disk(error):
            raise
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free
        raise DiskFullError(
            f"{path} could not be written: no space left ({free / 2**20:.1f} MiB are free in {folder}; {error}). Make "
            "room, or move the folder to a larger disk, and run the same command again: it goes on from what is whole."
        ) from error


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors (Rust) and torch.save (C++) raise errors of their own; torch's says nothing of the reason.
    text = str(error)
    codes = (f"os error {errno.ENOSPC}", f"os error {errno.EDQUOT}")
    return any(code in text for code in codes) or ("inline_container.cc" in text and "unexpected pos" in text)
