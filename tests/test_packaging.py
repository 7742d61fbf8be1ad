"""What an install brings: the wheel's files, and pins for every dependency."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import httpx
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sleb.kernels.cpu.build import LIBRARY_NAME, find_compiler, has_key, source_key, unsupported

ROOT = Path(__file__).resolve().parent.parent
# Packages whose module has another name.
IMPORTED_AS = {"pyyaml": "yaml", "markdown-it-py": "markdown_it", "opentelemetry-sdk": "opentelemetry"}
OF_OTHERS = {"jinja2", "uvloop"}  # transformers' chat templates and uvicorn take them, and ask for neither
LINKED = ("engine", "kernels", "server", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

needs_compiler = pytest.mark.skipif(
    unsupported() is not None or find_compiler() is None,
    reason="the CPU kernels need x86-64 Linux and a compiler",
)


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
    own = [*(ROOT / "sleb").glob("*.py")]
    folders = ("batch", "cli", "client", "doctor", "formats", "layer_map", "models", "pruning")
    own += (path for folder in folders for path in (ROOT / "sleb" / folder).rglob("*.py"))
    data = [ROOT / "sleb/py.typed", *(ROOT / "sleb/maps").glob("*.json")]
    data += (ROOT / "sleb/configs").glob("*/config.json")
    sources = {f"sleb/{path.relative_to(ROOT)}" for path in (ROOT / "kernels/cpu/src").glob("*.[ch]")}
    page = [path for path in (ROOT / "server/page").rglob("*") if path.is_file()]
    sources |= {f"sleb/{path.relative_to(ROOT)}" for path in page}
    return names | sources | {str(path.relative_to(ROOT)) for path in (*own, *data)}


def build(source: Path, kind: str, destination: Path, **variables: str) -> Path:
    """Calls the build backend as pip does, in a process of its own; returns the archive's path.

    The real kernels are not compiled, which takes long and tells nothing new, unless `variables` say otherwise.
    """
    destination.mkdir()
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(destination)!r})"
    environment = os.environ | {"SLEB_NO_COMPILE": "1"} | variables
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [archive] = destination.iterdir()
    return archive


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, so that nothing is built in the tree and no stale build is picked up."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")
    for name in ("sleb", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build(checkout, "wheel", checkout / "wheel")


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture
def small_checkout(checkout: Path, tmp_path: Path) -> Path:
    """A checkout whose kernels are a file of one line, with a library beside it that is not made from it."""
    copy = tmp_path / "small"
    shutil.copytree(
        checkout, copy, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info", "wheel")
    )
    for path in (copy / "kernels/cpu/src").glob("*.[ch]"):
        path.unlink()
    marker = 'const char sleb_source_marker[] = "SLEB_SOURCE_KEY=" SLEB_SOURCE_KEY;'
    (copy / "kernels/cpu/src/small.c").write_text(marker + "\n")
    (copy / "kernels/cpu/src" / LIBRARY_NAME).write_bytes(b"stale")
    return copy


def test_wheel_holds_the_package_through_the_links(wheel_files: set[str]) -> None:
    assert expected_files() <= wheel_files
    assert {"sleb/engine/llm.py", "sleb/kernels/reference/ops.py", "sleb/py.typed"} <= wheel_files
    assert "sleb/configs/llama-2-7b/config.json" in wheel_files


def test_wheel_has_one_top_level_name(wheel_files: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_files}
    assert tops == {"sleb", f"sleb-{_version()}.dist-info"}
    ours = (
        "batch",
        "cli",
        "client",
        "configs",
        "doctor",
        "formats",
        "layer_map",
        "maps",
        "models",
        "pruning",
        *LINKED,
    )
    folders = {name.split("/")[1] for name in wheel_files if name.count("/") > 1 and name.startswith("sleb/")}
    assert folders == set(ours)
    assert not [
        name for name in wheel_files if "benchmarks/results/" in name or "/tests/" in name or "test_" in name
    ]


def test_source_distribution_builds_the_same_wheel(
    checkout: Path, wheel_files: set[str], tmp_path: Path
) -> None:
    shutil.unpack_archive(build(checkout, "sdist", tmp_path / "sdist"), tmp_path)
    [unpacked] = tmp_path.glob("sleb-*")
    tops = {path.name for path in unpacked.iterdir()} - {"sleb.egg-info", "setup.cfg", "PKG-INFO"}
    assert tops == {
        *("sleb", "pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt"),
        *("README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md"),
    }
    with zipfile.ZipFile(build(unpacked, "wheel", tmp_path / "wheel")) as archive:
        assert set(archive.namelist()) == wheel_files


def test_wheel_without_the_library_is_for_every_system(wheel: Path, wheel_files: set[str]) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in wheel_files if name.endswith(".so")]


@needs_compiler
def test_wheel_with_the_library_is_for_this_system(small_checkout: Path, tmp_path: Path) -> None:
    wheel = build(small_checkout, "wheel", tmp_path / "wheel", SLEB_NO_COMPILE="")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"sleb", f"sleb-{_version()}.dist-info"}
        assert b"Root-Is-Purelib: false" in archive.read(f"sleb-{_version()}.dist-info/WHEEL")
        archive.extract(f"sleb/kernels/cpu/src/{LIBRARY_NAME}", tmp_path)
    assert has_key(
        tmp_path / "sleb/kernels/cpu/src" / LIBRARY_NAME, source_key(small_checkout / "kernels/cpu/src")
    )


def test_a_broken_compiler_does_not_fail_the_install(small_checkout: Path, tmp_path: Path) -> None:
    wheel = build(small_checkout, "wheel", tmp_path / "wheel", SLEB_NO_COMPILE="", CC="/nowhere/cc")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert f"sleb/kernels/cpu/src/{LIBRARY_NAME}" not in archive.namelist()


@needs_compiler
def test_editable_install_compiles_beside_the_sources(small_checkout: Path, tmp_path: Path) -> None:
    build(small_checkout, "editable", tmp_path / "wheel", SLEB_NO_COMPILE="")
    folder = small_checkout / "kernels/cpu/src"
    assert has_key(folder / LIBRARY_NAME, source_key(folder))


def test_an_installed_wheel_serves_from_its_own_files(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows the dependencies of this one but not its sleb."""
    python = make_environment(tmp_path / "venv")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*command, "--quiet", "--find-links", wheel.parent, "sleb"], check=True, timeout=120)
    folder = python.parent.parent / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    folder.joinpath("borrowed.pth").write_text(sysconfig.get_path("purelib"))

    def run(*words: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(str(python.with_name("sleb")), "--version") == f"sleb {_version()}\n"
    program = "import sleb; from sleb.models.resolve import shipped_map; print(sleb.__file__, shipped_map('smollm2'))"
    for name in run(str(python), "-c", program).split():
        assert Path(name).is_relative_to(folder)


@pytest.mark.slow
@needs_compiler
def test_pip_install_sleb_then_sleb_serve(tmp_path: Path) -> None:
    """What README says, from the wheel that scripts/build makes, with the versions of constraints.txt."""
    dist, environment = tmp_path / "dist", tmp_path / "venv"
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLEB_", "PYTHONPATH"))
    }
    built = subprocess.run(
        [sys.executable, ROOT / "scripts/build", "--output", dist], capture_output=True, text=True, env=plain
    )
    if "No matching distribution found for build" in built.stderr:
        pytest.skip("no package index answers")
    assert built.returncode == 0, built.stderr
    [wheel] = dist.glob("*.whl")
    assert re.search(r"-py3-none-manylinux_2_\d+_x86_64\.whl$", wheel.name)
    venv.create(environment, with_pip=True)
    pip = [environment / "bin/pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "--find-links", dist, "sleb"], check=True, env=plain, timeout=900)
    settings = {"SLEB_PORT": "0", "SLEB_CACHE": str(tmp_path / "cache"), "COLUMNS": "80"}
    with subprocess.Popen(
        [environment / "bin/sleb", "serve"],
        stderr=subprocess.PIPE,
        text=True,
        env=plain | settings,
        cwd=tmp_path,
    ) as server:
        try:
            said = ""
            for line in server.stderr or ():
                said += line
                if found := re.search(r"Serving at (http://\S+)/v1", line):
                    break
            else:
                pytest.fail(said)
            assert "compiling" not in said and "C kernels" in said
            models = httpx.get(f"{found[1]}/v1/models").json()["data"]
            assert {model["id"] for model in models} >= {"smollm2:sleb-3", "smollm2:sleb-6"}
            body = {
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "temperature": 0,
            }
            answer = httpx.post(f"{found[1]}/v1/chat/completions", json=body | {"max_tokens": 32}, timeout=60)
            assert "Paris" in answer.json()["choices"][0]["message"]["content"]
            assert "<!doctype html>" in httpx.get(found[1]).text.lower()
            server.terminate()
            assert server.wait(30) == 0
        finally:
            server.kill()


def make_environment(folder: Path) -> Path:
    """An environment without a package; its Python."""
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def _version() -> str:
    source = (ROOT / "sleb/version.py").read_text("utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert found is not None
    return found[1]


def test_every_import_is_a_declared_dependency() -> None:
    """A package that merely comes along with another one may stop doing so."""
    names = {requirement.name for requirement in direct_requirements()}
    declared = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}
    for name in ("sleb", *LINKED):
        for parent, _, files in os.walk(ROOT / name):
            for path in (Path(parent, file) for file in files if file.endswith(".py")):
                unknown = _third_parties(path) - declared
                assert not unknown, f"{path}: add {', '.join(unknown)} to pyproject.toml and run scripts/pin"


def test_every_dependency_is_imported() -> None:
    used = {
        name
        for folder in ("sleb", *LINKED)
        for path in (ROOT / folder).resolve().rglob("*.py")
        for name in _third_parties(path)
    }
    for requirement in map(Requirement, PROJECT["dependencies"]):
        name = IMPORTED_AS.get(requirement.name, requirement.name.replace("-", "_"))
        assert name in used | OF_OTHERS, f"nothing imports {requirement.name}"


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
