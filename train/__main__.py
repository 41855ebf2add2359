"""`python -m equipoise.train recipe=tsdi` is `python train.py recipe=tsdi`."""

import sys

from equipoise.train.cli import leave, main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
