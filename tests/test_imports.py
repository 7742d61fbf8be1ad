"""Who may import whom, checked on syntax trees, and what the engine needs installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("sleb", "engine", "kernels", "server", "benchmarks", "tests")
LINKED = ("engine", "kernels", "server", "benchmarks")

# Part of sleb -> the modules and folders directly under sleb/ that belong to it.
PARTS = {
    "root": ("__init__",),
    "errors": ("errors",),
    "options": ("options",),
    "layer_map": ("layer_map",),
    "models": ("models",),
    "formats": ("formats",),
    "kernels": ("kernels",),
    "engine": ("engine",),
    "pruning": ("pruning",),
    "server": ("server",),
    "benchmarks": ("benchmarks",),
    "client": ("client",),
    "doctor": ("doctor",),
    "cli": ("cli", "__main__"),
}

# Part -> what it may import besides itself and errors. Tests may import anything.
ARROWS = {
    "root": {"layer_map", "engine", "pruning"},
    "errors": set(),
    "options": set(),
    "layer_map": set(),
    "models": set(),
    "formats": {"engine", "layer_map", "models"},
    "kernels": set(),
    "engine": {"kernels", "layer_map", "models"},
    "pruning": {"engine", "layer_map", "models"},
    "server": {"engine", "layer_map", "models"},
    "benchmarks": set(PARTS) - {"cli"},
    "client": set(),
    "doctor": {"client"},
    "cli": set(PARTS),
}

# Folder -> third parties that it must do without.
FORBIDDEN = {
    "engine": ("fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn", "typer"),
    "kernels": ("fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn", "typer", "transformers"),
}

PART_OF = {module: part for part, modules in PARTS.items() for module in modules}


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str, str | None]]:
    """Line, module and name of every import, those inside functions and under TYPE_CHECKING too.

    The name is None for `import module`; a relative import has a module that begins with dots. A use of
    `sleb.name` counts as an import of that name, since `import sleb` alone says nothing.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sleb":
            yield node.lineno, "sleb", node.attr


def owner(path: Path) -> str | None:
    """The part that the file at `path` (relative to the root) belongs to; None for a test."""
    if path.parts[0] == "tests":
        return None
    inside = path.parts[1:] if path.parts[0] == "sleb" else path.parts
    return PART_OF.get(inside[0].removesuffix(".py"), f"unknown {path.parts[0]}/{inside[0]}")


def target(module: str, name: str | None) -> str | None:
    """The part that an import reaches; None when it reaches nothing of sleb, or only the version."""
    first, *rest = module.split(".")
    if first != "sleb":
        return None
    if rest:
        return PART_OF.get(rest[0], f"unknown sleb.{rest[0]}")
    if name in (None, "__version__"):
        return None
    return PART_OF.get(name, "root")


def violations(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of one file, one message each."""
    part = owner(path)
    found = []
    if part is not None and part not in ARROWS:
        found.append(f"{path}: no part of sleb owns this module; add it to PARTS in tests/test_imports.py")
    for line, module, name in imported_names(ast.parse(source)):
        where = f"{path}:{line}"
        first = module.split(".")[0]
        reached = target(module, name)
        if module.startswith("."):
            found.append(f"{where}: relative import; write the whole name, sleb.…")
        elif first in LINKED:
            found.append(f"{where}: imports '{module}'; write sleb.{module}")
        elif first in FORBIDDEN.get(path.parts[0], ()):
            found.append(f"{where}: {path.parts[0]} must do without {first}")
        elif (
            reached is not None
            and part in ARROWS
            and reached not in {part, "errors", "options", *ARROWS[part]}
        ):
            found.append(f"{where}: {part} must not import {reached} ('{module}')")
    return found


def python_files() -> Iterator[Path]:
    """Every Python file, relative to the root, through its real folder only."""
    for folder in FOLDERS:
        for parent, _, files in os.walk(ROOT / folder, followlinks=False):
            for file in sorted(files):
                if file.endswith(".py"):
                    yield (Path(parent) / file).relative_to(ROOT)


def test_every_import_follows_the_arrows() -> None:
    files = list(python_files())
    assert len({path.parts[0] for path in files} & {"sleb", "engine", "kernels", "tests"}) == 4
    found = [message for path in files for message in violations(path, (ROOT / path).read_text("utf-8"))]
    assert not found, "\n" + "\n".join(found)


def test_the_arrows_have_no_circle() -> None:
    """Nothing can be reached from itself, so the parts can be understood and tested bottom up."""
    assert set(ARROWS) == set(PARTS)

    def reachable(part: str, seen: frozenset[str]) -> Iterator[str]:
        for other in ARROWS[part] - {part}:
            assert other not in seen, f"{part} → {other} closes a circle"
            yield other
            yield from reachable(other, seen | {other})

    for part in set(ARROWS) - {"cli", "benchmarks"}:
        assert part not in set(reachable(part, frozenset({part})))


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("sleb/cli/serve.py", "import engine", "write sleb.engine"),
        ("sleb/cli/serve.py", "import engine.llm as x", "write sleb.engine.llm"),
        ("tests/test_x.py", "from kernels.registry import resolve", "write sleb.kernels.registry"),
        ("engine/llm.py", "from .request import Request", "relative import"),
        ("engine/llm.py", "from . import request", "relative import"),
        ("engine/llm.py", "def f():\n    from sleb.server.app import app", "engine must not import server"),
        (
            "kernels/rope.py",
            "if TYPE_CHECKING:\n    from sleb.engine.schedule.step import Step",
            "kernels must not import engine",
        ),
        ("sleb/layer_map/layer_map.py", "from sleb import engine", "layer_map must not import engine"),
        ("sleb/models/resolve.py", "from sleb import LayerMap", "models must not import root"),
        ("engine/config.py", "from sleb import LLM", "engine must not import root"),
        ("server/app.py", "import sleb\nx = sleb.prune", "server must not import root"),
        ("engine/config.py", "from sleb.pruning.run import prune", "engine must not import pruning"),
        ("server/app.py", "from sleb.cli import main", "server must not import cli"),
        ("server/app.py", "from sleb.newcomer import x", "server must not import unknown sleb.newcomer"),
        ("benchmarks/throughput.py", "from sleb.cli import main", "benchmarks must not import cli"),
        ("engine/outputs.py", "from pydantic import BaseModel", "engine must do without pydantic"),
        ("engine/outputs.py", "import fastapi.responses", "engine must do without fastapi"),
        ("sleb/newcomer.py", "", "no part of sleb owns"),
    ],
)
def test_the_checker_sees(path: str, source: str, complaint: str) -> None:
    found = violations(Path(path), source)
    assert len(found) == 1
    assert complaint in found[0]
    assert path in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "engine/llm.py",
            "from sleb.engine.requests.request import Request\nfrom sleb.kernels import registry",
        ),
        ("engine/llm.py", "from sleb.errors import ConfigError\nimport torch, transformers"),
        ("engine/x.py", "import engineering\nfrom kernels_of_truth import x"),
        ("server/app.py", "from sleb import __version__\nfrom fastapi import FastAPI"),
        ("server/app.py", "import sleb\nversion = sleb.__version__"),
        ("tests/test_x.py", "from sleb import LLM\nfrom sleb.cli import main\nimport sleb.server.app"),
    ],
)
def test_the_checker_lets_pass(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


def test_linked_folders_have_no_init() -> None:
    """A folder `kernels` with an __init__.py at the root would hide the published package of that name."""
    for name in LINKED:
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / "sleb" / name).resolve() == ROOT / name


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_engine_imports_with_only_its_own_dependencies() -> None:
    """The engine runs where neither the server's packages nor those for fetching models are installed."""
    absent = (
        "fastapi",
        "starlette",
        "pydantic",
        "uvicorn",
        "uvloop",
        "orjson",
        "gguf",
        "typer",
        "datasets",
        "triton",
        "flash_attn",
    )
    modules = [
        "sleb." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "engine").rglob("*.py"))
    ]
    done = run_python(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"  # None makes an import of that name fail
        "import importlib, sleb\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "sleb.LLM, sleb.SamplingParams, sleb.LayerMap"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["import sleb", "import sleb.cli", "import sleb.errors"])
def test_importing_is_quick(program: str) -> None:
    heavy = ("torch", "transformers", "fastapi", "pydantic", "numpy", "huggingface_hub")
    done = run_python(f"import sys\n{program}\nprint(*(set({heavy!r}) & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_public_names() -> None:
    """`sleb.prune` stays the function after the modules of the package have been imported."""
    done = run_python(
        "import sleb, sleb.pruning.run, sleb.cli, sleb.pruning.search\n"
        "assert callable(sleb.prune) and sleb.prune is sleb.pruning.run.prune\n"
        "from sleb import LLM, LayerMap, SamplingParams, prune\n"
        "assert all(isinstance(x, type) for x in (LLM, LayerMap, SamplingParams))\n"
        "assert set(sleb.__all__) <= set(dir(sleb))\n"
        "try:\n    sleb.LLm\nexcept AttributeError as error:\n    assert 'SamplingParams' in str(error)\n"
        "else:\n    raise AssertionError"
    )
    assert done.returncode == 0, done.stderr


def test_no_module_hides_a_public_name() -> None:
    import sleb

    taken = {path.stem for path in (ROOT / "sleb").iterdir()}
    assert not taken & (set(sleb.__all__) - {"__version__"})
