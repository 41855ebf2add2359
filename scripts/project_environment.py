"""What the Python scripts here start with; standard library only, because nothing else may be installed yet."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use_project_environment(program: str) -> None:
    """Start `program` again in `.venv`, set up if need be, when this Python has no equipoise."""
    if importlib.util.find_spec("equipoise") is not None:
        return
    environment = ROOT / ".venv"
    if Path(sys.prefix) == environment:
        name = Path(program).name
        sys.exit(f"{name}: equipoise is not installed in {environment}; remove that folder and try again.")
    subprocess.run([ROOT / "scripts" / "setup"], check=True, stdout=sys.stderr)
    python = environment / "bin" / "python"
    os.execv(python, [python, program, *sys.argv[1:]])
