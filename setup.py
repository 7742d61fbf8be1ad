"""Compiles the C kernels when sleb is installed or built; everything else is in pyproject.toml.

Without a compiler, on another system, or with SLEB_NO_COMPILE=1 the install goes on without the library: sleb
compiles it on first use if it can, and does without it if not.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

FOLDER = Path("sleb", "kernels", "cpu", "src")  # in the source tree and in the wheel


def load_builder() -> ModuleType:
    """kernels/cpu/build.py by its path: sleb itself cannot be imported before its dependencies are there."""
    spec = importlib.util.spec_from_file_location("sleb_cpu_build", FOLDER.parent / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(Command):
    """The step of `build` that puts the library into the wheel, or beside the sources of an editable install."""

    description = "compile the C kernels"
    user_options = ()
    editable_mode = False  # set by setuptools

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.library: Path | None = None  # what run() compiled

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        builder = load_builder()
        output = self._output(builder.LIBRARY_NAME)
        if not self.editable_mode:
            output.unlink(missing_ok=True)  # left by an earlier build
        reason = builder.unsupported()
        if reason is None and builder.compiling_is_off():
            reason = "SLEB_NO_COMPILE is set"
        if reason is None:
            try:
                builder.compile_library(output)
                self.library = output
            except (builder.CompileError, OSError) as error:
                reason = str(error)
        if reason is not None:
            self.warn(f"going on without compiled CPU kernels: {reason}")

    def _output(self, name: str) -> Path:
        assert self.build_lib is not None
        return (FOLDER.resolve() if self.editable_mode else Path(self.build_lib, FOLDER)) / name

    def get_source_files(self) -> list[str]:
        return sorted(str(path) for pattern in ("*.c", "*.h") for path in FOLDER.glob(pattern))

    def get_outputs(self) -> list[str]:
        return [] if self.library is None or self.editable_mode else [str(self.library)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """py3-none-PLATFORM with the library inside, which depends on the system and on no version of Python."""

    def run(self) -> None:
        self.run_command("build")  # first, to know whether there is a library; bdist_wheel then finds it done
        if self.get_finalized_command("build_kernels").library is not None:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # `install` chooses its folder by it
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else (self.python_tag, "none", platform)


build.sub_commands = [*build.sub_commands, ("build_kernels", None)]
setup(cmdclass={"build_kernels": BuildKernels, "bdist_wheel": PlatformWheel})
