"""Writing text files so that nobody ever reads half of one."""

import os
from pathlib import Path


def write_aside(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # A lone surrogate becomes an escape, which JSON reads back as itself.
        with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
