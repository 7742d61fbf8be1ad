"""The safetensors files of a model's folder: which of them are the model's, and the tensors that their headers name.

A folder may hold more than one model's files: other layouts of the same weights, adapters, the state of a training.
Those that transformers takes are taken (`_get_resolved_checkpoint_files`); where it gives up, the only ones left.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sleb.errors import ModelError
from sleb.fields import read_json, shown, shown_path, shown_text

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What lies beside weights and is none of the model's: Mistral's own layout, adapters, the state of a training.
NOT_WEIGHTS = tuple(
    f"{word}*.safetensors" for word in ("consolidated", "adapter", "training", "optimizer", "scheduler")
)
_NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header has it: `dtype` in safetensors' words, such as BF16; `name`: that in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def parts_of(self, name: str) -> dict[str, StoredTensor]:
        """What the files hold of it, if it is to be called `name`, by their names."""
        return {name: self}

    def read(self) -> Tensor:
        """Its values. Raises ModelError."""
        with opened(self.file) as handle:
            values: Tensor = handle.get_tensor(self.name)
            return values


@dataclass(frozen=True)
class WeightFiles:
    """The files of a model's weights. `index`: which of them holds each tensor, if an index says so."""

    paths: tuple[Path, ...]
    index: Mapping[str, Path]


def weight_files(folder: Path) -> WeightFiles:
    """The files that hold the weights of the model in `folder`: model.safetensors, else those of the index, else the
    only file, or set of numbered files, that there is.

    Raises ModelError, which says what is there, where there are none or several; never opens a pickle.
    """
    if os.path.lexists(folder / SINGLE):
        return WeightFiles((folder / SINGLE,), {})
    if os.path.lexists(folder / INDEX):
        index = read_index(folder / INDEX)
        paths = tuple(sorted(set(index.values())))
        for path in paths:
            if not os.path.lexists(path):
                raise ModelError(f"{shown_path(path)} is missing: {INDEX} names it")
        return WeightFiles(paths, index)
    others = {file for pattern in NOT_WEIGHTS for file in folder.glob(pattern)}
    found = sorted(set(folder.glob("*.safetensors")) - others)
    numbered = [_NUMBERED.fullmatch(file.name) for file in found]
    whole = len({match and match.groups() for match in numbered}) == 1 and all(
        match and int(match[2]) == len(found) for match in numbered
    )
    if len(found) == 1 or whole:
        return WeightFiles(tuple(found), {})
    raise ModelError(_nothing_to_take(folder, [file.name for file in found or sorted(others)], bool(found)))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the model in `folder` by name; reads headers only.

    Raises ModelError as `weight_files`, and for a file that cannot be read, one that is not as the index says, or a
    name that two files hold.
    """
    files = weight_files(folder)
    found: dict[str, StoredTensor] = {}
    for path in files.paths:
        for tensor in _header(path):
            if tensor.name in found:
                raise ModelError(
                    f"{shown_path(folder)} holds {shown(tensor.name)} twice, in {found[tensor.name].file.name} and in "
                    f"{path.name}; leave only the files of one model in the folder"
                )
            found[tensor.name] = tensor
    for name, path in files.index.items():
        # One that no file holds is missing only where the model needs it: a tied head may be in the index alone.
        if name in found and found[name].file != path:
            raise ModelError(
                f"{shown_path(path)} does not hold {shown(name)}, as {INDEX} says; {found[name].file.name} does: "
                "index and files are not of one checkpoint"
            )
    return found


def read_index(file: Path) -> dict[str, Path]:
    """Which file beside the index `file` holds each tensor. Raises ModelError, also for a file outside the folder."""
    try:
        weight_map = read_json(file).object("weight_map").values
    except FileNotFoundError:
        raise ModelError(f"{shown_path(file)} is a link to a file that is not there") from None
    for tensor, name in weight_map.items():
        if not _is_file_name(name):
            raise ModelError(
                f"{shown_path(file)}: weight_map gives {shown(name)} as the file of {shown(tensor)}; it must be a file "
                "name, of nothing outside the folder"
            )
    if not weight_map:
        raise ModelError(f"{shown_path(file)}: weight_map is empty; it must name a file for every tensor")
    return {tensor: file.with_name(name) for tensor, name in weight_map.items()}


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The safetensors file, opened. Raises ModelError if it, or what is read while it is open, is not readable."""
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would be waited for
            raise ModelError(f"{shown_path(file)} is no regular file; it must be one")
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ModelError(
            f"{shown_path(file)} is not a readable safetensors file ({shown_text(str(error)[:200])}): compare its "
            f"size, {facts.st_size} bytes, and hash with the original's, and copy it again if they differ"
        ) from None
    except OSError as error:
        raise ModelError(
            f"{shown_path(file)} cannot be read: {error.strerror or shown_text(str(error)[:200])}"
        ) from None


def _header(file: Path) -> list[StoredTensor]:
    with opened(file) as handle:
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return [
            StoredTensor(name, file, part.get_dtype(), tuple(part.get_shape()))
            for name, part in parts.items()
        ]


def _is_file_name(name: object) -> bool:
    if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= 255
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _nothing_to_take(folder: Path, names: list[str], several: bool) -> str:
    place, listed = shown_path(folder), ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    if several:
        return (
            f"{place} holds {len(names)} .safetensors files, {listed}, and neither {SINGLE} nor an index, so which are "
            f"the model's is not known: name its file {SINGLE}, or add its {INDEX}"
        )
    if names:
        return f"{place} holds no weights in transformers' layout ({SINGLE}, or {INDEX}), only {listed}"
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}"))
    if pickles:
        return (
            f"{place} holds pickled weights ({pickles[0]}), which can run code when they are read; "
            "convert them to safetensors (transformers: model.save_pretrained(folder))"
        )
    return f"{place} holds no .safetensors file: copy the model's weights to it"
