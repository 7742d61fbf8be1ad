"""The operators of a decoder whose row counts live on the device, as one record: plain torch, or Triton.

`sleb.kernels.reference.device` states what each computes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sleb.errors import ConfigError
from sleb.kernels.batch import BatchTensors
from sleb.kernels.quantization import Weight
from sleb.kernels.reference import device as fused_reference
from sleb.kernels.reference import ops as reference
from sleb.kernels.reference.ops import Numbers


class Attention(Protocol):
    """Causal attention of new tokens over paged context: query [T, H, D], caches [num_slots, K, D] to [T, H, D]."""

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: BatchTensors,
        scale: float,
        window: int | None,
    ) -> Tensor: ...


class AddNorm(Protocol):
    """See `sleb.kernels.reference.device.add_norm`."""

    def __call__(
        self,
        residual: Tensor,
        delta: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        kind: str,
        num_delta: Tensor | None,
        num_norm: Tensor,
        *,
        max_rows: int | None = None,
        post: bool = False,
    ) -> Tensor: ...


class RopeStore(Protocol):
    """See `sleb.kernels.reference.device.rope_store`."""

    def __call__(
        self,
        heads: Tensor,
        num_heads: int,
        rotation: tuple[Tensor, Tensor] | None,
        positions: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        eps: float,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        num_tokens: Tensor,
    ) -> Tensor: ...


@dataclass(frozen=True)
class FusedKernels:
    """Plain functions, chosen once, when the runner is built; `attention` is their own.

    See `sleb.kernels.attention.select`.
    """

    name: str
    add_norm: AddNorm
    rope_store: RopeStore
    gated_activate: Callable[[Tensor, str, Tensor], Tensor]
    activate: Callable[[Tensor, str, Tensor], Tensor]
    linear: Callable[[Tensor, Weight, Tensor | None], Tensor]
    attention: Attention
    greedy: Callable[[Tensor], Tensor]
    draw_packed: Callable[[Tensor, Tensor], Tensor]
    log_softmax_gather: Callable[[Tensor, Tensor], Tensor]
    tuning: Callable[[Callable[[str], None] | None], AbstractContextManager[None]]
    """Inside, operators that do not know their best configuration yet measure it; given each operator's name."""

    def draw(
        self,
        logits: Tensor,
        temperature: Numbers,
        top_k: Numbers,
        top_p: Numbers,
        min_p: Numbers,
        points: Numbers,
    ) -> Tensor:
        """Logits [B, V] to [B] int64, as `sleb.kernels.reference.ops.draw`; the numbers arrive in one copy."""
        columns = (temperature, top_k, top_p, min_p, points)
        numbers = torch.stack([torch.as_tensor(column, dtype=torch.float64) for column in columns])
        if logits.is_cuda and not numbers.is_cuda:
            numbers = numbers.pin_memory()  # from pageable memory the copy would wait for the device
        return self.draw_packed(logits, numbers.to(logits.device, non_blocking=True))


def torch_fused_kernels() -> FusedKernels:
    """The specification itself; its attention waits for the device, so it cannot be captured."""
    return FusedKernels(
        name="torch",
        add_norm=fused_reference.add_norm,
        rope_store=fused_reference.rope_store,
        gated_activate=fused_reference.gated_activate,
        activate=fused_reference.activate,
        linear=reference.linear,
        attention=fused_reference.paged_attention,
        greedy=reference.greedy,
        draw_packed=fused_reference.draw_packed,
        log_softmax_gather=reference.log_softmax_gather,
        tuning=lambda report: nullcontext(),
    )


def triton_fused_kernels() -> FusedKernels:
    """The Triton kernels. Raises ConfigError where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"kernels 'triton' need Triton, which cannot be imported ({error}); install it (pip install triton), or "
            "use kernels torch"
        ) from None
    from sleb.kernels.triton import (
        activation,
        add_norm,
        draw,
        greedy,
        paged_attention,
        quant_linear,
        rope_store,
        tuning,
    )

    return FusedKernels(
        name="triton",
        add_norm=add_norm.add_norm,
        rope_store=rope_store.rope_store,
        gated_activate=activation.gated_activate,
        activate=activation.activate,
        linear=quant_linear.quant_linear,
        attention=paged_attention.paged_attention,
        greedy=greedy.greedy,
        draw_packed=draw.draw_packed,
        log_softmax_gather=greedy.log_softmax_gather,
        tuning=tuning.tuning,
    )
