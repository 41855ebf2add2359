"""What tells one model from another whatever it is called: the hash of its files, or the commit of a hub id."""

import hashlib
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HTTPError

from equipoise.data.errors import EquipoiseError

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".py", ".txt")
"""Weights, configurations, tokenizer, chat template, and code that `trust_remote_code` runs."""


def model_fingerprint(resolved: str, revision: str | None = None) -> str:
    """`sha256:...` over every file of a folder that decides what the model says; `commit:...` of a hub id.

    resolved: as `resolve_model` returns it. Reads all the weights, about a second for a gigabyte, but those that this
    process has read before.
    Raises EquipoiseError where the commit of a hub id cannot be found out.
    """
    folder = Path(resolved)
    if folder.is_dir():
        return f"sha256:{_hash_of_folder(folder)}"
    cached = try_to_load_from_cache(resolved, "config.json", revision=revision)
    if isinstance(cached, str):
        return f"commit:{Path(cached).parent.name}"
    try:
        commit = HfApi().model_info(resolved, revision=revision, timeout=20).sha
    except (HTTPError, OSError) as error:
        raise EquipoiseError(
            f"The commit of `{resolved}` cannot be found out ({error}): give a local folder, or reach the hub."
        ) from error
    return f"commit:{commit}"


def file_fingerprint(path: Path | str) -> str:
    """`sha256:...` of a file; one that is as it was when this process last read it is not read again."""
    path = Path(path).absolute()
    status = path.stat()
    return _hash_of_file(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_of_file(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _hash_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES):
        digest.update(f"{path.name} {file_fingerprint(path)}\n".encode())
    return digest.hexdigest()
