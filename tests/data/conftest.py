"""A local copy of every data set that equipoise knows, in miniature."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _load_mirrors() -> ModuleType:
    """`mirrors.py` beside this file: tests are no package, so that it is loaded by its path."""
    spec = importlib.util.spec_from_file_location("mirrors", Path(__file__).with_name("mirrors.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def mirrors() -> ModuleType:
    """What writes such copies."""
    return _load_mirrors()


@pytest.fixture(scope="session")
def mirror(mirrors: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets; read-only by convention."""
    folder = tmp_path_factory.mktemp("mirror")
    for write in (
        mirrors.write_pku,
        mirrors.write_hh,
        mirrors.write_ultrafeedback,
        mirrors.write_helpsteer,
        mirrors.write_beavertails,
        mirrors.write_wildguardmix,
        mirrors.write_aegis2,
        mirrors.write_do_not_answer,
    ):
        write(folder)
    return folder
