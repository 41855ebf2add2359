"""What `test_checkpoints.py` starts on two ranks: a rank's findings go to `rank<N>.json`."""

import errno
import json
import sys
import time
from pathlib import Path

from accelerate import PartialState

from equipoise.data.errors import DiskFullError
from equipoise.train.checkpoints import find_checkpoint, find_damage, save_checkpoint


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    rank, found = state.process_index, {}
    checkpoints = folder / "checkpoints"

    def write(aside: Path) -> None:
        if rank == 1:
            time.sleep(0.5)  # the slower one
        (aside / f"rank{rank}").write_text(f"of rank {rank}")

    def refuse(aside: Path) -> None:
        write(aside)
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    for step in (2, 4):
        save_checkpoint(checkpoints, step, {"num_processes": 2}, write)
        found[f"files of {step}"] = sorted(p.name for p in (checkpoints / f"checkpoint-{step}").iterdir())
    found["damage"] = find_damage(checkpoints / "checkpoint-4")
    try:
        save_checkpoint(checkpoints, 6, {"num_processes": 2}, refuse)
    except DiskFullError as error:
        found["full"] = str(error)
    state.wait_for_everyone()
    if rank == 0:
        (checkpoints / "checkpoint-4" / "rank1").write_text("of rank 7")
    state.wait_for_everyone()
    found["chosen"] = str(find_checkpoint(checkpoints, lambda text: found.setdefault("said", text)))
    found["left"] = sorted(path.name for path in checkpoints.iterdir())
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
