"""Fixtures: a tiny random Llama and a byte-level tokenizer with a chat template, made without a network."""

import functools
import gc
import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, and training before the rest.

    With `--dist loadfile` a worker that is free takes the next file: what is left to the end should be short.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, "train" not in item.path.parts))


def pytest_collection_finish() -> None:
    """Spare small trainings what takes longer than they do.

    accelerate collects garbage after each, a walk through a million objects of imported packages: those are frozen. And
    it reads packages' metadata whenever it unwraps a model: they are kept.
    """
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _loggers_on() -> None:
    """Hydra, which the command line composes with, switches off whatever loggers a process has by then."""
    logging.root.setLevel(logging.WARNING)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("equipoise") and isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(scope="session")
def tiny_llama() -> ModuleType:
    """The scripts' module of that name, by its path: scripts/ is no package. Imported here, as it imports torch."""
    path = Path(__file__).parents[1] / "scripts" / "tiny_llama.py"
    spec = importlib.util.spec_from_file_location("tiny_llama", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_tokenizer(tiny_llama: ModuleType) -> Any:
    return tiny_llama.make_tokenizer()


@pytest.fixture
def tiny_model(tiny_llama: ModuleType) -> Any:
    return tiny_llama.make_model()


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_llama: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `from_pretrained` loads; read-only by convention."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_llama.make_model().save_pretrained(folder)
    tiny_llama.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def holding() -> Callable[..., AbstractContextManager["subprocess.Popen[bytes]"]]:
    """`with holding(code, argument) as other`: another process has run the code and lives on until it is killed."""

    @contextmanager
    def held(code: str, argument: str) -> Iterator["subprocess.Popen[bytes]"]:
        code += "; print('held', flush=True); import time; time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", code, argument], stdout=subprocess.PIPE) as other:
            try:
                assert other.stdout is not None
                assert other.stdout.readline() == b"held\n"
                yield other
            finally:
                other.kill()

    return held


@pytest.fixture
def folder_in_use(holding: Any) -> Callable[[Path], AbstractContextManager["subprocess.Popen[bytes]"]]:
    """`with folder_in_use(folder) as other`: another process has locked it (`train/locks.py`), until it is killed."""
    lock = (
        "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "file.truncate(0); file.write('process 17 on there'); file.flush()"
    )

    def held(folder: Path) -> AbstractContextManager["subprocess.Popen[bytes]"]:
        folder.mkdir(parents=True, exist_ok=True)
        return holding(lock, str(folder / ".lock"))

    return held
