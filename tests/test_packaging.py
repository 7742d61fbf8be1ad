"""What an install brings: the wheel's files, and pins for every dependency."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("engine", "kernels", "server", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def read_pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def direct_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for group in (PROJECT["dependencies"], *extras) for line in group]


def expected_files() -> set[str]:
    """Every module of the four folders and of sleb itself, and the data, by its name in the wheel."""
    names = {f"sleb/{path.relative_to(ROOT)}" for name in LINKED for path in (ROOT / name).rglob("*.py")}
    own = [*(ROOT / "sleb").glob("*.py"), *(ROOT / "sleb/cli").glob("*.py")]
    data = [ROOT / "sleb/py.typed", *(ROOT / "sleb/maps").glob("*.json")]
    return names | {str(path.relative_to(ROOT)) for path in (*own, *data)}


def build(source: Path, kind: str, destination: Path) -> Path:
    """Calls the build backend as pip does, in a process of its own; returns the archive's path."""
    destination.mkdir()
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(destination)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    [archive] = destination.iterdir()
    return archive


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, so that nothing is built in the tree and no stale build is picked up."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("sleb", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel_files(checkout: Path) -> set[str]:
    with zipfile.ZipFile(build(checkout, "wheel", checkout / "wheel")) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_package_through_the_links(wheel_files: set[str]) -> None:
    assert expected_files() <= wheel_files
    assert {"sleb/engine/llm.py", "sleb/kernels/reference.py", "sleb/py.typed"} <= wheel_files


def test_wheel_has_one_top_level_name(wheel_files: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_files}
    assert tops == {"sleb", f"sleb-{_version()}.dist-info"}
    assert not [name for name in wheel_files if "results/" in name or name.startswith("sleb/tests")]


def test_source_distribution_builds_the_same_wheel(
    checkout: Path, wheel_files: set[str], tmp_path: Path
) -> None:
    shutil.unpack_archive(build(checkout, "sdist", tmp_path / "sdist"), tmp_path)
    [unpacked] = tmp_path.glob("sleb-*")
    with zipfile.ZipFile(build(unpacked, "wheel", tmp_path / "wheel")) as archive:
        assert set(archive.namelist()) == wheel_files


def _version() -> str:
    source = (ROOT / "sleb/__init__.py").read_text("utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert found is not None
    return found[1]


def test_every_import_is_a_declared_dependency() -> None:
    """A package that merely comes along with another one may stop doing so."""
    declared = {requirement.name.replace("-", "_") for requirement in direct_requirements()}
    for name in ("sleb", *LINKED):
        for parent, _, files in os.walk(ROOT / name):
            for path in (Path(parent, file) for file in files if file.endswith(".py")):
                unknown = _third_parties(path) - declared
                assert not unknown, f"{path}: add {', '.join(unknown)} to pyproject.toml and run scripts/pin"


def _third_parties(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"sleb"}


def test_constraints_are_exact_and_portable() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*", line) for line in pins)
    names = [line.split("==")[0] for line in pins]
    assert names == sorted(set(names))
    assert "torch==2.13.0" in pins


def test_constraints_satisfy_what_is_declared() -> None:
    pins = read_pins()
    for requirement in direct_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin; run scripts/pin"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is outside {requirement}"


def test_constraints_pin_transitive_dependencies() -> None:
    """Follows the metadata of what is installed here, from our own dependencies down."""
    pins = read_pins()
    waiting = [requirement for requirement in direct_requirements() if _applies(requirement, set())]
    seen: set[tuple[str, frozenset[str]]] = set()
    unpinned = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name not in pins:
            unpinned.add(name)
        try:
            below = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        waiting += [each for each in map(Requirement, below) if _applies(each, requirement.extras)]
    assert len(seen) > 40
    assert not unpinned, "run scripts/pin"


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    environment = default_environment()
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**environment, "extra": each}) for each in extras or {""})
