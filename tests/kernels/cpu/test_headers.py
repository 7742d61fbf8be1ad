"""The C sources: every header stands alone, none includes itself on any way, and nothing compiles with a warning."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from sleb.kernels.cpu import build

HEADERS = sorted(path.name for path in build.source_files() if path.suffix == ".h")
LEVELS = sorted(build.SOURCES.glob("isa_*.c"))

needs_compiler = pytest.mark.skipif(
    build.unsupported() is not None or build.find_compiler() is None,
    reason="the CPU kernels are for x86-64 Linux with a C compiler",
)


def compile_c(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*(build.find_compiler() or []), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_compiler
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.stem)
def test_a_header_stands_alone(header: str, level: Path, tmp_path: Path) -> None:
    """With what a level defines, for the level's processor, and twice, as a guard allows."""
    defines = "".join(re.findall(r"^#define .*\n", level.read_text(), re.MULTILINE))
    target = re.search(r'SLEB_TARGET "(.*)"', defines)
    assert target is not None
    probe = tmp_path / "probe.c"
    probe.write_text(f'{defines}#include "{header}"\n#include "{header}"\n')
    flags = [f"-m{name}" for name in target[1].split(",")]
    done = compile_c("-fsyntax-only", "-std=gnu11", *flags, "-I", build.SOURCES, "-x", "c", probe)
    assert done.returncode == 0, done.stderr[:2000]


@needs_compiler
@pytest.mark.parametrize(
    "source", [path for path in build.source_files() if path.suffix == ".c"], ids=lambda p: p.name
)
def test_no_warnings(source: Path) -> None:
    flags = [*build.COMPILE_FLAGS, "-Wall", "-Wextra", "-Werror", '-DSLEB_SOURCE_KEY="x"']
    done = compile_c(*flags, "-O1", "-c", source, "-o", "/dev/null")
    assert done.returncode == 0, done.stderr[:2000]


def included(folder: Path) -> dict[str, list[str]]:
    """For each C file of the folder, the files that it includes by name."""
    includes = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
    return {
        path.name: includes.findall(path.read_text(encoding="utf-8")) for path in build.source_files(folder)
    }


def circle(graph: dict[str, list[str]], at: str, path: Iterable[str] = ()) -> list[str]:
    """A way from `at` back to a file on the way, or nothing."""
    path = [*path, at]
    if at in path[:-1]:
        return path
    return next((found for each in graph.get(at, ()) if (found := circle(graph, each, path))), [])


def test_no_header_includes_itself_on_any_way() -> None:
    graph = included(build.SOURCES)
    assert {name for names in graph.values() for name in names} <= graph.keys()
    assert len(graph) > 15
    for name in graph:
        assert not circle(graph, name), " → ".join(circle(graph, name))


def test_a_circle_is_found(tmp_path: Path) -> None:
    for name, text in (
        ("a.c", '#include "b.h"\n'),
        ("b.h", '# include "c.h"\n'),
        ("c.h", '#include "b.h"\n'),
    ):
        (tmp_path / name).write_text(text)
    assert circle(included(tmp_path), "a.c") == ["a.c", "b.h", "c.h", "b.h"]


def test_only_the_header_exports() -> None:
    """So that Python sees every function; the marker is for the eyes of build.py alone."""
    lines = [
        line
        for path in build.source_files()
        if path.name != "sleb_cpu.h"
        for line in path.read_text().split("\n")
    ]
    assert [line.partition("=")[0] for line in lines if "SLEB_EXPORT" in line] == [
        "SLEB_EXPORT const char sleb_source_marker[] "
    ]
