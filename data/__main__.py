"""`python -m equipoise.data inspect data=jsonl data.path=pairs.jsonl`."""

import sys

from equipoise.data.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
