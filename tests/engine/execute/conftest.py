"""Lets the tests import captured_step.py, which lies beside them but is no test, as sleb_tests_captured_step."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_NAME = "sleb_tests_captured_step"


@pytest.fixture(scope="session")
def captured_step() -> ModuleType:
    """captured_step.py; without Triton the test is skipped."""
    pytest.importorskip("triton")
    if _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name("captured_step.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[_NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_NAME])
    return sys.modules[_NAME]
