"""train.py, whose rank 1 dies in its second step: `dying_rank.py raise|kill MARKER train.py's arguments`."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from equipoise.data.errors import EquipoiseError
from equipoise.train.cli import leave, main
from equipoise.train.trainers.optimizer_steps import OptimizerSteps

how, marker, *arguments = sys.argv[1:]
original = OptimizerSteps.training_step


def training_step(self: OptimizerSteps, *args: Any, **kwargs: Any) -> Any:
    """Rank 0 goes on into the step's collectives and waits there for rank 1."""
    if self.state.global_step == 1 and os.environ["RANK"] == "1":
        Path(marker).write_text(str(time.time()))
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise EquipoiseError("this rank's disk is gone")
    return original(self, *args, **kwargs)


if __name__ == "__main__":
    OptimizerSteps.training_step = training_step  # type: ignore[method-assign]
    leave(main(arguments))
