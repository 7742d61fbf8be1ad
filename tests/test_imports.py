"""Who may import whom, checked on syntax trees, and what the engine needs installed."""

from __future__ import annotations

import ast
import graphlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("engine", "kernels", "server", "benchmarks")
FOLDERS = ("sleb", *LINKED, "research", "tests")

# Everyone may import these, and they nothing but each other.
EVERYONE = {"errors", "version", "files", "fields", "options", "terminal"}

# Folder or module under sleb/ -> what it may import besides itself and EVERYONE. Of several that contain a file the
# longest counts. Tests may import anything.
ARROWS = {
    **{name: set[str]() for name in EVERYONE},
    "__init__": {"engine", "layer_map", "pruning"},
    "layer_map": set(),
    "models": {"layer_map"},
    "kernels": set(),
    "engine": {"kernels", "layer_map", "models"},
    "pruning": {"engine", "layer_map", "models"},
    "pruning/search": {"layer_map"},
    "pruning/calibration": {"layer_map"},
    "formats": {"engine", "layer_map", "models", "pruning"},
    "client": set(),
    "doctor": {"client"},
    "server": {"engine", "layer_map", "models"},
    "batch": {"engine", "layer_map", "models", "server"},
    "benchmarks": {"engine", "kernels", "layer_map", "models", "pruning", "client", "server"},
    "research": {"benchmarks", "cli", "engine", "kernels", "layer_map", "models", "pruning"},
    "cli": {
        "batch",
        "benchmarks",
        "client",
        "doctor",
        "engine",
        "formats",
        "layer_map",
        "models",
        "pruning",
        "server",
    },
    "__main__": {"cli"},
}

# Folder -> third parties that it must do without.
FORBIDDEN = {
    "engine": ("fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn", "typer", "ray"),
    "kernels": ("fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn", "typer", "transformers"),
}


def place(path: Path) -> str:
    """`path` as ARROWS writes it: below sleb/, without a suffix."""
    return path.with_suffix("").as_posix().removeprefix("sleb/")


def owner(inside: str) -> str | None:
    """The entry of ARROWS that holds the file or folder `inside` of sleb."""
    holding = [each for each in ARROWS if inside == each or inside.startswith(f"{each}/")]
    return max(holding, key=len, default=None)


def imports(tree: ast.AST, *, typing_only: bool = True) -> Iterator[tuple[int, str, str | None]]:
    """Line, module and name of every import, those inside functions too.

    The name is None for `import module`; a relative import has a module that begins with dots. A use of
    `sleb.name` counts as an import of that name, since `import sleb` alone says nothing. `typing_only`: whether
    those under `if TYPE_CHECKING` count.
    """
    if (
        isinstance(tree, ast.If)
        and not typing_only
        and ast.unparse(tree.test)
        in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        )
    ):
        for node in tree.orelse:
            yield from imports(node, typing_only=False)
        return
    if isinstance(tree, ast.Import):
        yield from ((tree.lineno, alias.name, None) for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        module = "." * tree.level + (tree.module or "")
        yield from ((tree.lineno, module, alias.name) for alias in tree.names)
    elif isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name) and tree.value.id == "sleb":
        yield tree.lineno, "sleb", tree.attr
    for node in ast.iter_child_nodes(tree):
        yield from imports(node, typing_only=typing_only)


def violations(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of one file, one message each."""
    part = None if path.parts[0] == "tests" else owner(place(path))
    found = []
    if part is None and path.parts[0] != "tests":
        found.append(f"{path}: no folder of tests/test_imports.py holds this module; add it to ARROWS")
    for line, module, name in imports(ast.parse(source)):
        where = f"{path}:{line}"
        first, *inside = module.split(".")
        if module.startswith("."):
            found.append(f"{where}: relative import; write the whole name, sleb.…")
        elif first in LINKED:
            found.append(f"{where}: imports '{module}'; write sleb.{module}")
        elif first in FORBIDDEN.get(path.parts[0], ()):
            found.append(f"{where}: {path.parts[0]} must do without {first}")
        elif first == "sleb" and part is not None and (inside or name is not None):
            whole = "/".join([*inside, *([name] if name else [])])
            reached = owner(whole) or ("__init__" if not inside else f"unknown {module}")
            allowed = EVERYONE | ARROWS[part] | {part}
            if not any(reached == each or reached.startswith(f"{each}/") for each in allowed):
                found.append(f"{where}: {part} must not import {reached} ('{module}')")
    return found


def import_graph(sources: Mapping[Path, str]) -> dict[Path, set[Path]]:
    """File -> the files of `sources` that it imports at run time, inside functions too.

    `from package import name` is an import of the module `name` if there is one, else of the package's __init__.
    """
    files = {place(path).removesuffix("/__init__"): path for path in sources}

    def reached(module: str, name: str | None) -> Path | None:
        first, *inside = module.split(".")
        if first != "sleb":
            return None
        whole = "/".join([*inside, *([name] if name else [])])
        return files.get(whole) or files.get("/".join(inside) or "__init__")

    graph: dict[Path, set[Path]] = {}
    for path, source in sources.items():
        names = imports(ast.parse(source), typing_only=False)
        found = {reached(module, name) for _, module, name in names}
        graph[path] = {each for each in found if each is not None and each != path}
    return graph


def circles(sources: Mapping[Path, str]) -> list[list[Path]]:
    """Files that import each other in a ring, each ring once, as [a, b, …, a]: an arrow from each to the next."""
    graph = import_graph(sources)
    found = []
    while True:
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            ring = error.args[1][::-1]
            found.append(ring)
            graph[ring[0]].discard(ring[1])  # to see the next one
        else:
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
    """Nothing can be reached from itself, so the folders can be understood and tested bottom up."""
    graphlib.TopologicalSorter(ARROWS).prepare()
    assert {each for allowed in ARROWS.values() for each in allowed} <= set(ARROWS)


def test_no_two_files_import_each_other() -> None:
    """Neither at the top nor inside functions, nor by way of others: each file can be read after those it needs."""
    files = [path for path in python_files() if path.parts[0] != "tests"]
    found = circles({path: (ROOT / path).read_text("utf-8") for path in files})
    assert not found, "\n" + "\n".join(" → ".join(map(str, ring)) for ring in found)


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
        ("sleb/models/resolve.py", "from sleb import LayerMap", "models must not import __init__"),
        ("engine/config.py", "from sleb import LLM", "engine must not import __init__"),
        ("server/app.py", "import sleb\nx = sleb.prune", "server must not import __init__"),
        ("engine/config.py", "from sleb.pruning.run import prune", "engine must not import pruning"),
        ("server/app.py", "from sleb.cli import main", "server must not import cli"),
        ("server/app.py", "from sleb.newcomer import x", "server must not import unknown sleb.newcomer"),
        ("benchmarks/throughput.py", "from sleb.cli import main", "benchmarks must not import cli"),
        ("engine/outputs.py", "from pydantic import BaseModel", "engine must do without pydantic"),
        ("engine/outputs.py", "import fastapi.responses", "engine must do without fastapi"),
        ("sleb/newcomer.py", "", "add it to ARROWS"),
        ("server/app.py", "from sleb import __version__", "server must not import __init__"),
        (
            "sleb/pruning/search/loop.py",
            "import sleb.pruning.target",
            "pruning/search must not import pruning",
        ),
        (
            "sleb/pruning/calibration/spec.py",
            "from sleb.engine.text import x",
            "pruning/calibration must not import engine",
        ),
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
        ("server/app.py", "from sleb.version import __version__\nfrom fastapi import FastAPI"),
        ("server/app.py", "import sleb.files\nimport sleb.engine.llm as llm"),
        ("sleb/pruning/run.py", "from sleb.pruning.search import search"),
        ("tests/test_x.py", "from sleb import LLM\nfrom sleb.cli import main\nimport sleb.server.app"),
    ],
)
def test_the_checker_lets_pass(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


@pytest.mark.parametrize(
    ("sources", "rings"),
    [
        (
            {
                "engine/a.py": "import sleb.server.b",
                "server/b.py": "import sleb.errors",
                "sleb/errors.py": "",
            },
            [],
        ),
        ({"engine/a.py": "import sleb.server.b", "server/b.py": "from sleb.engine.a import x"}, ["ab"]),
        (
            {"engine/a.py": "def f():\n    import sleb.server.b", "server/b.py": "from sleb.engine import a"},
            ["ab"],
        ),
        (
            {
                "engine/a.py": "if TYPE_CHECKING:\n    from sleb.server.b import x\nelse:\n    x = None",
                "server/b.py": "from sleb.engine.a import x",
            },
            [],
        ),
        (  # by way of a package's __init__, whose name is taken
            {
                "sleb/p/a.py": "from sleb.p import name",
                "sleb/p/__init__.py": "from sleb.p.b import name",
                "sleb/p/b.py": "class B:\n    import sleb.p.a",
            },
            ["__init__ab"],
        ),
        (  # importing a module does not take a name from its package
            {
                "sleb/p/a.py": "from sleb.p import b",
                "sleb/p/__init__.py": "from sleb.p.a import x",
                "sleb/p/b.py": "",
            },
            [],
        ),
        ({"sleb/a.py": "import sleb\nsleb.LLM", "sleb/__init__.py": "from sleb.a import LLM"}, ["__init__a"]),
        (
            {
                "sleb/a.py": "import sleb.b, sleb.c",
                "sleb/b.py": "import sleb.a",
                "sleb/c.py": "import sleb.d",
                "sleb/d.py": "try:\n    import sleb.c\nfinally: ...",
            },
            ["ab", "cd"],
        ),
    ],
)
def test_circles_are_seen(sources: dict[str, str], rings: list[str]) -> None:
    found = circles({Path(path): source for path, source in sources.items()})
    assert sorted("".join(sorted(path.stem for path in ring[1:])) for ring in found) == rings
    for ring in found:
        assert ring[0] == ring[-1]
        graph = import_graph({Path(path): source for path, source in sources.items()})
        assert all(after in graph[before] for before, after in itertools.pairwise(ring))


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
