import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.data.errors import DiskFullError
from equipoise.train.checkpoints import (
    MANIFEST,
    checkpoints,
    find_checkpoint,
    find_damage,
    read_manifest,
    remove_checkpoints,
    save_checkpoint,
)
from equipoise.train.model import save_folder


def write_two(folder: Path) -> None:
    (folder / "weights").write_bytes(b"1234")
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "rank0").write_bytes(b"12")


def refuse(folder: Path) -> None:
    write_two(folder)
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_appears_whole_and_the_two_newest_stay(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        assert not (tmp_path / "checkpoint-6").exists()
        assert names(tmp_path) >= {"checkpoint-2", "checkpoint-4"}  # nothing goes before the new one is there
        write_two(folder)

    for step in (2, 4):
        save_checkpoint(tmp_path, step, {"num_processes": 1}, write_two)
    save_checkpoint(tmp_path, 6, {"num_processes": 1}, write)
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-6"}
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-4"]
    manifest = read_manifest(tmp_path / "checkpoint-6")
    assert (manifest["step"], manifest["num_processes"]) == (6, 1)
    assert {name: facts["size"] for name, facts in manifest["files"].items()} == {
        "weights": 4,
        "optimizer/rank0": 2,
    }
    assert find_damage(tmp_path / "checkpoint-6") is None


def test_what_was_passed_over_is_no_checkpoint_to_keep(tmp_path: Path) -> None:
    """Step 8 was damaged, the run went on from 4: the two that can be gone on from are 4 and 6."""
    for step in (2, 4, 8):
        save_checkpoint(tmp_path, step, {}, write_two)
    (tmp_path / "checkpoint-8" / "weights").write_bytes(b"123")
    said: list[str] = []
    assert find_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-4"
    assert said == [f"{tmp_path / 'checkpoint-8'}: weights has 3 bytes, 4 were written; passed over"]
    save_checkpoint(tmp_path, 6, {}, write_two)
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        (b"1235", "weights is not what was written (its hash differs)"),
        (b"123", "weights has 3 bytes, 4 were written"),
        (None, "weights is missing"),
    ],
)
def test_damage_is_named(content: bytes | None, damage: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, {}, write_two)
    weights = tmp_path / "checkpoint-2" / "weights"
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    assert find_damage(weights.parent) == damage


def test_a_damaged_checkpoint_gives_way_to_the_same_step(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, {}, write_two)
    (tmp_path / "checkpoint-2" / "optimizer" / "rank0").unlink()
    assert find_damage(tmp_path / "checkpoint-2") == "rank0 is missing"
    save_checkpoint(tmp_path, 2, {}, write_two)
    assert find_damage(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("manifest", ["", "[]", '{"files": ["weights"]}', '{"files": {"weights": 4}}', "{}"])
def test_a_manifest_that_is_none_is_damage(manifest: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, {}, write_two)
    (tmp_path / "checkpoint-2" / MANIFEST).write_text(manifest)
    assert find_damage(tmp_path / "checkpoint-2") == "its manifest.json cannot be read"


def test_a_full_disk_spares_the_last_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, {}, write_two)
    with pytest.raises(DiskFullError) as raised:
        save_checkpoint(tmp_path, 4, {}, refuse)
    text = str(raised.value)
    assert text.startswith(f"{tmp_path / 'checkpoint-4'} could not be written: no space left (")
    assert text.endswith(f"The last one, {tmp_path / 'checkpoint-2'}, is as it was.")
    assert names(tmp_path) == {"checkpoint-2"}
    assert find_damage(tmp_path / "checkpoint-2") is None


def test_another_error_leaves_nothing_half_written_either(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_two(folder)
        raise ValueError("shapes differ")

    with pytest.raises(ValueError, match="shapes differ"):
        save_checkpoint(tmp_path, 2, {}, fail)
    assert names(tmp_path) == set()


def test_a_finished_stage_keeps_its_last_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (2, 4):
        save_checkpoint(folder, step, {}, write_two)
    remove_checkpoints(folder, keep_last=True)
    assert names(folder) == {"checkpoint-4"}
    remove_checkpoints(folder, keep_last=False)
    remove_checkpoints(folder, keep_last=False)
    assert names(tmp_path) == set()


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_folder(folder, lambda aside: (aside / "weights").touch())

    def write(aside: Path) -> None:
        refuse(aside)

    with pytest.raises(DiskFullError, match="model could not be written"):
        save_folder(folder, write)
    assert [found.name for found in tmp_path.iterdir()] == ["model"]
    assert [found.name for found in folder.iterdir()] == ["weights"]


@pytest.mark.slow
def test_two_ranks_write_one_checkpoint_and_choose_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is the slower one, the one whose disk is full, and the one whose file is damaged afterwards."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    program = Path(__file__).with_name("checkpoints_on_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, program, tmp_path], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert second == first
    folder = tmp_path / "checkpoints"
    assert first["files of 2"] == first["files of 4"] == [MANIFEST, "rank0", "rank1"]
    assert first["damage"] is None
    assert first["full"].startswith(f"{folder / 'checkpoint-6'} could not be written: no space left")
    assert first["full"].endswith(f"{folder / 'checkpoint-4'}, is as it was.")
    assert first["said"].startswith(f"{folder / 'checkpoint-4'}: rank1 is not what was written")
    assert first["chosen"] == str(folder / "checkpoint-2")
    assert first["left"] == ["checkpoint-2", "checkpoint-4"]


# ---- a stage on a disk that fills up --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(num_bytes)`: a file system of that size; called again it grows."""
    folder = tmp_path / "interrupted"

    def mount(num_bytes: int) -> Path:
        options = f"size={num_bytes}" + (",remount" if folder.is_mount() else "")
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("this user may not mount a small file system")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_stage_goes_on_when_there_is_room_again(
    train_stage: Any, make_stage: Any, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """A real file system with room for one checkpoint and a half."""
    stage = make_stage(save_every=2)
    whole = train_stage(stage, run="whole")
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, run="measured", interrupt_at=3)
    disk = small_disk(int(1.5 * num_bytes(tmp_path / "measured")))
    with pytest.raises(
        DiskFullError, match=r"checkpoint-4 could not be written.*/checkpoint-2, is as it was\."
    ):
        train_stage(stage, run="interrupted")
    folder = disk / "stages" / "safe" / "checkpoints"
    assert names(folder) == {"checkpoint-2"}
    small_disk(2**24)
    resumed = train_stage(stage, run="interrupted")
    assert resumed.started_at == 2
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
