import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from equipoise.eval import fingerprint
from equipoise.eval.fingerprint import file_fingerprint, model_fingerprint


def test_a_file_is_read_again_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = hashlib.file_digest

    def counting(file: Any, name: str) -> Any:
        read.append(Path(file.name).name)
        return original(file, name)

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", counting)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_bytes(b"says nothing of answers")
    first = model_fingerprint(str(tmp_path))
    assert model_fingerprint(str(tmp_path)) == first
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert file_fingerprint(weights) == f"sha256:{hashlib.sha256(b'one').hexdigest()}"
    # As long, and written in the same tick of the clock: renamed into place, as all our files are.
    times = weights.stat()
    (tmp_path / "aside").write_bytes(b"two")
    (tmp_path / "aside").replace(weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_fingerprint(str(tmp_path)) != first
    assert file_fingerprint(weights) == f"sha256:{hashlib.sha256(b'two').hexdigest()}"
    # Weights are told by their names, too, and a folder is no part of them.
    second = model_fingerprint(str(tmp_path))
    weights.rename(tmp_path / "other.safetensors")
    assert model_fingerprint(str(tmp_path)) != second
