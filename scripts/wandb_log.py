"""What W&B's log of a run on disk holds: `run-<id>.wandb`, read with W&B's own messages and without its server.

The file is a sequence of records of wandb.proto.wandb_internal_pb2 in LevelDB's log format
(https://github.com/google/leveldb/blob/main/doc/log_format.md) behind seven bytes of W&B's: ":W&B", 0xBEE1, a version.
The checksums are zlib's CRC-32 of type and data, neither masked nor CRC-32C. Found so in files of wandb 0.31, whose
package has no reader of its own any more.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from equipoise.data.errors import EquipoiseError

_START = struct.Struct("<4sHB")
_HEADER = struct.Struct("<IHB")
_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class WandbLogError(EquipoiseError):
    """A log that is not there, or cannot be read."""


@dataclass
class WandbLog:
    """All attempts at one run, in order."""

    paths: list[Path]
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """What each call of `log` held; names of metrics to values, or to the description of a table or page."""
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    """name, type, aliases, metadata and files (path, digest, size, and `ref` or `local_path`)."""
    exit_code: int | None = None
    """None where the run was killed."""

    def media(self, kind: str) -> list[tuple[str, dict[str, Any], Path]]:
        """Metric, description and file of every value of a kind (`table-file`, `html-file`)."""
        return [
            (name, value, value["folder"] / value["path"])
            for row in self.history
            for name, value in row.items()
            if isinstance(value, dict) and value.get("_type") == kind
        ]


def read_log(run_dir: Path) -> WandbLog:
    """The log of the run in `run_dir`. Raises WandbLogError for none, or a damaged one."""
    paths = sorted(
        run_dir.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name.partition("run-")[2]
    )
    if not paths:
        raise WandbLogError(
            f"{run_dir}: expected wandb/offline-run-.../run-....wandb; run with tracking=wandb"
        )
    log = WandbLog(paths)
    for path in paths:
        for data in _records(path):
            _take(log, wandb_internal_pb2.Record.FromString(data), path.parent / "files")
    return log


def damaged(path: Path, sha256: str) -> str | None:
    """Why a file is not the one that was logged; None where it is."""
    if not path.exists():
        return f"{path} is not there"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    return None if found == sha256 else f"{path} is another file than was logged"


def _records(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    if len(data) < _START.size or _START.unpack_from(data)[:2] != (b":W&B", 0xBEE1):
        raise WandbLogError(f"{path} does not begin as a log of W&B's does")
    position, parts = _START.size, b""
    while position + _HEADER.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:  # no room for a header: zeros up to the next block
            position += left
            continue
        checksum, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        part = data[position : position + length]
        if len(part) < length:
            return  # what a kill tore off
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            raise WandbLogError(f"{path} is damaged at byte {position}: the checksum is another one")
        position += length
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            yield parts


def _take(log: WandbLog, record: Any, folder: Path) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        log.config.update(_items(record.run.config.update))
    elif kind == "config":
        log.config.update(_items(record.config.update))
    elif kind == "history":
        row = _items(record.history.item)
        for value in row.values():
            if isinstance(value, dict) and "path" in value:
                value["folder"] = folder
        log.history.append({name: value for name, value in row.items() if not name.startswith("_")})
    elif kind == "summary":
        log.summary.update(_items(record.summary.update))
    elif kind == "artifact":
        found = record.artifact
        log.artifacts.append(
            {
                "name": found.name,
                "type": found.type,
                "aliases": sorted(found.aliases),
                "metadata": json.loads(found.metadata or "{}"),
                "files": [
                    {
                        "path": entry.path,
                        "digest": entry.digest,
                        "size": entry.size,
                        **({"ref": entry.ref} if entry.ref else {"local_path": entry.local_path}),
                    }
                    for entry in found.manifest.contents
                ],
            }
        )
    elif kind == "exit":
        log.exit_code = record.exit.exit_code


def _items(items: Any) -> dict[str, Any]:
    """Key (or nested keys) and JSON of each as one nested dictionary."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = found
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return found
