"""Train, judge and gate: `accelerate launch train.py recipe=tsdi`; `python train.py --help` lists what is possible."""

import sys

from equipoise.train.cli import leave, main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
