"""Lets the tests import scripted_server.py, which lies beside them but is no test, as sleb_tests_scripted_server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_NAME = "sleb_tests_scripted_server"
_spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name("scripted_server.py"))
assert _spec is not None and _spec.loader is not None
sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_NAME])
