"""`python -m equipoise.eval model=smollm2_135m suite=category_safety`: see `cli.py`."""

import sys

from equipoise.eval.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
