"""A GGUF file's metadata and tensors: counts, lengths and offsets are held against its size before they are used.

The `gguf` package's reader allocates and loops by what the file says, takes 16 s for the vocabulary of a large model,
and hands out the weights of a file of the other byte order as if they were of this one. The format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sleb.errors import ModelError
from sleb.fields import Fields, shown, shown_path

# Beyond what the largest vocabularies need (260,000 tokens, 520,000 merges), so that no file is worked on for long.
_MAX_METADATA_BYTES = 64 << 20
_MAX_ARRAY_ITEMS = 1 << 22  # of all arrays together
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LAYOUTS = {code: struct.Struct(f"<{code}") for code in _SCALARS.values()}


@dataclass(frozen=True)
class Tensor:
    """A tensor, mapped, not read.

    `shape`: slowest dimension first. `kind`: a GGMLQuantizationType. `data`: its bytes, [*shape[:-1], bytes of a row],
    or for a vector that is not quantised [shape[0], bytes of a value].
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    data: npt.NDArray[np.uint8]


def read_gguf(
    source: Path, check: Callable[[Fields], object] | None = None
) -> tuple[Fields, dict[str, Tensor]]:
    """Metadata by key and tensors by name.

    `check` gets the metadata as soon as the architecture is read, which writers put first: it may refuse before the
    vocabulary is read. Raises ModelError for what is no whole GGUF file, or one that lies about itself.
    """
    reader = _Reader(source, _mapped(source))
    num_tensors, num_keys = reader.header()
    values: dict[str, Any] = {}
    fields = Fields(values, source)
    for _ in range(num_keys):
        key = reader.read_key(values)
        if key == "general.architecture" and check is not None:
            check(fields)
    return fields, reader.tensors(num_tensors, _alignment(fields))


def read_architecture(source: Path) -> Fields:
    """The metadata up to the architecture alone: takes no longer for a large file. Raises ModelError as `read_gguf`."""
    reader = _Reader(source, _mapped(source))
    _, num_keys = reader.header()
    values: dict[str, Any] = {}
    while len(values) < num_keys and "general.architecture" not in values:
        reader.read_key(values)
    return Fields(values, source)


def raw_keys(source: Path) -> dict[str, bytes]:
    """Each key with its value as the bytes that the file has of both. Raises ModelError as `read_gguf`."""
    reader = _Reader(source, _mapped(source))
    _, num_keys = reader.header()
    values: dict[str, Any] = {}
    found: dict[str, bytes] = {}
    for _ in range(num_keys):
        start = reader.position
        key = reader.read_key(values)
        found[key] = reader.since(start)
    return found


def parsed_keys(raw: Mapping[str, bytes], prefix: str) -> dict[str, Any]:
    """The values of `raw_keys` whose names begin with `prefix`."""
    values: dict[str, Any] = {}
    for name, data in raw.items():
        if name.startswith(prefix):
            _Reader(Path(name), np.frombuffer(data, np.uint8)).read_key(values)
    return values


def _mapped(source: Path) -> npt.NDArray[np.uint8]:
    try:
        size = source.stat().st_size if source.is_file() else 0
        return np.memmap(source, np.uint8, "r") if size else np.zeros(0, np.uint8)
    except OSError as error:
        raise ModelError(f"{shown_path(source)} cannot be read: {error.strerror or error}") from None


def _alignment(fields: Fields) -> int:
    alignment: int = fields.integer("general.alignment", 1, 1 << 31, 32)
    if alignment & (alignment - 1):
        raise fields.wrong("general.alignment", "a power of two")
    return alignment


class _Reader:
    """A cursor over the file's bytes."""

    def __init__(self, source: Path, data: npt.NDArray[np.uint8]) -> None:
        self._source, self._data, self._bytes = source, data, data.data
        self._position, self._end = 0, min(len(data), _MAX_METADATA_BYTES)
        self._items_left = _MAX_ARRAY_ITEMS

    @property
    def position(self) -> int:
        return self._position

    def since(self, start: int) -> bytes:
        """What was read from byte `start` on."""
        return bytes(self._bytes[start : self._position])

    def header(self) -> tuple[int, int]:
        """The number of tensors and of keys."""
        if bytes(self._bytes[:4]) != b"GGUF":
            raise self._error("no GGUF file: it must begin with GGUF")
        self._position = 4
        version = self._scalar("I", "the version")
        if version & 0xFFFF == 0:
            raise self._error(
                "a big-endian file, and this machine is little-endian: convert it, in place, with "
                f"`gguf-convert-endian {shown_path(self._source)} little`, a command of the package gguf"
            )
        if version not in (2, 3):
            raise self._error(f"GGUF version {version}; 2 and 3 are read")
        counts = []
        for what, most, least_bytes in (("tensors", _MAX_TENSORS, 24), ("keys", _MAX_KEYS, 13)):
            count = self._scalar("Q", f"the number of {what}")
            most = min(most, len(self._bytes) // least_bytes)
            if count > most:
                raise self._error(f"{count} {what}; a file of its size has at most {most}: fetch it again")
            counts.append(count)
        return counts[0], counts[1]

    def read_key(self, values: dict[str, Any]) -> str:
        """Puts the next key and its value into `values`."""
        key = self._text("a key")
        if key in values:
            raise self._error(f"{shown(key)} is there twice; it must be there once")
        values[key] = self._value(key, f"the value of {shown(key)}")
        return key

    def _value(self, key: str, what: str) -> Any:
        kind = self._scalar("I", what)
        if kind == _STRING:
            return self._text(what)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], what)
        if kind == _ARRAY:
            return self._array(key, self._scalar("I", what), self._scalar("Q", what))
        raise self._error(f"{shown(key)} has a value of type {kind}; the types are 0 to 12")

    def _array(self, key: str, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS and kind != _STRING:
            inner = "arrays" if kind == _ARRAY else f"type {kind}"
            raise self._error(f"{shown(key)} is an array of {inner}; it must be one of numbers or strings")
        if count > self._items_left:
            raise self._error(
                f"{shown(key)} has {count} values; all arrays may have {_MAX_ARRAY_ITEMS} together"
            )
        self._items_left -= count
        what = f"{shown(key)} with {count} values"
        if kind == _STRING:
            self._need(8 * count, what)
            return [self._text(what) for _ in range(count)]
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        start = self._take(count * dtype.itemsize, what)
        found: list[Any] = np.frombuffer(self._bytes, dtype, count, start).tolist()
        return found

    def tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        """Raises ModelError too for tensors that share bytes: a small file would become a large model."""
        described = [self._description() for _ in range(count)]
        start = -(-self._position // alignment) * alignment
        found: dict[str, Tensor] = {}
        end = 0
        for name, shape, kind, num_bytes, offset in sorted(described, key=lambda each: each[-1]):
            if name in found:
                raise self._error(f"tensor {shown(name)} is there twice; it must be there once")
            if offset % alignment or not end <= offset:
                wanted = f"a multiple of {alignment} that is not below {end}, where the tensor before it ends"
                raise self._error(f"tensor {shown(name)} has offset {offset}; it must be {wanted}")
            if num_bytes > len(self._bytes) - start - offset:
                raise self._error(
                    f"cut short: tensor {shown(name)} ends at byte {start + offset + num_bytes}, the file at "
                    f"{len(self._bytes)}: fetch it again"
                )
            end = offset + num_bytes
            rows = self._data[start + offset : start + end]
            outer = shape if len(shape) == 1 and num_bytes % shape[0] == 0 else shape[:-1]
            found[name] = Tensor(name, shape, kind, rows.reshape(*outer, -1))
        return {name: found[name] for name, *_ in described}

    def _description(self) -> tuple[str, tuple[int, ...], Any, int, int]:
        """Name, shape, kind, number of bytes and offset of a tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text("a tensor's name")
        what = f"tensor {shown(name)}"
        num_dimensions = self._scalar("I", what)
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"{what} has {num_dimensions} dimensions; it must have 1 to {_MAX_DIMENSIONS}")
        shape = tuple(self._scalar("Q", what) for _ in range(num_dimensions))[::-1]
        kind, offset = self._scalar("I", what), self._scalar("Q", what)
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            known = ", ".join(sorted(each.name for each in GGML_QUANT_SIZES))
            raise self._error(f"{what} is of type {kind}; the installed package gguf knows {known}") from None
        if 0 in shape or shape[-1] % block:
            of = f", the last a multiple of {block}" if block > 1 else ""
            raise self._error(f"{what} has shape {list(shape)}; its sizes must be 1 or more{of}")
        num_bytes = math.prod(shape) // block * block_bytes
        return name, shape, GGMLQuantizationType(kind), num_bytes, offset

    def _scalar(self, code: str, what: str) -> Any:
        layout = _LAYOUTS[code]
        return layout.unpack_from(self._bytes, self._take(layout.size, what))[0]

    def _text(self, what: str) -> str:
        length = self._scalar("Q", what)
        start = self._take(length, what)
        try:
            return str(self._bytes[start : self._position], "utf-8")
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8 at byte {start}") from None

    def _take(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin."""
        start = self._position
        if start + count > self._end:
            self._need(count, what)
        self._position = start + count
        return start

    def _need(self, count: int, what: str) -> None:
        left = len(self._bytes) - self._position
        if count > left:
            raise self._error(f"cut short: {what} takes {count} bytes, and {left} are left: fetch it again")
        if self._position + count > _MAX_METADATA_BYTES:
            raise self._error(f"{what} ends behind byte {_MAX_METADATA_BYTES}, up to which metadata is read")

    def _error(self, problem: str) -> ModelError:
        return ModelError(f"{shown_path(self._source)}: {problem}")
