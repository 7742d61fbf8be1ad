"""Lets the tests import scripted_server.py, which lies beside them but is no test, as sleb_tests_scripted_server."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_NAME = "sleb_tests_scripted_server"
_spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name("scripted_server.py"))
assert _spec is not None and _spec.loader is not None
sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_NAME])


@pytest.fixture(scope="module", autouse=True)
def frozen_once() -> Iterator[None]:
    """A measurement freezes what there is, and collects before each run: here, what there is are 10,000 tests."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
