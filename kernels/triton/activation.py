"""MLP activations (Triton), alone or gated, and the soft cap of logits.

    gated       activation(gate) · up, where gate and up are the halves of a row [2I]      arXiv 2002.05202
    clamped     g · sigmoid(1.702 g) · (u + 1), g = min(gate, 7), u = up clamped to ± 7    arXiv 2508.10925
    alone       activation(x)
    soft cap    c · tanh(x / c)                                                            arXiv 2408.00118

Computed in float32; of activations only the first num_rows rows, a number read on the device, are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.triton.runtime import (
    INTERPRETED,
    ceil_div,
    check_contiguous,
    launch_next,
    launch_options,
    pdl_launch,
    power_of_two,
    wait_for_previous,
)

# Name in a checkpoint's config -> the kernel's number. gelu: Hendrycks & Gimpel 2016, arXiv 1606.08415.
ACTIVATION_NUMBERS = {
    "silu": 0,
    "swish": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_new": 3,
    "gelu_pytorch_tanh": 3,
    "relu2": 4,
    "clamped_swiglu": 5,
}
_BLOCK = 1024


@triton.jit
def apply(x, ACTIVATION: tl.constexpr):
    """Of float32."""
    if ACTIVATION == 0:
        return x * tl.sigmoid(x)
    elif ACTIVATION == 1:
        return tl.where(x < 0.0, 0.0, x)  # not maximum, so that a NaN stays one
    elif ACTIVATION == 2:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 4:
        return tl.where(x < 0.0, 0.0, x * x)
    else:  # tanh(y) = 2 sigmoid(2y) − 1
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)


@triton.jit
def apply_gated(gate, up, ACTIVATION: tl.constexpr):
    """Of float32."""
    if ACTIVATION == 5:
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    else:
        return apply(gate, ACTIVATION) * up


@triton.jit(do_not_specialize_on_alignment=["num_rows"])
def _activate(x, out, num_rows, size, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_previous()
    launch_next()
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(num_rows):
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    if GATED:
        gate = tl.load(x + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
        result = apply_gated(gate, up, ACTIVATION)
    else:
        result = apply(tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _soft_cap(x, size, cap, BLOCK: tl.constexpr):
    wait_for_previous()
    launch_next()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32) / cap
    capped = (2.0 * tl.sigmoid(2.0 * scaled) - 1.0) * cap
    tl.store(x + at, capped.to(x.dtype.element_ty), mask=at < size)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """See `sleb.kernels.reference.device.soft_cap`."""
    check_contiguous(x=x)
    if x.numel():
        block = min(power_of_two(x.numel()), power_of_two(x.numel()) if INTERPRETED else _BLOCK)
        options = launch_options() | pdl_launch(x.device)
        _soft_cap[(ceil_div(x.numel(), block),)](x, x.numel(), cap, BLOCK=block, **options)
    return x


def gated_activate(gate_up: Tensor, activation: str, num_rows: Tensor) -> Tensor:
    """See `sleb.kernels.reference.device.gated_activate`."""
    return _launch(gate_up, activation, num_rows, gated=True)


def activate(x: Tensor, activation: str, num_rows: Tensor) -> Tensor:
    """See `sleb.kernels.reference.device.activate`."""
    return _launch(x, activation, num_rows, gated=False)


def _launch(x: Tensor, activation: str, num_rows: Tensor, gated: bool) -> Tensor:
    check_contiguous(x=x)
    rows, width = x.shape
    size = width // 2 if gated else width
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    block = min(power_of_two(size), power_of_two(size) if INTERPRETED else _BLOCK)
    _activate[(rows, ceil_div(size, block))](
        x,
        out,
        num_rows,
        size,
        GATED=gated,
        ACTIVATION=ACTIVATION_NUMBERS[activation],
        BLOCK=block,
        **launch_options(),
        **pdl_launch(x.device),
    )
    return out
