"""`python -m equipoise.train recipe=tsdi` is `python train.py recipe=tsdi`."""

import sys

from equipoise.train.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
