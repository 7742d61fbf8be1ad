"""Residual add and RMSNorm or LayerNorm in one pass (Triton).

    residual[r] += scale · norm(delta[r])                       delta_start ≤ r < num_delta
    out[r] = norm(residual[r]) · weight + bias                  norm_start ≤ r < num_norm

    RMSNorm     x / sqrt(mean(x²) + eps)                        Zhang & Sennrich 2019, arXiv 1910.07467
    LayerNorm   (x − mean(x)) / sqrt(var(x) + eps)              Ba et al. 2016, arXiv 1607.06450
    none        x

Both ranges are read on the device: rows outside them stay as they are, so one captured launch serves any mix of depths.
What is added, and the sum, are rounded to the residual's dtype before the next step, as when all are done apart. The
residual's moments, sums of squares of 64 features each, are kept beside it for those who norm it as they read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.reference.device import MOMENT_CHUNK, RowNorm
from sleb.kernels.triton.runtime import (
    ceil_div,
    check_contiguous,
    launch_next,
    launch_options,
    pdl_launch,
    power_of_two,
    wait_for_previous,
)

_MAX_SIZE = 1 << 16  # features of a row that one program can hold
_NORM_BLOCK = 2048  # of them, where the sums of squares are there already
_CHUNK = tl.constexpr(MOMENT_CHUNK)


@triton.jit
def _normed(x, weight, bias, columns, size, eps,
            KIND: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """The norm of a row in float32; x is 0 past its size."""
    inside = columns < size
    if KIND == "layer":
        mean = tl.sum(x, axis=0) / size
        x = tl.where(inside, x - mean, 0.0)
    if KIND != "none":
        x *= 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / size + eps)
    if HAS_WEIGHT:
        x *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def store_moments(moments, row, x, size, BLOCK: tl.constexpr):
    """Those of a row x [BLOCK], which is 0 past its size."""
    x = x.to(tl.float32)
    num_chunks: tl.constexpr = (BLOCK + _CHUNK - 1) // _CHUNK
    sums = tl.sum(tl.reshape(x * x, (num_chunks, BLOCK // num_chunks)), axis=1)
    number = tl.cdiv(size, _CHUNK)
    chunk = tl.arange(0, num_chunks)
    tl.store(moments + row * number + chunk, sums, mask=chunk < number)


@triton.jit
def _moments(residual, moments, size, BLOCK: tl.constexpr):
    wait_for_previous()
    launch_next()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(residual + row * size + columns, mask=columns < size, other=0.0)
    store_moments(moments, row, x, size, BLOCK)


@triton.jit
def row_factors(moments, row, in_rows, size, eps, CHUNKS: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of rows [ROWS, 1] of `size` features."""
    number = tl.cdiv(size, _CHUNK)
    chunk = tl.arange(0, CHUNKS)[None, :]
    sums = tl.load(moments + row * number + chunk, mask=in_rows & (chunk < number), other=0.0)
    return (1.0 / tl.sqrt_rn(tl.sum(sums, axis=1) / size + eps))[:, None]


@triton.jit(do_not_specialize_on_alignment=["moments"])
def _norm_rows(x, moments, weight, out, size, eps,
               HAS_WEIGHT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    wait_for_previous()
    launch_next()
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < size
    factor = row_factors(moments, row, row >= 0, size, eps, CHUNKS)
    normed = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32) * factor
    if HAS_WEIGHT:
        normed *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["delta_start", "num_delta", "norm_start", "num_norm", "moments"])
def _add_norm(
    residual,
    delta,
    weight,
    bias,
    out,
    delta_start,
    num_delta,
    norm_start,
    num_norm,
    delta_weight,
    delta_bias,
    delta_scale,
    moments,
    size,
    eps,
    HAS_DELTA: tl.constexpr,
    HAS_DELTA_START: tl.constexpr,
    HAS_NORM_START: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    DELTA_KIND: tl.constexpr,
    HAS_DELTA_WEIGHT: tl.constexpr,
    HAS_DELTA_BIAS: tl.constexpr,
    HAS_DELTA_SCALE: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    POST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    launch_next()
    row = tl.program_id(0).to(tl.int64)
    is_normed = row < tl.load(num_norm)
    if HAS_NORM_START:
        is_normed &= row >= tl.load(norm_start)
    is_touched = is_normed
    if HAS_DELTA:
        is_added = row < tl.load(num_delta)
        if HAS_DELTA_START:
            is_added &= row >= tl.load(delta_start)
        is_touched |= is_added
    if not is_touched:
        return
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    at = row * size + columns
    x = tl.load(residual + at, mask=inside, other=0.0)
    if HAS_DELTA:
        dtype: tl.constexpr = residual.dtype.element_ty
        added = tl.load(delta + at, mask=inside & is_added, other=0.0)
        if DELTA_KIND != "none":
            added = _normed(added.to(tl.float32), delta_weight, delta_bias, columns, size, eps,
                            DELTA_KIND, HAS_DELTA_WEIGHT, HAS_DELTA_BIAS).to(dtype)  # fmt: skip
            added = tl.where(is_added, added, 0.0)  # a bias would be all that rows without an update get
        if HAS_DELTA_SCALE:
            added = (added.to(tl.float32) * delta_scale).to(dtype)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(dtype)
        is_kept = is_added
        if POST:
            is_kept &= not is_normed
        tl.store(residual + at, x, mask=inside & is_kept)
        if HAS_MOMENTS and is_kept:
            store_moments(moments, row, x, size, BLOCK)
    if not is_normed:
        return
    normed = _normed(x.to(tl.float32), weight, bias, columns, size, eps, KIND, HAS_WEIGHT, HAS_BIAS)
    normed = normed.to(out.dtype.element_ty)
    tl.store(out + at, normed, mask=inside)
    if HAS_MOMENTS and POST:
        store_moments(moments, row, normed, size, BLOCK)


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    num_delta: Tensor | None,
    num_norm: Tensor,
    *,
    delta_start: Tensor | None = None,
    norm_start: Tensor | None = None,
    max_rows: int | None = None,
    post: bool = False,
    delta_kind: str = "none",
    delta_weight: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_scale: float = 1.0,
    moments: Tensor | None = None,
) -> Tensor:
    """See `sleb.kernels.reference.device.add_norm`."""
    num_rows, size = residual.shape
    rows = num_rows if max_rows is None else max_rows
    check_contiguous(residual=residual, delta=delta, weight=weight, bias=bias)
    check_contiguous(delta_weight=delta_weight, delta_bias=delta_bias, moments=moments)
    assert size <= _MAX_SIZE, f"{size} features are more than {_MAX_SIZE}"
    out = residual if post else torch.empty_like(residual[:rows])
    grid_rows = max(rows, 0 if delta is None else delta.shape[0])
    if not grid_rows:
        return out
    block = power_of_two(size)
    _add_norm[(grid_rows,)](
        residual,
        delta if delta is not None else residual,
        weight if weight is not None else residual,
        bias if bias is not None else residual,
        out,
        delta_start if delta_start is not None else num_norm,
        num_delta if num_delta is not None else num_norm,
        norm_start if norm_start is not None else num_norm,
        num_norm,
        delta_weight if delta_weight is not None else residual,
        delta_bias if delta_bias is not None else residual,
        delta_scale,
        moments if moments is not None else residual,
        size,
        eps,
        HAS_DELTA=delta is not None,
        HAS_DELTA_START=delta_start is not None,
        HAS_NORM_START=norm_start is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        KIND=kind,
        DELTA_KIND=delta_kind,
        HAS_DELTA_WEIGHT=delta_weight is not None,
        HAS_DELTA_BIAS=delta_bias is not None,
        HAS_DELTA_SCALE=delta_scale != 1.0,
        HAS_MOMENTS=moments is not None,
        POST=post,
        BLOCK=block,
        **launch_options(min(16, max(1, block // 512))),
        **pdl_launch(residual.device),
    )
    return out


def moments(residual: Tensor) -> Tensor:
    """See `sleb.kernels.reference.device.moments`."""
    num_rows, size = residual.shape
    check_contiguous(residual=residual)
    out = torch.empty(num_rows, ceil_div(size, MOMENT_CHUNK), dtype=torch.float32, device=residual.device)
    if out.numel():
        block = power_of_two(size)
        options = launch_options(min(16, max(1, block // 512))) | pdl_launch(residual.device)
        _moments[(num_rows,)](residual, out, size, BLOCK=block, **options)
    return out


def norm_rows(x: Tensor, norm: RowNorm) -> Tensor:
    """The rows of x [M, E] normed; see `sleb.kernels.reference.device.RowNorm`."""
    num_rows, size = x.shape
    check_contiguous(x=x, weight=norm.weight, moments=norm.moments)
    out = torch.empty_like(x)
    if out.numel():
        block = min(power_of_two(size), _NORM_BLOCK)
        _norm_rows[(num_rows, ceil_div(size, block))](
            x,
            norm.moments,
            x if norm.weight is None else norm.weight,
            out,
            size,
            norm.eps,
            HAS_WEIGHT=norm.weight is not None,
            CHUNKS=power_of_two(norm.moments.shape[1]),
            BLOCK=block,
            **launch_options(),
            **pdl_launch(x.device),
        )
    return out
