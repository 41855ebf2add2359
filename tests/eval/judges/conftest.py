"""Every judge's form, one after another, for what must hold of all of them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _load_cases() -> ModuleType:
    """`cases.py` beside this file: tests are no package, so that it is loaded by its path."""
    spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("cases.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = _load_cases().CASES
        metafunc.parametrize("case", cases.values(), ids=cases)


@pytest.fixture(scope="session")
def cases() -> ModuleType:
    """All of them, and what holds for every judgement."""
    return _load_cases()
