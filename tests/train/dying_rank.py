"""train.py, whose rank 1 dies in its second step: `dying_rank.py raise|kill MARKER train.py's arguments`."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.data.errors import EquipoiseError
from equipoise.train import cli
from equipoise.train.trainers.optimizer_steps import OptimizerSteps


def main(how: str, marker: Path, arguments: Sequence[str]) -> int:
    """Train; rank 1 writes the time of its death to `marker`. Rank 0 goes on into the step's collectives and waits."""
    original = OptimizerSteps.training_step

    def training_step(self: OptimizerSteps, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and os.environ["RANK"] == "1":
            marker.write_text(str(time.time()))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise EquipoiseError("this rank's disk is gone")
        return original(self, *args, **kwargs)

    OptimizerSteps.training_step = training_step  # type: ignore[method-assign]
    return cli.main(arguments)


if __name__ == "__main__":
    cli.leave(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
