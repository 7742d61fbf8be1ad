"""Compiles the C kernels in src/, and finds the library that fits them.

An install compiles them once, where there is a compiler; it never fails for want of one. Plain calls of the system's
compiler, not torch.utils.cpp_extension and not a Python extension: no torch at build time, no C++, and one library for
every version of Python (the wheel is py3-none-linux_x86_64). The library carries a key of the sources that it was made
from, so that a stale one is never loaded: the next run then compiles into the cache folder instead. Nothing but the
standard library is imported, because setup.py loads this file by its path.

    python -m sleb.kernels.cpu.build    compiles beside the sources and prints the library's path
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
LIBRARY_NAME = "libsleb_cpu.so"
# No -march: each C file chooses its instruction sets by pragmas, so one library runs on every x86-64 processor.
COMPILE_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"),
)
LINK_FLAGS = ("-shared", "-pthread")
LIBRARIES = ("-lm",)
COMPILERS = ("cc", "gcc", "clang")
NUM_ERROR_LINES = 20

logger = logging.getLogger("sleb.kernels")
_why: str | None = None  # why the last find_library() returned None


class CompileError(RuntimeError):
    """The C kernels could not be compiled; the message has the command and the end of the compiler's output."""


def source_files(folder: Path = SOURCES) -> tuple[Path, ...]:
    """The C sources and headers of `folder`, in the order in which the key takes them."""
    return tuple(sorted(path for pattern in ("*.c", "*.h") for path in folder.glob(pattern)))


def source_key(folder: Path = SOURCES) -> str:
    """16 hexadecimal digits that change with the sources' names and contents and with the compile flags."""
    digest = hashlib.sha256(repr((COMPILE_FLAGS, LINK_FLAGS, LIBRARIES)).encode())
    for path in source_files(folder):
        content = path.read_bytes()
        digest.update(f"\n{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def has_key(library: Path, key: str) -> bool:
    """Whether `library` was made from the sources of that key; the file is read, not loaded."""
    try:
        return f"SLEB_SOURCE_KEY={key}\0".encode() in library.read_bytes()
    except OSError:
        return False


def find_compiler() -> list[str] | None:
    """The command of $CC, else the first of cc, gcc and clang on the path; None if there is none."""
    chosen = os.environ.get("CC", "")
    try:
        if words := shlex.split(chosen):
            return words
    except ValueError as error:
        raise CompileError(f"the environment variable CC is not a command ({error}): {chosen}") from error
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def compile_library(output: Path, compiler: list[str] | None = None, folder: Path = SOURCES) -> None:
    """Compiles the C files of `folder` to `output`, which appears whole or not at all.

    Several processes may do so at once: the last one to finish wins. Raises CompileError, and OSError when the
    folder of `output` cannot be written.
    """
    command = compiler or find_compiler()
    sources = [path for path in source_files(folder) if path.suffix == ".c"]
    if command is None:
        raise CompileError(_no_compiler())
    if not sources:
        raise CompileError(f"no C sources in {folder}: the installation is incomplete")
    define = f'-DSLEB_SOURCE_KEY="{source_key(folder)}"'
    output.parent.mkdir(parents=True, exist_ok=True)
    with _replacement(output) as library, tempfile.TemporaryDirectory(prefix="sleb-build-") as scratch:
        objects = [Path(scratch, f"{path.stem}.o") for path in sources]
        with ThreadPoolExecutor(max_workers=_num_cpus()) as pool:  # each thread waits for a compiler
            compiled = [
                pool.submit(_run, [*command, *COMPILE_FLAGS, define, "-c", str(source), "-o", str(target)])
                for source, target in zip(sources, objects, strict=True)
            ]
        for each in compiled:
            each.result()
        _run([*command, *LINK_FLAGS, *map(str, objects), *LIBRARIES, "-o", str(library)])


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _run(command: list[str]) -> None:
    """Runs one compiler command; raises CompileError if it cannot be run or fails."""
    shown = f"compiling the CPU kernels failed: {shlex.join(command)}"
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    except OSError as error:
        raise CompileError(f"{shown}\n{command[0]}: {error.strerror or error}") from error
    if done.returncode:
        lines = done.stdout.decode(errors="replace").splitlines()[-NUM_ERROR_LINES:]
        ending = lines or [f"exit status {done.returncode}, no output"]
        raise CompileError("\n".join([shown, *ending]))


@contextmanager
def _replacement(output: Path) -> Iterator[Path]:
    """A file beside `output` that is renamed to it at the end, so that readers see the old one or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{output.stem}-", suffix=output.suffix, dir=output.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o755)
        os.replace(name, output)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def unsupported() -> str | None:
    """Why the kernels are not for this system, or None if they are; whether its processor can run them is for the
    library to say.
    """
    machine = platform.machine()
    if sys.platform == "linux" and machine in ("x86_64", "AMD64") and sys.maxsize > 2**32:
        return None
    return f"the CPU kernels are for 64-bit Linux on x86-64, and this is {platform.system()} on {machine}"


def find_library(tell: Callable[[str], None] | None = None, folder: Path = SOURCES) -> Path | None:
    """The library made from the sources in `folder`: the installed one, the cached one, or one compiled now.

    `tell` gets one line before compiling, which takes seconds; the default logs it as a warning, since that is
    what a command shows that has set up no logging. SLEB_NO_COMPILE=1 forbids compiling. After None,
    why_unavailable() has the reason.
    """
    global _why
    try:
        library, _why = _find(tell or logger.warning, folder), None
    except (CompileError, OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        library, _why = None, str(error)
    return library


def why_unavailable() -> str | None:
    """Why the last find_library() returned None, and the remedy; None if it found one."""
    return _why


def _find(tell: Callable[[str], None], folder: Path) -> Path:
    if reason := unsupported():
        raise CompileError(reason)
    # Here, since setup.py calls compile_library before sleb can be imported.
    from sleb.files import cache_dir, make_folder

    key = source_key(folder)
    library = cache_dir() / f"{Path(LIBRARY_NAME).stem}-{key}.so"
    if has_key(folder / LIBRARY_NAME, key):
        return folder / LIBRARY_NAME
    # A library runs as whoever loads it: one that somebody else can have put there is not loaded, nor one made there.
    if refusal := _refusal(library):
        library = _private_folder(key) / LIBRARY_NAME
    if has_key(library, key):
        return library
    if compiling_is_off():
        raise CompileError(
            f"{refusal}the CPU kernels are not compiled, and SLEB_NO_COMPILE forbids it: unset it"
        )
    if find_compiler() is None:
        raise CompileError(f"{refusal}{_no_compiler()}")
    tell(f"{refusal}compiling the CPU kernels ({'for this run alone' if refusal else 'once'})…")
    try:
        make_folder(library.parent)
        compile_library(library, folder=folder)
    except OSError as error:
        raise CompileError(
            f"cannot write the CPU kernels to {library} ({error}): point SLEB_CACHE at another place"
        ) from error
    return library


def _refusal(library: Path) -> str:
    """What goes before a message where `library`, or the folder that it would be made in, is not to be trusted."""
    from sleb.files import untrusted

    try:
        found = library if library.exists() else library.parent
        reason = untrusted(found, library.parent) if found.exists() else None
    except OSError as error:
        reason = f"{error.strerror}: point SLEB_CACHE elsewhere"
    return f"{library} is not used: {reason}; " if reason else ""


@cache
def _private_folder(key: str) -> Path:
    """A folder for this process alone, for the library of that key; it goes with it."""
    folder = tempfile.TemporaryDirectory(prefix="sleb-kernels-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def compiling_is_off() -> bool:
    return os.environ.get("SLEB_NO_COMPILE", "") not in ("", "0")


def _no_compiler() -> str:
    return (
        f"no C compiler ({', '.join(COMPILERS)}) for the CPU kernels: install one (Debian and Ubuntu: "
        "sudo apt install gcc), or name yours in the environment variable CC"
    )


def main() -> int:
    """Compiles beside the sources; prints the library's path, or the error."""
    output = SOURCES / LIBRARY_NAME
    try:
        if reason := unsupported():
            raise CompileError(reason)
        compile_library(output)
    except (CompileError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{output}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
