"""What docs/architecture.md names is there: a tour that leads past missing houses is worse than none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
ROWS = re.findall(r"^\| `([\w./]+)` \| ([^|]*) \|", PAGE, re.MULTILINE)


def defined_names(path: Path) -> set[str]:
    """Functions, classes, their methods as Class.method, and variables at the top of a module."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize(("file", "names"), ROWS)
def test_files_and_names_of_the_tables_exist(file: str, names: str) -> None:
    path = ROOT / file
    assert path.is_file()
    missing = set(re.findall(r"`([\w.]+)`", names)) - (defined_names(path) if path.suffix == ".py" else set())
    assert not missing, f"{file} has no {', '.join(sorted(missing))}"


def test_every_path_of_the_text_exists() -> None:
    assert len(ROWS) > 20
    for path in re.findall(r"`((?:sleb|engine|kernels|server|benchmarks|tests|docs)/[\w./]+)`", PAGE):
        assert (ROOT / path).exists(), path
