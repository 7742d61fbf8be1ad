"""What `sleb bench kernels` measures: operators on shapes, with the bytes and operations that each needs at least.

The bytes are those of every input read once and every output written once; what an operator keeps for itself does not
count. A multiply and an add count two operations. T tokens, E hidden, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleb.benchmarks.kernel_options import OPS
from sleb.kernels.batch import BatchTensors, PagedBatch
from sleb.kernels.quantization import Int4Weight, Int8Weight, Weight
from sleb.kernels.registry import Attention, GpuKernels

ATTENTION_OPS = ("decode_attention", "prefill_attention")
# What the torch reference computes with lengths that it asks the device for: no graph can hold that.
TORCH_NOT_CAPTURABLE = (*ATTENTION_OPS, "sample")
_DEVIATION = 0.02  # of random weights
_EPS = 1e-5

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Backend:
    """What computes. For attention: its function, what a page's size must be a multiple of, if it can be captured."""

    name: str
    kernels: GpuKernels
    attention: Attention
    page_multiple: int = 1
    capturable: bool = True


class Maker:
    """Random inputs on a device, the same for a seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def normal(self, *shape: int, deviation: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, of mean 0."""
        made = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return made.normal_(0.0, deviation, generator=self.generator)

    def permutation(self, count: int) -> Tensor:
        """The integers below `count`, shuffled: [count] int32."""
        shuffled = torch.randperm(count, generator=self.generator, device=self.device)
        return shuffled.to(torch.int32)

    def count(self, number: int) -> Tensor:
        """[1] int32, as operators read their row counts."""
        return torch.tensor([number], dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class KernelCase:
    """An operator on a shape.

    Attributes:
        num_bytes, flops: the least that it moves and computes; flops 0: too few to matter.
        build: makes a set of inputs for a page size. call: runs a backend on it. head_dim: of attention.
    """

    op: str
    shape: str
    num_bytes: int
    flops: int
    build: Callable[[Maker, int], Inputs]
    call: Callable[[Backend, Inputs], Tensor]
    head_dim: int = 0

    def __str__(self) -> str:
        return f"{self.op} {self.shape}"


@dataclass(frozen=True)
class AttentionShape:
    """`batch` sequences of `new` tokens each after `before` others."""

    batch: int
    new: int
    before: int
    num_heads: int
    num_kv: int
    head_dim: int

    @property
    def context(self) -> int:
        return self.before + self.new


@dataclass(frozen=True)
class Sizes:
    """Shapes of a scale; `rows` are tokens of a step, `linears` inputs and outputs."""

    hidden: int
    num_heads: int
    num_kv: int
    head_dim: int
    gated: int
    plain: int
    vocab: int
    rows: tuple[int, ...]
    sampled: int
    decode: tuple[AttentionShape, ...]
    prefill: tuple[AttentionShape, ...]
    linears: tuple[tuple[int, int], ...]
    linear_rows: tuple[int, ...]


SIZES: dict[str, Sizes] = {
    # Llama 3.1 8B's, and the heads of LLaMA 2 7B; 64 rows are a decode step, 4,096 a step of prompts.
    "full": Sizes(
        hidden=4096,
        num_heads=32,
        num_kv=8,
        head_dim=128,
        gated=14336,
        plain=16384,
        vocab=128256,
        rows=(64, 4096),
        sampled=64,
        decode=(
            AttentionShape(64, 1, 2047, 32, 8, 128),
            AttentionShape(64, 1, 2047, 32, 32, 128),
            AttentionShape(1, 1, 8191, 32, 8, 128),
        ),
        prefill=(AttentionShape(1, 2048, 0, 32, 8, 128), AttentionShape(1, 512, 4096, 32, 8, 128)),
        linears=((4096, 4096), (4096, 2 * 14336), (14336, 4096)),
        linear_rows=(1, 16, 64),
    ),
    "small": Sizes(
        hidden=64,
        num_heads=4,
        num_kv=2,
        head_dim=16,
        gated=96,
        plain=128,
        vocab=300,
        rows=(4,),
        sampled=3,
        decode=(AttentionShape(3, 1, 39, 4, 2, 16), AttentionShape(3, 1, 39, 4, 4, 16)),
        prefill=(AttentionShape(1, 24, 0, 4, 2, 16), AttentionShape(1, 8, 20, 4, 2, 16)),
        linears=((64, 96),),
        linear_rows=(1, 4),
    ),
}


def make_cases(scale: str, dtype: torch.dtype, ops: Sequence[str] = OPS) -> list[KernelCase]:
    """The cases of `ops`, in the order of OPS."""
    sizes, itemsize = SIZES[scale], dtype.itemsize
    made: dict[str, Iterator[KernelCase]] = {
        "add_norm": (
            _add_norm(kind, rows, sizes, itemsize) for rows in sizes.rows for kind in ("rms", "layer")
        ),
        "rope_store": (
            _rope_store(rows, normed, sizes, itemsize) for rows in sizes.rows for normed in (False, True)
        ),
        "gated_activate": (_gated(rows, sizes.gated, itemsize) for rows in sizes.rows),
        "activate": (
            _activate(name, rows, sizes.plain, itemsize) for rows in sizes.rows for name in ("gelu", "relu")
        ),
        "decode_attention": (_attention("decode_attention", shape, itemsize) for shape in sizes.decode),
        "prefill_attention": (_attention("prefill_attention", shape, itemsize) for shape in sizes.prefill),
        "greedy": iter([_greedy(sizes, itemsize)]),
        "log_softmax_gather": iter([_gather(sizes, itemsize)]),
        "sample": iter([_sample(sizes, itemsize)]),
        "linear": (
            _linear(kind, rows, *shape, dtype)
            for shape in sizes.linears
            for kind in ("plain", "int8", "int4")
            for rows in sizes.linear_rows
        ),
    }
    return [case for op in OPS if op in ops for case in made[op]]


def _add_norm(kind: str, rows: int, sizes: Sizes, itemsize: int) -> KernelCase:
    size, num_vectors = sizes.hidden, 2 if kind == "layer" else 1

    def build(maker: Maker, page_size: int) -> Inputs:
        bias = maker.normal(size) if kind == "layer" else None
        rows_tensors = (maker.normal(rows, size), maker.normal(rows, size))
        return (*rows_tensors, maker.normal(size), bias, _EPS, kind, maker.count(rows), maker.count(rows))

    # Residual and delta are read, residual and norm written.
    num_bytes = (4 * rows + num_vectors) * size * itemsize
    return KernelCase(
        "add_norm",
        f"{kind} {rows} × {size}",
        num_bytes,
        0,
        build,
        lambda backend, inputs: backend.kernels.add_norm(*inputs),
    )


def _rope_store(rows: int, normed: bool, sizes: Sizes, itemsize: int) -> KernelCase:
    heads, num_kv, dim = sizes.num_heads, sizes.num_kv, sizes.head_dim

    def build(maker: Maker, page_size: int) -> Inputs:
        rotation = tuple(maker.normal(rows, dim // 2, dtype=torch.float32) for _ in range(2))
        norms = (maker.normal(dim), maker.normal(dim)) if normed else (None, None)
        caches = (maker.normal(rows, num_kv, dim), maker.normal(rows, num_kv, dim))
        positions, slots = maker.permutation(rows), maker.permutation(rows)
        projected = maker.normal(rows, heads + 2 * num_kv, dim)
        return (projected, heads, rotation, positions, *norms, _EPS, *caches, slots, maker.count(rows))

    # Heads are read and written elsewhere; a token has half a head of cosines and sines, a position and a slot.
    num_bytes = rows * (2 * (heads + 2 * num_kv) * dim * itemsize + dim * 4 + 8)
    num_bytes += 2 * dim * itemsize if normed else 0
    return KernelCase(
        "rope_store",
        f"{rows} × ({heads} + 2 · {num_kv}) × {dim}" + (", q/k norm" if normed else ""),
        num_bytes,
        0,
        build,
        lambda backend, inputs: backend.kernels.rope_store(*inputs),
    )


def _gated(rows: int, size: int, itemsize: int) -> KernelCase:
    return KernelCase(
        "gated_activate",
        f"silu {rows} × 2 · {size}",
        3 * rows * size * itemsize,
        0,
        lambda maker, page_size: (maker.normal(rows, 2 * size), "silu", maker.count(rows)),
        lambda backend, inputs: backend.kernels.gated_activate(*inputs),
    )


def _activate(name: str, rows: int, size: int, itemsize: int) -> KernelCase:
    return KernelCase(
        "activate",
        f"{name} {rows} × {size}",
        2 * rows * size * itemsize,
        0,
        lambda maker, page_size: (maker.normal(rows, size), name, maker.count(rows)),
        lambda backend, inputs: backend.kernels.activate(*inputs),
    )


def _attention(op: str, shape: AttentionShape, itemsize: int) -> KernelCase:
    num_tokens, width = shape.batch * shape.new, shape.num_heads * shape.head_dim

    def build(maker: Maker, page_size: int) -> Inputs:
        pages = -(-shape.context // page_size)
        table = maker.permutation(shape.batch * pages).view(shape.batch, pages)
        caches = tuple(
            maker.normal(shape.batch * pages * page_size, shape.num_kv, shape.head_dim) for _ in range(2)
        )
        batch = PagedBatch(
            (shape.new,) * shape.batch, (shape.context,) * shape.batch, table.long(), page_size
        )
        query = maker.normal(num_tokens, shape.num_heads, shape.head_dim)
        return (query, *caches, BatchTensors.of(batch, maker.device), shape.head_dim**-0.5, None)

    kv_bytes = 2 * shape.batch * shape.context * shape.num_kv * shape.head_dim * itemsize
    # A query sees the context up to itself: scores and values are a product each.
    attended = sum(range(shape.before + 1, shape.context + 1))
    heads = f"heads {shape.num_heads}/{shape.num_kv} × {shape.head_dim}"
    name = f"batch {shape.batch}, context {shape.context}, {heads}"
    if op == "prefill_attention":
        name = f"{shape.new} tokens" + (f" after {shape.before}" if shape.before else "") + f", {heads}"
    return KernelCase(
        op,
        name,
        2 * num_tokens * width * itemsize + kv_bytes,
        4 * shape.batch * width * attended,
        build,
        lambda backend, inputs: backend.attention(*inputs),
        shape.head_dim,
    )


def _greedy(sizes: Sizes, itemsize: int) -> KernelCase:
    rows, vocab = sizes.sampled, sizes.vocab
    return KernelCase(
        "greedy",
        f"{rows} × {vocab}",
        rows * (vocab * itemsize + 8),
        0,
        lambda maker, page_size: (maker.normal(rows, vocab, deviation=3.0),),
        lambda backend, inputs: backend.kernels.greedy(*inputs),
    )


def _gather(sizes: Sizes, itemsize: int) -> KernelCase:
    rows, vocab = sizes.sampled, sizes.vocab

    def build(maker: Maker, page_size: int) -> Inputs:
        return maker.normal(rows, vocab, deviation=3.0), maker.permutation(vocab)[:rows].long()

    return KernelCase(
        "log_softmax_gather",
        f"{rows} × {vocab}",
        rows * (vocab * itemsize + 8 + 4),
        0,
        build,
        lambda backend, inputs: backend.kernels.log_softmax_gather(*inputs),
    )


def _sample(sizes: Sizes, itemsize: int) -> KernelCase:
    """As an ordinary request asks: temperature 0.8, top-k 50, top-p 0.95."""
    rows, vocab = sizes.sampled, sizes.vocab

    def build(maker: Maker, page_size: int) -> Inputs:
        points = [(row + 0.5) / rows for row in range(rows)]
        numbers = [[0.8] * rows, [50.0] * rows, [0.95] * rows, [0.0] * rows, points]
        on_device = torch.tensor(numbers, dtype=torch.float64, device=maker.device)
        return maker.normal(rows, vocab, deviation=3.0), on_device

    return KernelCase(
        "sample",
        f"{rows} × {vocab}, top-k and top-p",
        rows * (vocab * itemsize + 5 * 8 + 8),
        0,
        build,
        lambda backend, inputs: backend.kernels.sample_packed(*inputs),
    )


def _linear(kind: str, rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> KernelCase:
    def build(maker: Maker, page_size: int) -> Inputs:
        weight: Weight
        if kind == "plain":
            weight = maker.normal(num_outputs, num_inputs, deviation=_DEVIATION)
        else:
            format_ = Int8Weight if kind == "int8" else Int4Weight
            weight = format_.empty(num_outputs, num_inputs, maker.device)
            weight.fill_random(_DEVIATION, maker.generator)
        return maker.normal(rows, num_inputs), weight, None

    meta = torch.device("meta")
    weight_bytes = num_inputs * num_outputs * dtype.itemsize
    if kind != "plain":
        format_ = Int8Weight if kind == "int8" else Int4Weight
        weight_bytes = format_.empty(num_outputs, num_inputs, meta).num_bytes
    return KernelCase(
        "linear",
        f"{kind}, {rows} rows, {num_inputs} → {num_outputs}",
        weight_bytes + rows * (num_inputs + num_outputs) * dtype.itemsize,
        2 * rows * num_inputs * num_outputs,
        build,
        lambda backend, inputs: backend.kernels.linear(*inputs),
    )
