"""Compiling the C kernels and finding the library: keys, cache, refusals. Sources of a line stand for the real ones."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sleb.files import cache_dir, make_folder
from sleb.kernels.cpu import build
from sleb.kernels.cpu.build import CompileError, compile_library, find_library, source_key, why_unavailable

HEADER = '#define EXPORT __attribute__((visibility("default")))\n'
MARKER = """\
#include "tiny.h"
EXPORT const char sleb_source_marker[] = "SLEB_SOURCE_KEY=" SLEB_SOURCE_KEY;
EXPORT const char *sleb_source_key(void) { return SLEB_SOURCE_KEY; }
"""
ANSWER = '#include "tiny.h"\n#include <math.h>\nEXPORT double answer(double x) { return floor(x); }\n'

needs_compiler = pytest.mark.skipif(
    build.unsupported() is not None or build.find_compiler() is None,
    reason="the CPU kernels are for x86-64 Linux with a C compiler",
)


def compilers_here() -> list[str]:
    """cc, gcc and clang, as far as they are installed and not another name of an earlier one."""
    found = {os.path.realpath(path): name for name in build.COMPILERS if (path := shutil.which(name))}
    return sorted(found.values())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a cache of its own and is on a system that the kernels are for."""
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SLEB_NO_COMPILE", raising=False)
    monkeypatch.setattr(build, "unsupported", lambda: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A source folder of two C files and a header."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for name, text in (("tiny.h", HEADER), ("marker.c", MARKER), ("answer.c", ANSWER)):
        (sources / name).write_text(text)
    return sources


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def loaded_key(library: Path) -> str:
    function = ctypes.CDLL(str(library)).sleb_source_key
    function.restype = ctypes.c_char_p
    key: bytes = function()
    return key.decode()


def test_the_key_covers_names_contents_and_flags(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [source_key(folder)]
    assert re.fullmatch("[0-9a-f]{16}", keys[0])
    assert source_key(folder) == keys[0]
    (folder / "notes.txt").write_text("not a source")
    assert source_key(folder) == keys[0]
    (folder / "tiny.h").write_text(HEADER + "\n")
    keys.append(source_key(folder))
    (folder / "answer.c").rename(folder / "reply.c")
    keys.append(source_key(folder))
    (folder / "empty.h").touch()
    keys.append(source_key(folder))
    monkeypatch.setattr(build, "COMPILE_FLAGS", (*build.COMPILE_FLAGS, "-g"))
    keys.append(source_key(folder))
    assert len(set(keys)) == len(keys)


@needs_compiler
def test_a_library_knows_its_sources(folder: Path, tmp_path: Path) -> None:
    library = tmp_path / "new" / build.LIBRARY_NAME
    compile_library(library, folder=folder)
    assert loaded_key(library) == source_key(folder)
    assert build.has_key(library, source_key(folder))
    assert not build.has_key(library, source_key(folder)[:-1])
    answer = ctypes.CDLL(str(library)).answer
    answer.restype, answer.argtypes = ctypes.c_double, [ctypes.c_double]
    assert answer(42.5) == 42.0
    assert os.listdir(library.parent) == [library.name]


@needs_compiler
def test_the_installed_library_comes_first(folder: Path, tmp_path: Path) -> None:
    installed = folder / build.LIBRARY_NAME
    compile_library(installed, folder=folder)
    assert find_library(pytest.fail, folder) == installed
    assert why_unavailable() is None
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_a_stale_library_is_not_taken(folder: Path, tmp_path: Path) -> None:
    installed = folder / build.LIBRARY_NAME
    compile_library(installed, folder=folder)
    (folder / "answer.c").write_text(ANSWER.replace("floor", "ceil"))
    found = find_library(lambda _: None, folder)
    assert found == tmp_path / "cache" / f"libsleb_cpu-{source_key(folder)}.so"
    assert loaded_key(found) == source_key(folder) != loaded_key(installed)


@needs_compiler
def test_it_compiles_once_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = " ".join(build.find_compiler() or [])
    monkeypatch.setenv("CC", script(tmp_path / "counted", f'echo >>"$0.log"; exec {compiler} "$@"'))
    told: list[str] = []
    found = find_library(told.append, folder)
    assert told == ["compiling the CPU kernels (once)…"]
    assert len((tmp_path / "counted.log").read_text()) == 3  # two files and the link
    assert find_library(told.append, folder) == found
    assert len(told) == 1
    assert found is not None
    found.write_bytes(found.read_bytes()[:100])  # a damaged one is made anew
    with caplog.at_level(logging.WARNING):
        assert find_library(folder=folder) == found
    assert caplog.messages == told
    assert loaded_key(found) == source_key(folder)


@needs_compiler
def test_processes_at_once_never_see_half_a_library(folder: Path, tmp_path: Path) -> None:
    library = tmp_path / "shared" / build.LIBRARY_NAME
    library.parent.mkdir()
    program = (
        "import sys; from pathlib import Path; from sleb.kernels.cpu.build import compile_library\n"
        f"compile_library(Path({str(library)!r}), folder=Path({str(folder)!r}))"
    )
    finished = threading.Event()
    seen: list[bool] = []

    def watch() -> None:
        while not finished.wait(0.0005):
            if library.exists():
                seen.append(build.has_key(library, source_key(folder)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    builders = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    statuses = [each.wait(60) for each in builders]
    finished.set()
    watcher.join()
    assert statuses == [0, 0, 0]
    assert all(seen)
    assert os.listdir(library.parent) == [library.name]


def test_no_compiler(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert find_library(pytest.fail, folder) is None
    reason = why_unavailable()
    assert reason is not None
    assert reason.startswith("no C compiler (cc, gcc, clang)")
    assert "apt install gcc" in reason


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
def test_a_broken_compiler(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "i=0; while [ $i -lt 50 ]; do i=$((i + 1)); echo line-$i; done >&2; exit 1"
    monkeypatch.setenv("CC", f"{script(tmp_path / 'broken', lines)} -m64")
    assert find_library(lambda _: None, folder) is None
    first, *rest = (why_unavailable() or "").splitlines()
    assert first.startswith(f"compiling the CPU kernels failed: {tmp_path}/broken -m64 -O3 -std=gnu11 -fPIC")
    assert rest == [f"line-{number}" for number in range(31, 51)]
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/nowhere/cc", r"/nowhere/cc: No such file"),
        ("gcc '", r"CC is not a command \(No closing quotation\)"),
    ],
)
def test_a_compiler_that_is_none(
    command: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", command)
    assert find_library(lambda _: None, folder) is None
    assert re.search(message, why_unavailable() or "")


@needs_compiler
def test_an_error_in_the_sources_leaves_the_old_library(folder: Path) -> None:
    installed = folder / build.LIBRARY_NAME
    compile_library(installed, folder=folder)
    before = installed.read_bytes()
    (folder / "answer.c").write_text("#error not today\n")
    with pytest.raises(CompileError, match="not today"):
        compile_library(installed, folder=folder)
    assert installed.read_bytes() == before
    assert len(os.listdir(folder)) == 4


def test_compiling_can_be_forbidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEB_NO_COMPILE", "1")
    assert find_library(pytest.fail, folder) is None
    assert "SLEB_NO_COMPILE" in (why_unavailable() or "")


def test_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    assert find_library(lambda _: None, tmp_path) is None
    assert "the installation is incomplete" in (why_unavailable() or "")


def test_a_cache_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CC", "cc")
    assert find_library(lambda _: None, folder) is None
    assert "point SLEB_CACHE at another place" in (why_unavailable() or "")


def spoil_owner(place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gives `place` to another user; where that takes rights that we lack, os.stat says so."""
    if os.geteuid() == 0:
        os.chown(place, 12345, 12345)
    else:
        number = os.geteuid() + 1
        own = place.stat()
        stat = Path.stat

        def spoiled(path: Path, **options: bool) -> os.stat_result:
            facts = stat(path, **options)
            fields = list(facts)
            fields[4] = number if os.path.samestat(facts, own) else facts.st_uid
            return os.stat_result(fields)

        monkeypatch.setattr(Path, "stat", spoiled)
    return "belongs to another user"


def spoil_group(place: Path, _: pytest.MonkeyPatch) -> str:
    place.chmod(0o775 if place.is_dir() else 0o664)
    return f"other users can write .*run `chmod go-w {place}`"


def spoil_others(place: Path, _: pytest.MonkeyPatch) -> str:
    place.chmod(0o1777 if place.is_dir() else 0o646)
    return f"other users can write .*run `chmod go-w {place}`"


@needs_compiler
@pytest.mark.parametrize("spoil", [spoil_owner, spoil_group, spoil_others])
@pytest.mark.parametrize("what", ["library", "folder", "empty folder"])
def test_a_library_that_another_user_may_have_put_there_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, spoil: Callable[[Path, pytest.MonkeyPatch], str]
) -> None:
    build._private_folder.cache_clear()
    planted = cache_dir() / f"libsleb_cpu-{source_key(folder)}.so"
    make_folder(planted.parent)
    compile_library(planted, folder=folder)
    if what == "empty folder":
        planted.unlink()
    wanted = spoil(planted if what == "library" else planted.parent, monkeypatch)
    told: list[str] = []
    found = find_library(told.append, folder)
    assert found is not None and cache_dir() not in found.parents
    assert found.parent.stat().st_mode & 0o777 == 0o700
    assert loaded_key(found) == source_key(folder)
    [line] = told
    assert line.startswith(f"{planted} is not used: ")
    assert re.search(wanted, line)
    assert line.endswith("; compiling the CPU kernels (for this run alone)…")
    assert find_library(pytest.fail, folder) == found  # once a run
    build._private_folder.cache_clear()
    monkeypatch.setenv("SLEB_NO_COMPILE", "1")
    assert find_library(pytest.fail, folder) is None
    assert re.search(wanted, why_unavailable() or "")


@needs_compiler
def test_a_cache_of_ours_is_for_us_to_write_whatever_the_umask(folder: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_folder(cache_dir() / "quantized")
        found = find_library(lambda _: None, folder)
    finally:
        os.umask(before)
    assert found is not None and found.parent == cache_dir()
    assert find_library(pytest.fail, folder) == found


@needs_compiler
def test_a_cache_behind_a_link_is_looked_at_where_it_lies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "other")
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "link"))
    found = find_library(lambda _: None, folder)
    assert find_library(pytest.fail, folder) == found == cache_dir() / (found or Path()).name
    (tmp_path / "other").chmod(0o777)
    again = find_library(lambda _: None, folder)
    assert again is not None and again != found


def test_other_systems_do_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert find_library(pytest.fail, folder) is None
    assert "64-bit Linux on x86-64" in (why_unavailable() or "")


@needs_compiler
@pytest.mark.parametrize("compiler", compilers_here())
def test_the_kernels_compile(compiler: str, tmp_path: Path) -> None:
    """The real ones, by every compiler that is here; the library has the key in its bytes and by its function."""
    library = tmp_path / build.LIBRARY_NAME
    compile_library(library, [compiler])
    assert build.has_key(library, source_key())
    assert loaded_key(library) == source_key()


@needs_compiler
def test_the_library_asks_for_no_newer_glibc_than_torch_does() -> None:
    library = build.find_library()
    assert library is not None
    versions = {tuple(map(int, each)) for each in re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())}
    assert versions and max(versions) <= (2, 28)
