"""What `test_distributed.py` starts on two ranks: `commands_on_ranks.py JOB.json`, one thing after the other.

Each of `commands` has its `arguments`, as train.py takes them, and its `cache`; `gated` is what gate_on_ranks.py is
given; then rank 1 fails, which ends the launch: `dies` has the arguments, the marker and the file of the exit code.
They share the processes: importing takes longer than any of them.
"""

import gc
import json
import os
import sys
from pathlib import Path

import dying_rank
import gate_on_ranks

import equipoise.train.run  # noqa: F401  # all that a command will import
from equipoise.train import cli

LAST = "===== a rank dies"
"""In standard error: what follows is of the ranks' end."""

if __name__ == "__main__":
    gc.freeze()  # every training ends in a collection: not of what is imported
    job = json.loads(Path(sys.argv[1]).read_text())
    for command in job["commands"]:
        os.environ["EQUIPOISE_CACHE"] = command["cache"]
        if code := cli.main(command["arguments"]):
            cli.leave(code)
    gate_on_ranks.main(job["gated"]["model"], job["gated"]["judge"], Path(job["gated"]["out"]))
    print(LAST, file=sys.stderr, flush=True)
    os.environ[cli.EXIT_CODE_FILE] = job["dies"]["code"]
    cli.leave(dying_rank.main("raise", Path(job["dies"]["marker"]), job["dies"]["arguments"]))
