"""Linear layers with what stands before and after them (Triton)."""

from __future__ import annotations

from torch import Tensor

from sleb.kernels.quantization import Weight
from sleb.kernels.reference.device import HeadNorm, RowNorm
from sleb.kernels.triton.activation import activate, gated_activate
from sleb.kernels.triton.add_norm import add_norm
from sleb.kernels.triton.quant_linear import quant_linear
from sleb.kernels.triton.rope_store import rope_store


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    rows: tuple[Tensor, Tensor] | None = None,
    *,
    norm: RowNorm | None = None,
) -> Tensor:
    """See `sleb.kernels.reference.device.linear`."""
    return quant_linear(x if norm is None else norm(x), weight, bias, rows)


def linear_activate(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    num_rows: Tensor,
    *,
    norm: RowNorm | None = None,
) -> Tensor:
    """See `sleb.kernels.reference.device.linear_activate`."""
    return (gated_activate if gated else activate)(linear(x, weight, bias, norm=norm), activation, num_rows)


def linear_add(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor,
    moments: Tensor | None,
    num_rows: Tensor,
    *,
    start: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """See `sleb.kernels.reference.device.linear_add`."""
    delta = linear(x, weight, bias)
    add_norm(
        *(residual, delta, None, None, 0.0, "none", num_rows, num_rows),
        delta_start=start,
        norm_start=start,
        post=True,
        delta_scale=scale,
        moments=moments,
    )


def linear_rope_store(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    num_heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    head_norm: HeadNorm | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    num_tokens: Tensor,
    clip: float | None = None,
    *,
    norm: RowNorm | None = None,
) -> Tensor:
    """See `sleb.kernels.reference.device.linear_rope_store`."""
    head_dim = key_cache.shape[-1]
    heads = linear(x, weight, bias, norm=norm).view(x.shape[0], weight.shape[0] // head_dim, head_dim)
    stored = (key_cache, value_cache, slots, num_tokens, clip)
    return rope_store(heads, num_heads, rotation, positions, head_norm, *stored)
