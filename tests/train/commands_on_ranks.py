"""What `test_distributed.py` starts on two ranks: `commands_on_ranks.py COMMANDS.json`, one after the other.

A command has its `arguments`, as train.py takes them, and its `cache`. They share the processes: importing takes longer
than any of them.
"""

import gc
import json
import os
import sys
from pathlib import Path

import equipoise.train.run  # noqa: F401  # all that a command will import
from equipoise.train.cli import leave, main

if __name__ == "__main__":
    gc.freeze()  # every training ends in a collection: not of what is imported
    for command in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["EQUIPOISE_CACHE"] = command["cache"]
        if code := main(command["arguments"]):
            leave(code)
