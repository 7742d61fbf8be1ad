"""Blocks of quantised GGUF tensors as integers, scales and minima: what keeps a file's own bits.

The layouts are llama.cpp's (github.com/ggml-org/llama.cpp, ggml-common.h). A row is blocks of 32 or 256 inputs; d and m
are a block's, scale and minimum small integers of a group:

    Q4_0, Q5_0, Q8_0    w = d · (q − 8), (q − 16), q        groups of 32
    Q4_1, Q5_1          w = d · q + m                       groups of 32
    Q4_K, Q5_K          w = d · scale · q − m · minimum     groups of 32, eight to a block
    Q6_K                w = d · scale · (q − 32)            groups of 16, sixteen to a block
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Groups = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]
"""q [..., inputs], scale [..., groups], and minimum, or None where q counts from 8 (of 4 bits) or 128 (of 8)."""


@dataclass(frozen=True)
class Block:
    """A kind of block: its inputs and bytes, the inputs of a group, and the bits of q as `decode` gives it."""

    inputs: int
    num_bytes: int
    group: int
    bits: int
    has_minimum: bool
    decode: Callable[[Bytes], Groups]


def _half(data: Bytes, at: int) -> npt.NDArray[Any]:
    return np.ascontiguousarray(data[..., at : at + 2]).view("<f2")


def _nibbles(data: Bytes) -> Bytes:
    """The low ones of all bytes, then the high ones."""
    return np.concatenate((data & 15, data >> 4), axis=-1)


def _fifth(data: Bytes) -> Bytes:
    return np.unpackbits(data, axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(data: Bytes) -> Groups:
    return _nibbles(data[..., 2:]), _half(data, 0), None


def _q4_1(data: Bytes) -> Groups:
    return _nibbles(data[..., 4:]), _half(data, 0), _half(data, 2)


def _q5_0(data: Bytes) -> Groups:
    return (_nibbles(data[..., 6:]) | _fifth(data[..., 2:6])) + np.uint8(128 - 16), _half(data, 0), None


def _q5_1(data: Bytes) -> Groups:
    return _nibbles(data[..., 8:]) | _fifth(data[..., 4:8]), _half(data, 0), _half(data, 2)


def _q8_0(data: Bytes) -> Groups:
    return data[..., 2:] ^ np.uint8(128), _half(data, 0), None


def _scaled(data: Bytes) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Scales and minima of a block's eight groups, whose integers of six bits lie in twelve bytes after d and m."""
    first, second, third = data[..., 4:8], data[..., 8:12], data[..., 12:16]
    scale = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=-1)
    minimum = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=-1)
    return _half(data, 0).astype(np.float32) * scale, -_half(data, 2).astype(np.float32) * minimum


def _pairs(data: Bytes) -> Bytes:
    """Bytes [..., 128] as eight groups [..., 8, 32]: of each 32 the low nibbles, then the high ones."""
    parts = data.reshape(*data.shape[:-1], 4, 32)
    return _nibbles(parts).reshape(*data.shape[:-1], 8, 32)


def _q4_k(data: Bytes) -> Groups:
    return _pairs(data[..., 16:]).reshape(*data.shape[:-1], 256), *_scaled(data)


def _q5_k(data: Bytes) -> Groups:
    high = data[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return (_pairs(data[..., 48:]) | high << 4).reshape(*data.shape[:-1], 256), *_scaled(data)


def _q6_k(data: Bytes) -> Groups:
    low = data[..., :128].reshape(*data.shape[:-1], 2, 64)
    high = (
        data[..., 128:192].reshape(*data.shape[:-1], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        & 3
    )
    q = _nibbles(low).reshape(*data.shape[:-1], 2, 4, 32) | high << 4
    scale = np.ascontiguousarray(data[..., 192:208]).view(np.int8) * _half(data, 208).astype(np.float32)
    return q.reshape(*data.shape[:-1], 256) + np.uint8(128 - 32), scale, None


# By llama.cpp's names.
BLOCKS = {
    "Q4_0": Block(32, 18, 32, 4, False, _q4_0),
    "Q4_1": Block(32, 20, 32, 4, True, _q4_1),
    "Q5_0": Block(32, 22, 32, 8, False, _q5_0),
    "Q5_1": Block(32, 24, 32, 8, True, _q5_1),
    "Q8_0": Block(32, 34, 32, 8, False, _q8_0),
    "Q4_K": Block(256, 144, 32, 4, True, _q4_k),
    "Q5_K": Block(256, 176, 32, 8, True, _q5_k),
    "Q6_K": Block(256, 210, 16, 8, False, _q6_k),
}


def kept_end(kind: str) -> str:
    """How the name ends of a tensor that a conversion keeps in blocks of `kind`: bytes [rows, bytes of a row]."""
    return f".gguf_{kind.lower()}"
