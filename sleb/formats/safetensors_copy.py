"""Checkpoints written from other checkpoints' bytes: none of their tensors is decoded or ever whole in memory."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from sleb.errors import ModelError
from sleb.models.weight_files import StoredTensor

Progress = Callable[[int, int], None]

SHARD_BYTES = 5_000_000_000
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class LocatedTensor:
    """A tensor and where its bytes lie; `start` counts from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int
    zero: bool = False  # zeros in its place: in every dtype of safetensors those are zero bytes
    data: bytes | None = None  # these in its place


def locate(tensors: Mapping[str, StoredTensor]) -> list[LocatedTensor]:
    """Where the bytes of tensors of a checked checkpoint lie, in the order of the files, under the names given."""
    names = {
        (part.file, part.name): ours
        for name, tensor in tensors.items()
        for ours, part in tensor.parts_of(name).items()
    }
    found = [tensor for file in sorted({file for file, _ in names}) for tensor in _in_file(file)]
    return [
        replace(tensor, name=names[tensor.file, tensor.name])
        for tensor in found
        if (tensor.file, tensor.name) in names
    ]


def _in_file(file: Path) -> list[LocatedTensor]:
    """From the header (huggingface.co/docs/safetensors): its length in 8 bytes, then JSON, then the data."""
    try:
        with file.open("rb") as handle:
            [length] = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file} changed while it was read ({error}); try again") from None
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        start = 8 + length + first
        tensors.append(LocatedTensor(name, entry["dtype"], tuple(entry["shape"]), file, start, last - first))
    return sorted(tensors, key=lambda tensor: tensor.start)


def write_checkpoint(
    tensors: Sequence[LocatedTensor],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` with an index, into the existing `folder`.

    A tensor larger than that gets a shard of its own. `progress(done, total)` counts bytes. Raises OSError.
    """
    shards = _shards(tensors, shard_bytes)
    total = sum(tensor.num_bytes for tensor in tensors)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                for written in _copy(tensor, file):
                    done += written
                    if progress is not None:
                        progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _shards(tensors: Sequence[LocatedTensor], shard_bytes: int) -> list[list[LocatedTensor]]:
    shards: list[list[LocatedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def _header(tensors: Iterable[LocatedTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(tensor: LocatedTensor, target: BinaryIO) -> Iterable[int]:
    """Writes the bytes of a tensor, a chunk at a time; yields the size of each."""
    left = tensor.num_bytes
    made = tensor.zero or tensor.data is not None
    with io.BytesIO(tensor.data or b"") if made else tensor.file.open("rb") as source:
        source.seek(tensor.start)
        while left:
            size = min(left, _CHUNK_BYTES)
            chunk = bytes(size) if tensor.zero else source.read(size)
            if len(chunk) != size:
                raise ModelError(
                    f"{tensor.file} ends inside {tensor.name}: it changed while it was read; try again"
                )
            target.write(chunk)
            left -= size
            yield size
