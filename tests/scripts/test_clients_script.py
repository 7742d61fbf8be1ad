"""`scripts/clients`: what it lists can be run. The clients themselves need a network and minutes."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/clients"
FOLDER = ROOT / "tests/clients"
ENDINGS = {"python": "py", "node": "mjs", "command": "py"}


@pytest.fixture(scope="module")
def listed() -> dict[str, tuple[str, list[str]]]:
    """Kind and packages of every client."""
    done = subprocess.run([SCRIPT, "--list"], capture_output=True, text=True, check=True, timeout=30)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len({name for name, *_ in rows}) == len(rows) > 10
    return {name: (kind, packages) for name, kind, *packages in rows}


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=30)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True, timeout=60)


def test_every_client_has_a_script_and_every_script_a_client(
    listed: dict[str, tuple[str, list[str]]],
) -> None:
    scripts = {f"{name}.{ENDINGS[kind]}" for name, (kind, _) in listed.items()}
    present = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".mjs")}
    assert present - {"lm_eval_reference.py"} == scripts  # the second half of lm_eval


def test_what_passed_is_pinned(listed: dict[str, tuple[str, list[str]]]) -> None:
    for name, (kind, packages) in listed.items():
        sign = "==" if kind == "python" else "@"
        assert re.fullmatch(rf"\S+{sign}\d[\w.]*", packages[0]), (name, packages)


def test_commands_and_what_all_import_need_no_package(listed: dict[str, tuple[str, list[str]]]) -> None:
    """`command` scripts run by any interpreter, and the shared module in every environment."""
    paths = [FOLDER / f"{name}.py" for name, (kind, _) in listed.items() if kind == "command"]
    for path in [*paths, FOLDER / "common/plain.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        foreign = (
            {name.partition(".")[0] for name in names if name} - set(sys.stdlib_module_names) - {"plain"}
        )
        assert not foreign, path


def test_an_unknown_client_is_refused_with_those_there_are() -> None:
    done = subprocess.run([SCRIPT, "no-such-client"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "openai_node" in done.stderr, done
