"""Quantised matrices kept on the disk, so that a checkpoint is quantised once.

A file holds one checkpoint tensor in one format, and says in its header what it was made from. A file that does not
fit, of another version, of a checkpoint that has changed (`sleb.files.file_state`), cut short or damaged, counts as
absent and is written anew. Files are safetensors, never pickles, and appear whole: they are renamed into place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleb.files import cache_dir, file_state, make_folder, replacement
from sleb.kernels.quantization import VERSION, Made

logger = logging.getLogger("sleb.engine")

_SECONDS_TO_WRITE = 3600.0  # no file takes that long: an older unfinished one has nobody who writes it


class WeightCache:
    """Quantised tensors of the checkpoint folder `path`, whose files are `shards`, under the cache folder (SLEB_CACHE).

    What the files hold is told once, before a tensor of them is read: a later change is seen at the next start.
    """

    def __init__(self, path: Path, shards: Iterable[Path]) -> None:
        place = os.path.realpath(path)
        digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
        slug = re.sub(r"[^\w.-]+", "-", Path(place).name).strip(".-")[:80] or "model"
        self._folder = cache_dir() / "quantized" / f"{slug}-{digest}"
        self._states = {shard: file_state(shard) for shard in shards}
        self._writable = True
        self._sweep()

    def load(self, name: str, shard: Path, target: Made) -> bool:
        """Fills `target` with tensor `name`, quantised earlier from the file `shard`. False: it has to be made."""
        file = self._file(name, target)
        try:
            with safe_open(file, framework="pt") as handle:
                metadata = handle.metadata() or {}
                stored = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
                wanted = tensors_of(target)
                if metadata != self._metadata(name, shard, stored) or not _fits(stored, wanted):
                    return False
                for key, tensor in wanted.items():
                    tensor.copy_(stored[key])
        except (SafetensorError, OSError, ValueError):
            return False
        return True

    def store(self, name: str, shard: Path, weight: Made) -> None:
        """Keeps `weight`, made of tensor `name` of `shard`. A disk that refuses costs a warning, the first time."""
        if not self._writable:
            return
        file = self._file(name, weight)
        # Copies: the tensors may be rows of a larger matrix, or on another device.
        tensors = {key: tensor.cpu().clone() for key, tensor in tensors_of(weight).items()}
        try:
            make_folder(file.parent)
            with replacement(file, durable=False) as temporary:  # a checksum guards what is read
                save_file(tensors, temporary, self._metadata(name, shard, tensors))
        except (SafetensorError, OSError) as error:
            if self._writable:
                self._writable = False
                logger.warning(
                    "quantised weights cannot be kept in %s (%s), so the next start quantises again; "
                    "point SLEB_CACHE at a folder with room",
                    self._folder,
                    error,
                )

    def _sweep(self) -> None:
        """Removes what killed processes left half written."""
        for leftover in self._folder.glob("*/.*.tmp"):
            try:
                if time.time() - leftover.stat().st_mtime > _SECONDS_TO_WRITE:
                    leftover.unlink()
            except OSError:  # another process was quicker, or the folder is not ours
                continue

    def _metadata(self, name: str, shard: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """What a file says of its origin and contents: all of it must agree for the file to be used."""
        checksum = 0
        for key in sorted(tensors):
            array: Any = tensors[key].numpy()
            checksum = zlib.crc32(array, checksum)
        return {
            "version": str(VERSION),
            "tensor": name,
            "source": os.path.realpath(shard),
            "state": self._states[shard],
            "crc32": str(checksum),
        }

    def _file(self, name: str, weight: Made) -> Path:
        return self._folder / weight.kind / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}.safetensors"


def tensors_of(weight: Made) -> dict[str, Tensor]:
    """The tensors of a quantised weight by the name of their field."""
    return {key: value for key, value in vars(weight).items() if isinstance(value, Tensor)}


def _fits(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return {key: (each.shape, each.dtype) for key, each in stored.items()} == {
        key: (each.shape, each.dtype) for key, each in wanted.items()
    }
