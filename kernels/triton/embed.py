"""The residual stream of a step's tokens: which token each is, its embedding, its place, and its moments (Triton).

    out[t] = scale · weight[token t] + table[place t]

A token that the host does not know yet is one of those that were sampled last. All of it is one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.quantization import Int8Weight, Weight
from sleb.kernels.reference import device as reference
from sleb.kernels.triton.add_norm import store_moments
from sleb.kernels.triton.runtime import (
    check_contiguous,
    launch_next,
    launch_options,
    pdl_launch,
    power_of_two,
    wait_for_previous,
)


@triton.jit(do_not_specialize_on_alignment=["token_ids", "sources", "sampled", "places", "table", "moments"])
def _embed(
    token_ids,
    sources,
    sampled,
    values,
    steps,
    places,
    table,
    out,
    moments,
    size,
    scale,
    HAS_PENDING: tl.constexpr,
    QUANTISED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    launch_next()
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row).to(tl.int64)
    if HAS_PENDING:
        source = tl.load(sources + row)
        if source >= 0:  # NO_TOKEN is below 0: the request has ended, and any token will do
            token = tl.maximum(tl.load(sampled + source).to(tl.int64), 0)
    column = tl.arange(0, BLOCK)
    inside = column < size
    dtype: tl.constexpr = out.dtype.element_ty
    x = tl.load(values + token * size + column, mask=inside, other=0)
    if QUANTISED:
        x = (x.to(tl.float32) * tl.load(steps + token)).to(dtype)
    if HAS_SCALE:
        x = (x.to(tl.float32) * scale).to(dtype)
    if HAS_TABLE:
        place = tl.load(places + row).to(tl.int64)
        x = (
            x.to(tl.float32) + tl.load(table + place * size + column, mask=inside, other=0.0).to(tl.float32)
        ).to(dtype)
    tl.store(out + row * size + column, x, mask=inside)
    if HAS_MOMENTS:
        store_moments(moments, row, x, size, BLOCK)


def embed(
    token_ids: Tensor,
    weight: Weight,
    out: Tensor,
    moments: Tensor | None,
    *,
    pending: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    learned: tuple[Tensor, Tensor] | None = None,
) -> None:
    """See `sleb.kernels.reference.device.embed`; a weight of groups is looked up by torch."""
    if not isinstance(weight, Tensor | Int8Weight):
        reference.embed(token_ids, weight, out, moments, pending=pending, scale=scale, learned=learned)
        return
    num_tokens, size = out.shape
    if not num_tokens:
        return
    values, steps = (weight.values, weight.scale) if isinstance(weight, Int8Weight) else (weight, weight)
    sources, sampled = pending or (token_ids, token_ids)
    places, table = learned or (token_ids, values)
    check_contiguous(values=values, out=out, moments=moments, table=table)
    block = power_of_two(size)
    _embed[(num_tokens,)](
        token_ids,
        sources,
        sampled,
        values,
        steps,
        places,
        table,
        out,
        out if moments is None else moments,
        size,
        scale,
        HAS_PENDING=pending is not None,
        QUANTISED=isinstance(weight, Int8Weight),
        HAS_SCALE=scale != 1.0,
        HAS_TABLE=learned is not None,
        HAS_MOMENTS=moments is not None,
        BLOCK=block,
        **launch_options(min(16, max(1, block // 512))),
        **pdl_launch(out.device),
    )
