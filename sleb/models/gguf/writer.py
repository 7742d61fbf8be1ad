"""GGUF files written: metadata as bytes, tensors some rows at a time, none of them whole in memory unless it must be.

The `gguf` package's writer wants every value as an object again, and would change what it copies: here a key that comes
from another file keeps its bytes. The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

_ALIGNMENT = 32  # what stands for an absent general.alignment
_VERSION = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT64 = 4, 5, 6, 7, 8, 9, 11
_LAYOUTS = {_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?", _INT64: "<q"}


@dataclass(frozen=True)
class Piece:
    """A tensor to write. shape: slowest dimension first; kind: a GGMLQuantizationType; chunks: its bytes in order."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    chunks: Callable[[], Iterable[bytes]]

    @property
    def num_bytes(self) -> int:
        from gguf import GGML_QUANT_SIZES

        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes


def as_key(key: str, value: Any) -> bytes:
    """A key and its value: a boolean, number or string, or a list of them, all of one kind."""
    return _text(key) + _value(value)


def renamed(key: str, raw: bytes) -> bytes:
    """A key's bytes with another name in its place."""
    [length] = struct.unpack_from("<Q", raw)
    return _text(key) + raw[8 + length :]


def write_gguf(
    file: BinaryIO,
    keys: Mapping[str, bytes],
    pieces: Sequence[Piece],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `keys`, bytes of `as_key` or another file's, and tensors; `progress(done, total)` counts their bytes."""
    keys = {name: raw for name, raw in keys.items() if name != "general.alignment"}
    file.write(b"GGUF" + struct.pack("<IQQ", _VERSION, len(pieces), len(keys)))
    for raw in keys.values():
        file.write(raw)
    offset, total, done = 0, sum(piece.num_bytes for piece in pieces), 0
    for piece in pieces:
        file.write(_text(piece.name) + struct.pack("<I", len(piece.shape)))
        file.write(struct.pack(f"<{len(piece.shape)}Q", *reversed(piece.shape)))
        file.write(struct.pack("<IQ", int(piece.kind), offset))
        offset += _padded(piece.num_bytes)
    file.write(bytes(_padded(file.tell()) - file.tell()))
    for piece in pieces:
        written = 0
        for chunk in piece.chunks():
            file.write(chunk)
            written += len(chunk)
            if progress is not None:
                progress(done + written, total)
        assert written == piece.num_bytes, piece.name
        file.write(bytes(_padded(written) - written))
        done += written


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0], in_list=True) if value else _STRING
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_items(value, kind))
    kind = _kind(value)
    return struct.pack("<I", kind) + next(_items([value], kind))


def _items(values: list[Any], kind: int) -> Iterator[bytes]:
    for value in values:
        yield _text(value) if kind == _STRING else struct.pack(_LAYOUTS[kind], value)


def _kind(value: Any, *, in_list: bool = False) -> int:
    """As llama.cpp's converters choose: lists of integers are signed."""
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _INT32 if in_list else _UINT32 if 0 <= value < 1 << 32 else _INT64
    return _FLOAT32 if isinstance(value, float) else _STRING
