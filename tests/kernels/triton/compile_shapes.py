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
# One of each kind of matrix product: mma.sync (with little shared memory), wgmma, tcgen05.
KINDS = (89, 90, 100)
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

# (model, weights, rows, dtype of x): one row, the most that are fused, and the largest tile.
_MOST = [
    *(("Llama 3 8B", kind, rows, BF16) for kind in ("bf16", "int8", "int4") for rows in (1, 256)),
    *(("Llama 3 8B", "bf16", 64, BF16), ("Llama 3 8B", "int4", 64, BF16)),
    *(("Llama 3 8B", kind, 256, FP32) for kind in ("bf16", "int8")),
    *(("Llama 3 8B", kind, 16, BF16) for kind in ("4 bits with zeros", "8 bits from the middle")),
    *((name, "bf16", 1, BF16) for name in ("Qwen3 0.6B", "LLaMA 7B", "Phi-2")),
]
PRODUCTS = {
    "usual": [("Llama 3 8B", *each, BF16) for each in (("bf16", 1), ("int8", 256), ("int4", 1))],
    "configurations": [("Llama 3 8B", kind, 1, BF16) for kind in ("bf16", "int8", "int4")],
    "matrix": _MOST,
    "oldest": _MOST,
    "everything": [
        (name, kind, rows, dtype)
        for name, kind, rows, dtype in itertools.product(MODELS, WEIGHTS, (1, 64, 256), (BF16, FP32))
        if name == "Llama 3 8B" or (kind, dtype) == ("bf16", BF16)
    ],
}

MIXED = {
    "usual": ("bf16",),
    "configurations": ("bf16",),
    "everything": ("bf16", "int8", "int4"),
}  # kinds of experts


def cases(level):
    """(compute capability, whether all configurations, label, a function that launches) of a level.

    usual: a part, for two. matrix: every shape with the first configuration for all, and the other configurations of a
    part for KINDS; oldest: the former for two. everything: every shape and configuration for all.
    """
    archs = USUAL if level in ("usual", "oldest") else tuple(CARDS)
    for arch in archs:
        for label, work in _shapes(level):
            yield arch, level == "everything", label, work
        if level == "matrix" and arch in KINDS:
            for label, work in _shapes("configurations"):
                yield arch, True, label, work


def half(*shape):
    return torch.empty(shape, dtype=BF16, device=META)


def integers(*shape):
    return torch.empty(shape, dtype=torch.int32, device=META)


def _shapes(level):
    gpu = triton_gpu_kernels()
    whole = level not in ("usual", "configurations")
    main = "Llama 3 8B"
    if level != "configurations":
        for name, shape in MODELS.items() if whole else [(main, MODELS[main])]:
            yield from _small(gpu, name, *shape, whole)
        yield from _sampling(gpu)
    for name, kind, rows, dtype in PRODUCTS[level]:
        yield from _products(gpu, name, kind, rows, dtype, *MODELS[name], level)
    yield from _attention(gpu, whole)
    yield from _mixtures(gpu, level)


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
    tokens = integers(8)
    yield (
        f"embedding, {name}",
        partial(gpu.embed, tokens, half(32000, hidden), x, sums, pending=(tokens, tokens.long())),
    )
    yield f"gated, {name}", partial(gpu.gated_activate, half(8, 2 * mlp), "silu", count)
    yield f"rope, {name}", partial(gpu.rope_store, *rope, norm, *stored)
    in_bytes = torch.empty(cache.shape, dtype=torch.uint8)
    yield f"rope into fp8, {name}", partial(gpu.rope_store, *rope, norm, in_bytes, in_bytes, *stored[2:])
    if not whole:
        return
    yield f"norm of a range, {name}", partial(gpu.add_norm, x, x, None, None, *rms, **starts)
    scale = (x, x, weight, weight, 1e-6, "none", count, count)
    yield f"scale, {name}", partial(gpu.add_norm, *scale, **starts, post=True)
    embedding = Int8Weight.empty(32000, hidden, META), x, None
    yield (
        f"embedding in 8 bits, {name}",
        partial(gpu.embed, tokens, *embedding, learned=(tokens, half(64, hidden))),
    )
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


def _products(gpu, name, kind, rows, dtype, num_heads, num_kv, head_dim, hidden, mlp, level):
    """Products with what stands before and after them; alone, and of a range of rows, where that is worth it."""

    def weight(outputs, inputs):
        made = WEIGHTS[kind](outputs, inputs)
        return made.to(dtype) if kind == "bf16" else made

    def features(*shape):
        return torch.empty(shape, dtype=dtype)

    label = f"{name}, {kind}, {rows} rows of {dtype}"
    count, x, residual = integers(1), features(rows, hidden), features(rows, hidden)
    sums = torch.empty(rows, -(-hidden // MOMENT_CHUNK))
    norm = RowNorm(features(hidden), 1e-6, sums)
    table, cache = torch.empty(4096, head_dim // 2), features(4096, num_kv, head_dim)
    head_norm = HeadNorm("rms", features(head_dim), features(head_dim)) if name.startswith("Qwen3") else None
    rotated = (num_heads, (table, table), integers(rows), head_norm, cache, cache, integers(rows), count)
    qkv = weight((num_heads + 2 * num_kv) * head_dim, hidden)
    gated = (x, weight(2 * mlp, hidden), None, "silu", True, count)
    yield f"gate and up, {label}", partial(gpu.linear_activate, *gated, norm=norm)
    if level == "configurations" and kind != "bf16":
        return
    yield f"qkv, {label}", partial(gpu.linear_rope_store, x, qkv, None, *rotated, norm=norm)
    if name != "Llama 3 8B":
        return
    if kind == "bf16" and rows == 1:
        in_bytes = torch.empty(cache.shape, dtype=torch.uint8)
        stored = (*rotated[:4], in_bytes, in_bytes, *rotated[6:])
        yield f"qkv into fp8, {label}", partial(gpu.linear_rope_store, x, qkv, None, *stored, norm=norm)
    add = (features(rows, mlp), weight(hidden, mlp), None, residual, sums, count)
    yield f"down, {label}", partial(gpu.linear_add, *add)
    yield f"head, {label}", partial(gpu.linear, x, weight(128256, hidden), None, norm=norm)
    if kind != "bf16" or level == "configurations":
        return
    # As of patches, and of GPT-2.
    square, bias = weight(hidden, hidden), features(hidden)
    yield f"linear of a range, {label}", partial(gpu.linear, x, square, None, (count, count))
    if level != "usual" and rows <= 64:
        ranged = partial(gpu.linear_add, x, square, bias, residual, None, count, start=count, scale=0.22)
        yield f"sum of a range, {label}", ranged
        yield f"up, {label}", partial(gpu.linear_activate, x, square, bias, "gelu", False, count)
        yield f"linear, {label}", partial(gpu.linear, x, square, bias)


def _attention(gpu, whole):
    shapes = [("Llama 3 8B", 32, 8, 128, BF16)]
    if whole:
        shapes += [("LLaMA 7B", 32, 32, 128, BF16), ("Phi-2", 32, 32, 80, BF16), ("64", 9, 3, 64, BF16)]
        shapes += [(f"256 features of {dtype}", 8, 2, 256, dtype) for dtype in (BF16, FP32)]
    shapes = [(*shape, shape[-1]) for shape in shapes] + [("fp8", 32, 8, 128, BF16, torch.uint8)]
    for name, num_heads, num_kv, head_dim, dtype, stored in shapes:
        kinds = [(None, None, None)]
        if whole and dtype == BF16 and (head_dim > 128 or name == "Llama 3 8B"):
            kinds += [(4096, None, None), (4096, 50.0, torch.empty(num_heads, dtype=dtype))]
        query = torch.empty(64, num_heads, head_dim, dtype=dtype)
        cache = torch.empty(4096, num_kv, head_dim, dtype=stored)
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


def _mixtures(gpu, level):
    number, top_k, inner, hidden = 32, 4, 2880, 2880  # gpt-oss 20B
    count, sizes = integers(1), ((number * 2 * inner, hidden), (number * hidden, inner))
    for tokens in (1,) if level in ("usual", "configurations") else (1, 512):
        x, chosen = half(tokens, hidden), torch.empty(tokens, top_k, dtype=torch.int64)
        for kind in MIXED.get(level, ("bf16", "int4")):
            up, down = (WEIGHTS[kind](*size) for size in sizes)
            weights = (up, half(number * 2 * inner), down, half(number * hidden))
            rest = (chosen, torch.empty(tokens, top_k), number, "clamped_swiglu", True, count)
            yield f"experts of {kind}, {tokens} tokens", partial(gpu.mix_experts, x, *weights, *rest)
