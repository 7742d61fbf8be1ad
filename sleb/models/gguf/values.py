"""A tensor of a GGUF file that is to be written: from another file, from a folder, or of our own; never whole in memory
unless its rows change their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sleb.errors import ModelError
from sleb.models.gguf.convert import dequantized
from sleb.models.gguf.reader import Tensor
from sleb.models.gguf.tensors import Placed
from sleb.models.gguf.writer import Piece
from sleb.models.weight_files import StoredTensor, opened

Floats = npt.NDArray[np.float32]
_FROM_SAFETENSORS = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}
_CHUNK = 1 << 24  # values at a time


@dataclass(frozen=True)
class Values:
    """A tensor to be written.

    kind: as it is stored. rows: some of them as float32; raw: their bytes as stored. whole: all of them come at once.
    """

    shape: tuple[int, ...]
    kind: str
    rows: Callable[[int, int], Floats]
    raw: Callable[[int, int], bytes] | None = None
    whole: bool = False


def of_file(tensor: Tensor, path: Path) -> Values:
    data = tensor.data
    return Values(
        tensor.shape,
        tensor.kind.name,
        lambda start, end: dequantized(data[start:end], tensor, path).reshape(-1, _width(tensor.shape)),
        lambda start, end: data[start:end].tobytes(),
    )


def of_checkpoint(stored: StoredTensor, placed: Placed) -> Values:
    """A tensor of a folder in the file's order; whole in memory where that differs."""
    kind = (
        _FROM_SAFETENSORS.get(stored.dtype, "BF16") if len(placed.shape) > 1 else "F32"
    )  # others are quantised
    whole = placed.order is not None or placed.transposed or len(placed.shape) == 1
    whole = whole or stored.dtype not in _FROM_SAFETENSORS

    def rows(start: int, end: int) -> Floats:
        if whole:
            values = stored.read()
        else:
            with opened(stored.file) as handle:
                values = handle.get_slice(stored.name)[start:end]
        found: Floats = values.to(torch.float32).numpy()
        found = found.T if placed.transposed else found
        found = found if placed.order is None else found[np.argsort(placed.order)]
        return np.ascontiguousarray(found + np.float32(placed.shift)).reshape(end - start, -1)

    return Values(placed.shape, kind, rows, whole=whole)


def _width(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) > 1 else 1


def stacked(each: Sequence[Values]) -> Values:
    """Matrices as one tensor of three dimensions."""
    first = each[0]
    return Values(
        (len(each), *first.shape),
        first.kind,
        lambda start, end: np.concatenate([one.rows(0, one.shape[0]) for one in each[start:end]]),
    )


def made_values(array: Floats, kind: str = "F32") -> Values:
    """A tensor of our own. kind "exact": F16 where that changes nothing, else F32."""
    array = np.ascontiguousarray(array, np.float32)
    if kind == "exact":
        same = array.ndim > 1 and np.array_equal(array.astype(np.float16).astype(np.float32), array)
        kind = "F16" if same else "F32"
    return Values(
        array.shape,
        kind if array.ndim > 1 else "F32",
        lambda start, end: array[start:end].reshape(end - start, -1),
    )


def as_piece(name: str, values: Values, chosen: str) -> Piece:
    """With matrices in the type that was chosen, or Q8_0's stand-in where its rows are no whole groups."""
    from gguf import GGMLQuantizationType

    # llama.cpp takes vectors, positions and routers as they are.
    small = len(values.shape) < 2 or name.startswith("position_embd") or ".ffn_gate_inp." in name
    kind = values.kind if chosen == "auto" or small else chosen.upper()
    if kind == "Q8_0" and values.shape[-1] % 32:
        kind = "F16"
    number = GGMLQuantizationType[kind]
    raw = values.raw if kind == values.kind else None
    return Piece(name, values.shape, number, partial(_chunks, values, number, raw))


def _chunks(values: Values, kind: Any, raw: Callable[[int, int], bytes] | None) -> Iterator[bytes]:
    from gguf import quantize

    num_rows = values.shape[0]
    step = num_rows if values.whole else max(1, _CHUNK * num_rows // int(np.prod(values.shape)))
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        if raw is not None:
            yield raw(start, end)
            continue
        found = values.rows(start, end)
        if not np.isfinite(found).all():
            raise ModelError("the model holds values that are not finite, which cannot be written as GGUF")
        yield np.asarray(quantize(found, kind)).tobytes()
