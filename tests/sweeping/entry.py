"""train.py as the sweep's tests start it: made-up data and a judge by a rule instead of the shipped ones.

`python entry.py TRAIN_PY ARGUMENTS...`, as `--launch 'python entry.py'` has it. A point with the argument in `FAIL_ON`
crashes.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def _conftest() -> ModuleType:
    path = Path(__file__).parents[1] / "train" / "conftest.py"
    spec = importlib.util.spec_from_file_location("training_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> int:
    """Run; the last line of the log says how many answers were judged."""
    if os.environ.get("FAIL_ON") in arguments:
        raise RuntimeError("a point that was told to fail")
    from equipoise.train import cli
    from equipoise.train import run as run_module

    conftest = _conftest()
    judge = conftest.FakeJudge(lambda prompt, response: len(response) % 2 == 0)
    run_module.load_data = lambda *_: conftest._data()
    run_module.load_judge = lambda *_, **__: judge
    code = cli.main(arguments)
    print(f"judged {judge.num_judged} answers")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
