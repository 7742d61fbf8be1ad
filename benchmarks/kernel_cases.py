"""What `sleb bench kernels` measures: operators on shapes, with the bytes and operations that each needs at least.

The bytes are those of every input read once and every output written once; what an operator keeps for itself does not
count. A multiply and an add count two operations. T tokens, E hidden, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sleb.benchmarks.kernel_options import OPS
from sleb.kernels.batch import BatchTensors, PagedBatch
from sleb.kernels.quantization import Int4Weight, Int8Weight
from sleb.kernels.reference.device import HeadNorm, RowNorm, moments
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
        return torch.randperm(count, generator=self.generator, device=self.device).to(torch.int32)

    def count(self, number: int) -> Tensor:
        """[1] int32, as operators read their row counts."""
        return torch.tensor([number], dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class KernelCase:
    """An operator on a shape.

    Attributes:
        num_bytes: the least that it moves. build: makes a set of inputs for a page size.
        flops: the least that it computes; 0: too few to matter. head_dim: of attention.
    """

    op: str
    shape: str
    num_bytes: int
    build: Callable[[Maker, int], Inputs]
    flops: int = 0
    head_dim: int = 0

    def __str__(self) -> str:
        return f"{self.op} {self.shape}"

    def call(self, backend: Backend, inputs: Inputs) -> Tensor:
        """Runs a backend on a set of inputs, the last of them arguments by name where it is a dict."""
        name = "sample_packed" if self.op == "sample" else self.op
        run = backend.attention if self.op in ATTENTION_OPS else getattr(backend.kernels, name)
        keywords = inputs[-1] if isinstance(inputs[-1], dict) else {}
        found = run(*inputs[: len(inputs) - bool(keywords)], **keywords)
        return inputs[3] if self.op == "linear_add" else found  # the residual


def make_cases(scale: str, dtype: torch.dtype, ops: Sequence[str] = OPS) -> list[KernelCase]:
    """The cases of `ops`, in the order of OPS.

    "full": Llama 3.1 8B's shapes, and the heads of LLaMA 2 7B; 64 rows are a decode step, 4,096 a step of prompts.
    """
    size, cases = dtype.itemsize, list[KernelCase]()
    hidden, heads, gated, plain, vocab, sampled = 64, (4, 2, 16), 96, 128, 300, 3
    num_rows, linear_rows, linears = [4], [1, 4], [(64, 96)]
    # Sequences, new tokens of each and tokens before them; heads, those of keys and values, features of each.
    decode = [(3, 1, 39, *heads), (3, 1, 39, 4, 4, 16)]
    prefill = [(1, 24, 0, *heads), (1, 8, 20, *heads)]
    if scale == "full":
        hidden, heads, gated, plain, vocab, sampled = 4096, (32, 8, 128), 14336, 16384, 128256, 64
        num_rows, linear_rows = [64, 4096], [1, 16, 64]
        linears = [(4096, 4096), (4096, 2 * 14336), (14336, 4096)]
        decode = [(64, 1, 2047, *heads), (64, 1, 2047, 32, 32, 128), (1, 1, 8191, *heads)]
        prefill = [(1, 2048, 0, *heads), (1, 512, 4096, *heads)]
    for rows in num_rows:
        cases += [_add_norm(kind, rows, hidden, size) for kind in ("rms", "layer", "none")]
        cases += [_rope_store(rows, normed, *heads, itemsize=size) for normed in (False, True)]
        cases += [_activation("gated_activate", "silu", rows, gated, size)]
        cases += [_activation("activate", name, rows, plain, size) for name in ("gelu", "relu")]
    cases += [_attention("decode_attention", *shape, itemsize=size) for shape in decode]
    cases += [_attention("prefill_attention", *shape, itemsize=size) for shape in prefill]
    cases += _on_logits(sampled, vocab, size)
    kinds = [(kind, *shape) for shape in linears for kind in ("plain", "int8", "int4")]
    kinds.append(("patch", hidden, hidden))
    linear = partial(_linear, dtype=dtype, heads=heads)
    cases += [linear("linear", kind, rows, *shape) for kind, *shape in kinds for rows in linear_rows]
    fused = [("linear_activate", hidden, linears[len(linears) // 2][1]), ("linear_add", *linears[-1])]
    fused.append(("linear_rope_store", hidden, (heads[0] + 2 * heads[1]) * heads[2]))
    for kind, rows in itertools.product(("plain", "int8", "int4"), linear_rows[::2]):
        cases += [linear(op, kind, rows, *shape) for op, *shape in fused]
    return [case for op in OPS if op in ops for case in cases if case.op == op]


def _activation(op: str, name: str, rows: int, size: int, itemsize: int) -> KernelCase:
    factor, width = (2, f"2 · {size}") if op == "gated_activate" else (1, str(size))

    def build(maker: Maker, page_size: int) -> Inputs:
        return maker.normal(rows, factor * size), name, maker.count(rows)

    return KernelCase(op, f"{name} {rows} × {width}", (factor + 1) * rows * size * itemsize, build)


def _add_norm(kind: str, rows: int, size: int, itemsize: int) -> KernelCase:
    def build(maker: Maker, page_size: int) -> Inputs:
        bias = maker.normal(size) if kind == "layer" else None
        residual, delta = maker.normal(rows, size), maker.normal(rows, size)
        return residual, delta, maker.normal(size), bias, _EPS, kind, maker.count(rows), maker.count(rows)

    # Residual and delta are read, residual and norm written.
    num_bytes = (4 * rows + (2 if kind == "layer" else 1)) * size * itemsize
    return KernelCase("add_norm", f"{kind} {rows} × {size}", num_bytes, build)


def _rope_store(rows: int, normed: bool, heads: int, num_kv: int, dim: int, *, itemsize: int) -> KernelCase:
    def build(maker: Maker, page_size: int) -> Inputs:
        rotation = tuple(maker.normal(rows, dim // 2, dtype=torch.float32) for _ in range(2))
        norm = HeadNorm("rms", maker.normal(dim), maker.normal(dim), eps=_EPS) if normed else None
        caches = (maker.normal(rows, num_kv, dim), maker.normal(rows, num_kv, dim))
        positions, slots = maker.permutation(rows), maker.permutation(rows)
        projected = maker.normal(rows, heads + 2 * num_kv, dim)
        return (projected, heads, rotation, positions, norm, *caches, slots, maker.count(rows))

    # Heads are read and written elsewhere; a token has half a head of cosines and sines, a position and a slot.
    num_bytes = rows * (2 * (heads + 2 * num_kv) * dim * itemsize + dim * 4 + 8)
    num_bytes += 2 * dim * itemsize if normed else 0
    shape = f"{rows} × ({heads} + 2 · {num_kv}) × {dim}" + (", q/k norm" if normed else "")
    return KernelCase("rope_store", shape, num_bytes, build)


def _attention(
    op: str, batch: int, new: int, before: int, num_heads: int, num_kv: int, head_dim: int, *, itemsize: int
) -> KernelCase:
    """`batch` sequences of `new` tokens each after `before` others."""
    context, num_tokens = before + new, batch * new

    def build(maker: Maker, page_size: int) -> Inputs:
        pages = -(-context // page_size)
        table = maker.permutation(batch * pages).view(batch, pages).long()
        caches = tuple(maker.normal(batch * pages * page_size, num_kv, head_dim) for _ in range(2))
        paged = PagedBatch((new,) * batch, (context,) * batch, table, page_size)
        query = maker.normal(num_tokens, num_heads, head_dim)
        return (query, *caches, BatchTensors.of(paged, maker.device), head_dim**-0.5, None)

    kv_bytes = 2 * batch * context * num_kv * head_dim * itemsize
    # A query sees the context up to itself: scores and values are a product each.
    flops = 4 * batch * num_heads * head_dim * sum(range(before + 1, context + 1))
    shape = f"batch {batch}, context {context}"
    if op == "prefill_attention":
        shape = f"{new} tokens" + (f" after {before}" if before else "")
    shape += f", heads {num_heads}/{num_kv} × {head_dim}"
    num_bytes = 2 * num_tokens * num_heads * head_dim * itemsize + kv_bytes
    return KernelCase(op, shape, num_bytes, build, flops, head_dim)


def _on_logits(rows: int, vocab: int, itemsize: int) -> Iterator[KernelCase]:
    def logits(maker: Maker) -> Tensor:
        return maker.normal(rows, vocab, deviation=3.0)

    def sample(maker: Maker, page_size: int) -> Inputs:
        """As an ordinary request asks: temperature 0.8, top-k 50, top-p 0.95."""
        numbers = [[0.8, 50.0, 0.95, 0.0, (row + 0.5) / rows] for row in range(rows)]
        return logits(maker), torch.tensor(numbers, dtype=torch.float64, device=maker.device).T.contiguous()

    def gather(maker: Maker, page_size: int) -> Inputs:
        return logits(maker), maker.permutation(vocab)[:rows].long()

    shape, row_bytes = f"{rows} × {vocab}", vocab * itemsize
    yield KernelCase("greedy", shape, rows * (row_bytes + 8), lambda maker, page_size: (logits(maker),))
    yield KernelCase("log_softmax_gather", shape, rows * (row_bytes + 8 + 4), gather)
    yield KernelCase("sample", f"{shape}, top-k and top-p", rows * (row_bytes + 5 * 8 + 8), sample)


def _linear(
    op: str, kind: str, rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, heads: Sequence[int]
) -> KernelCase:
    """kind: plain, int8 or int4, or "patch": a plain one, over rows whose range the device knows."""
    formats: dict[str, type[Int8Weight] | type[Int4Weight]] = {"int8": Int8Weight, "int4": Int4Weight}
    quantised = formats.get(kind)

    def build(maker: Maker, page_size: int) -> Inputs:
        x, count = maker.normal(rows, num_inputs), maker.count(rows)
        if quantised is None:
            weight: Any = maker.normal(num_outputs, num_inputs, deviation=_DEVIATION)
        else:
            weight = quantised.empty(num_outputs, num_inputs, maker.device)
            weight.fill_random(_DEVIATION, maker.generator)
        if op == "linear_add":
            residual = maker.normal(rows, num_outputs)
            return x, weight, None, residual, moments(residual), count
        norm = {"norm": RowNorm(maker.normal(num_inputs), _EPS, moments(x))}
        if op == "linear_activate":
            return x, weight, None, "silu", True, count, norm
        if op == "linear_rope_store":
            rope = _rope_store(rows, False, *heads, itemsize=dtype.itemsize)
            return x, weight, None, *rope.build(maker, page_size)[1:], norm
        return x, weight, None, *(((maker.count(0), count),) if kind == "patch" else ())

    num_bytes = num_inputs * num_outputs * dtype.itemsize + (8 if kind == "patch" else 0)
    if quantised is not None:
        num_bytes = quantised.empty(num_outputs, num_inputs, torch.device("meta")).num_bytes
    num_bytes += rows * (num_inputs + num_outputs) * dtype.itemsize
    if op == "linear_add":  # the residual is read too, and its moments written: 4 bytes a 64 features
        num_bytes += rows * (num_outputs * dtype.itemsize + num_outputs // 16)
    elif op != "linear":  # the norm's weight and moments; half of the outputs, or what `_rope_store` tells
        num_bytes += num_inputs * dtype.itemsize + rows * num_inputs // 16
        half = num_outputs // 2 * dtype.itemsize
        num_bytes += rows * (-half if op == "linear_activate" else heads[2] * 4 + 8)
    shape = f"{kind}, {rows} rows, {num_inputs} → {num_outputs}"
    return KernelCase(op, shape, num_bytes, build, 2 * rows * num_inputs * num_outputs)
