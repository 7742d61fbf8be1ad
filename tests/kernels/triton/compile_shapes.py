"""The shapes of real models that operators are compiled at, for `compile_kernels.py`."""

from __future__ import annotations

import itertools
from functools import partial

import torch

from sleb.kernels.batch import BatchTensors
from sleb.kernels.quantization import Groups, Int4Weight, Int8Weight
from sleb.kernels.reference.device import MOMENT_CHUNK, HeadNorm, RowNorm
from sleb.kernels.registry import triton_gpu_kernels

# Shared memory that a program may have, bytes, by compute capability (CUDA programming guide).
CARDS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# One of each kind of matrix product and size of shared memory: mma.sync with much and with little, wgmma, tcgen05.
KINDS = (80, 89, 90, 100)
USUAL = (89, 90)
PROCESSORS = 132  # of an H100
META = torch.device("meta")
# query heads, KV heads, head dimension, hidden size, MLP size
MODELS = {
    "Llama 3 8B": (32, 8, 128, 4096, 14336),
    "Qwen3 0.6B": (16, 8, 128, 1024, 3072),
    "LLaMA 7B": (32, 32, 128, 4096, 11008),
    "Phi-2": (32, 32, 80, 2560, 10240),
}
BF16, FP32 = torch.bfloat16, torch.float32
WEIGHTS = {
    "bf16": lambda rows, columns: half(rows, columns),
    "int8": lambda rows, columns: Int8Weight.empty(rows, columns, META),
    "int4": lambda rows, columns: Int4Weight.empty(rows, columns, META),
    "4 bits with zeros": lambda rows, columns: Groups(4, 128, "zero").empty(rows, columns, META),
    "8 bits from the middle": lambda rows, columns: Groups(8, 16, "middle").empty(rows, columns, META),
}


def cases(level):
    """(compute capability, whether all configurations, label, a function that launches) of a level.

    usual: a part, for two. matrix: every shape with the first configuration for all, and the other configurations of a
    part for KINDS. everything: every shape and configuration for all.
    """
    for arch in USUAL if level == "usual" else CARDS:
        whole = level != "usual"
        for label, work in _shapes(whole, arch):
            yield arch, level == "everything", label, work
        if level == "matrix" and arch in KINDS:
            for label, work in _shapes(False, arch):
                yield arch, True, label, work


def half(*shape):
    return torch.empty(shape, dtype=BF16, device=META)


def integers(*shape):
    return torch.empty(shape, dtype=torch.int32, device=META)


def _shapes(whole, arch):
    gpu = triton_gpu_kernels()
    for name, shape in MODELS.items() if whole else list(MODELS.items())[: 2 if arch == 90 else 1]:
        yield from _small(gpu, name, *shape, whole)
        yield from _linears(gpu, name, *shape, whole)
    yield from _sampling(gpu)
    yield from _attention(gpu, whole)
    yield from _mixtures(gpu, whole)


def _small(gpu, name, num_heads, num_kv, head_dim, hidden, mlp, whole):
    """What stands between the products."""
    x, weight, count = half(8, hidden), half(hidden), integers(1)
    norm = HeadNorm("rms", half(head_dim), half(head_dim)) if name.startswith("Qwen3") else None
    cache, table = half(4096, num_kv, head_dim), torch.empty(4096, head_dim // 2)
    rope = (half(8, num_heads + 2 * num_kv, head_dim), num_heads, (table, table), integers(8))
    stored = (cache, cache, integers(8), count)
    starts = {"delta_start": count, "norm_start": count}  # of a patch, and after one
    sums = torch.empty(8, -(-hidden // MOMENT_CHUNK))
    rms = (1e-6, "rms", count, count)

    yield f"norm, {name}", partial(gpu.add_norm, x, x, weight, None, *rms)
    yield f"norm and moments, {name}", partial(gpu.add_norm, x, x, weight, None, *rms, moments=sums)
    yield f"moments, {name}", partial(gpu.moments, x)
    yield f"gated, {name}", partial(gpu.gated_activate, half(8, 2 * mlp), "silu", count)
    yield f"rope, {name}", partial(gpu.rope_store, *rope, norm, *stored)
    if not whole:
        return
    yield f"norm of a range, {name}", partial(gpu.add_norm, x, x, None, None, *rms, **starts)
    scale = (x, x, weight, weight, 1e-6, "none", count, count)
    yield f"scale, {name}", partial(gpu.add_norm, *scale, **starts, post=True)
    if name != "LLaMA 7B":
        return
    shifted = torch.empty(hidden)  # in float32
    for kind in ("rms", "layer"):  # as in Gemma, Granite
        update = {"delta_kind": kind, "delta_weight": shifted, "delta_bias": None, "delta_scale": 0.22}
        arguments = (x, x, shifted, None, 1e-6, kind, count, count)
        yield f"norm of the update, {kind}", partial(gpu.add_norm, *arguments, **update)
    sizes = (num_heads * head_dim, num_kv * head_dim)
    over_all = HeadNorm("layer", *map(half, sizes * 2), whole=True)
    after = HeadNorm("layer", half(head_dim), half(head_dim), after_rotation=True)
    for each in (over_all, after):
        yield f"rope, {each.kind}, {each.whole=}", partial(gpu.rope_store, *rope, each, *stored, 8.0)
    for post in (False, True):  # as in OPT
        arguments = (x, x, weight, weight, 1e-5, "layer", count, count)
        yield f"layer norm, {post=}", partial(gpu.add_norm, *arguments, post=post)
    for act in ("relu", "relu2", "gelu", "gelu_new"):
        yield act, partial(gpu.activate, half(8, mlp), act, count)


def _linears(gpu, name, num_heads, num_kv, head_dim, hidden, mlp, whole):
    """Products alone, and with what stands before and after them, at one row, at most and more than are fused."""
    main = name == "Llama 3 8B"
    kinds = WEIGHTS if whole and main else ("bf16", "int8", "int4") if whole or main else ("bf16",)
    for kind, rows in itertools.product(kinds, (1, 64, 256) if main else (1, 64)):
        if not whole and rows == 64 and kind != "bf16":
            continue
        for dtype in (BF16, FP32) if whole and main and kind != "4 bits with zeros" else (BF16,):
            label = f"{name}, {kind}, {rows} rows of {dtype}"
            yield from _products(
                gpu, label, kind, rows, dtype, num_heads, num_kv, head_dim, hidden, mlp, whole
            )


def _products(gpu, label, kind, rows, dtype, num_heads, num_kv, head_dim, hidden, mlp, whole):
    def weight(outputs, inputs):
        made = WEIGHTS[kind](outputs, inputs)
        return made.to(dtype) if kind == "bf16" else made

    def features(size):
        return torch.empty(rows, size, dtype=dtype)

    count, x, residual = integers(1), features(hidden), features(hidden)
    sums = torch.empty(rows, -(-hidden // MOMENT_CHUNK))
    norm = RowNorm(torch.empty(hidden, dtype=dtype), 1e-6, sums)
    table, cache = torch.empty(4096, head_dim // 2), torch.empty(4096, num_kv, head_dim, dtype=dtype)
    heads, inner = num_heads * head_dim, 2 * mlp
    head_norm = None
    if "Qwen3" in label:
        head_norm = HeadNorm("rms", torch.empty(head_dim, dtype=dtype), torch.empty(head_dim, dtype=dtype))
    rotated = (num_heads, (table, table), integers(rows), head_norm, cache, cache, integers(rows), count)
    qkv, down = weight(heads + 2 * num_kv * head_dim, hidden), weight(hidden, mlp)

    # Many rows of a weight that is not quantised are the vendor's.
    if kind != "bf16" or rows <= 64:
        yield f"linear, {label}", partial(gpu.linear, x, weight(hidden, hidden), None)
        yield f"head, {label}", partial(gpu.linear, x, weight(128256, hidden), None, norm=norm)
    yield f"linear of a range, {label}", partial(gpu.linear, x, weight(hidden, hidden), None, (count, count))
    yield f"qkv, {label}", partial(gpu.linear_rope_store, x, qkv, None, *rotated, norm=norm)
    gated = (x, weight(inner, hidden), None, "silu", True, count)
    yield f"gate and up, {label}", partial(gpu.linear_activate, *gated, norm=norm)
    yield f"down, {label}", partial(gpu.linear_add, features(mlp), down, None, residual, sums, count)
    if not whole or dtype != BF16 or kind != "bf16" or rows > 64:
        return
    bias = torch.empty(hidden, dtype=dtype)
    yield (
        f"down of a range, {label}",
        partial(gpu.linear_add, features(mlp), down, bias, residual, None, count, start=count, scale=0.22),
    )
    plain = (x, weight(mlp, hidden), torch.empty(mlp, dtype=dtype), "gelu", False, count)
    yield f"up, {label}", partial(gpu.linear_activate, *plain)


def _attention(gpu, whole):
    shapes = [("Llama 3 8B", 32, 8, 128, BF16)]
    if whole:
        shapes += [("LLaMA 7B", 32, 32, 128, BF16), ("Phi-2", 32, 32, 80, BF16), ("64", 9, 3, 64, BF16)]
        shapes += [(f"256 features of {dtype}", 8, 2, 256, dtype) for dtype in (BF16, FP32)]
    for name, num_heads, num_kv, head_dim, dtype in shapes:
        kinds = [(None, None, None)]
        if whole and (head_dim > 128 or name == "Llama 3 8B"):
            sinks = torch.empty(num_heads, dtype=dtype)
            kinds += [(4096, None, None), (None, 50.0, sinks), (4096, 50.0, None)]
        query = torch.empty(64, num_heads, head_dim, dtype=dtype)
        cache = torch.empty(4096, num_kv, head_dim, dtype=dtype)
        for (rows, longest), kind in itertools.product(((8, 1), (8, 25)), kinds):
            table = (integers(8, 64), integers(8))
            batch = BatchTensors(integers(rows + 1), integers(rows), *table, integers(1), 16, longest, 1024)
            label = f"attention of {longest}, {name}, window {kind[0]}, softcap {kind[1]}"
            yield label, partial(gpu.attention, query, cache, cache, batch, 0.1, *kind)


def _sampling(gpu):
    logits, ids = torch.empty(4, 128256), torch.empty(4, 3, dtype=torch.int64)
    yield "soft cap", partial(gpu.soft_cap, half(4, 256000), 30.0)
    yield "greedy", partial(gpu.greedy, logits)
    yield "greedy of bf16", partial(gpu.greedy, half(4, 128256))
    yield "log-softmax", partial(gpu.log_softmax_gather, logits, ids)
    yield "sample", partial(gpu.sample_packed, logits, torch.empty(5, 4, dtype=torch.float64))


def _mixtures(gpu, whole):
    number, top_k, inner, hidden = 32, 4, 2880, 2880  # gpt-oss 20B
    count, sizes = integers(1), ((number * 2 * inner, hidden), (number * hidden, inner))
    for tokens in (1, 512) if whole else (1,):
        x, chosen = half(tokens, hidden), torch.empty(tokens, top_k, dtype=torch.int64)
        for kind in ("bf16", "int8", "int4") if whole else ("bf16", "int4"):
            up, down = (WEIGHTS[kind](*size) for size in sizes)
            weights = (up, half(number * 2 * inner), down, half(number * hidden))
            rest = (chosen, torch.empty(tokens, top_k), number, "clamped_swiglu", True, count)
            yield f"experts of {kind}, {tokens} tokens", partial(gpu.mix_experts, x, *weights, *rest)
