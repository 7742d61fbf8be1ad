"""Which implementation of each operator runs: chosen once, when the runner is built, never in the hot path.

`Kernels` are the operators of a decoder whose lengths the host knows (`sleb.kernels.reference.ops` states what each
computes), `GpuKernels` those of one whose row counts live on the device (`sleb.kernels.reference.device`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sleb.errors import ConfigError
from sleb.kernels.batch import BatchTensors, PagedBatch
from sleb.kernels.cpu.library import CpuKernels, CpuKernelsUnavailableError
from sleb.kernels.names import KERNELS
from sleb.kernels.quantization import Weight
from sleb.kernels.reference import device as device_reference
from sleb.kernels.reference import ops as reference
from sleb.kernels.reference.device import HeadNorm, RowNorm
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
        softcap: float | None = None,
        sinks: Tensor | None = None,
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
        delta_start: Tensor | None = None,
        norm_start: Tensor | None = None,
        max_rows: int | None = None,
        post: bool = False,
        delta_kind: str = "none",
        delta_weight: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_scale: float = 1.0,
        moments: Tensor | None = None,
    ) -> Tensor: ...


class Embed(Protocol):
    """See `sleb.kernels.reference.device.embed`."""

    def __call__(
        self,
        token_ids: Tensor,
        weight: Weight,
        out: Tensor,
        moments: Tensor | None,
        *,
        pending: tuple[Tensor, Tensor] | None = None,
        scale: float = 1.0,
        learned: tuple[Tensor, Tensor] | None = None,
    ) -> None: ...


class RangedLinear(Protocol):
    """See `sleb.kernels.reference.device.linear`."""

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        rows: tuple[Tensor, Tensor] | None = None,
        *,
        norm: RowNorm | None = None,
    ) -> Tensor: ...


class LinearActivate(Protocol):
    """See `sleb.kernels.reference.device.linear_activate`."""

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        activation: str,
        gated: bool,
        num_rows: Tensor,
        *,
        norm: RowNorm | None = None,
    ) -> Tensor: ...


class LinearAdd(Protocol):
    """See `sleb.kernels.reference.device.linear_add`."""

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        residual: Tensor,
        moments: Tensor | None,
        num_rows: Tensor,
        *,
        start: Tensor | None = None,
        scale: float = 1.0,
    ) -> None: ...


class LinearRopeStore(Protocol):
    """See `sleb.kernels.reference.device.linear_rope_store`."""

    def __call__(
        self,
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
    ) -> Tensor: ...


class RopeStore(Protocol):
    """See `sleb.kernels.reference.device.rope_store`."""

    def __call__(
        self,
        heads: Tensor,
        num_heads: int,
        rotation: tuple[Tensor, Tensor] | None,
        positions: Tensor,
        norm: HeadNorm | None,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        num_tokens: Tensor,
        clip: float | None = None,
    ) -> Tensor: ...


class MixExperts(Protocol):
    """See `sleb.kernels.reference.device.mix_experts`."""

    def __call__(
        self,
        x: Tensor,
        up: Weight,
        up_bias: Tensor | None,
        down: Weight,
        down_bias: Tensor | None,
        chosen: Tensor,
        shares: Tensor,
        num_experts: int,
        activation: str,
        gated: bool,
        num_rows: Tensor,
    ) -> Tensor: ...


@dataclass(frozen=True)
class GpuKernels:
    """The operators of steps on a GPU; `attention` is their own, `sleb.kernels.attention.select` knows others."""

    name: str
    embed: Embed
    add_norm: AddNorm
    rope_store: RopeStore
    gated_activate: Callable[[Tensor, str, Tensor], Tensor]
    activate: Callable[[Tensor, str, Tensor], Tensor]
    mix_experts: MixExperts
    soft_cap: Callable[[Tensor, float], Tensor]
    linear: RangedLinear
    linear_activate: LinearActivate
    linear_add: LinearAdd
    linear_rope_store: LinearRopeStore
    moments: Callable[[Tensor], Tensor]
    attention: Attention
    greedy: Callable[[Tensor], Tensor]
    sample_packed: Callable[[Tensor, Tensor], Tensor]
    log_softmax_gather: Callable[[Tensor, Tensor], Tensor]
    tuning: Callable[[Callable[[str], None] | None], AbstractContextManager[None]]
    """Inside, operators that do not know their best configuration yet measure it; given each operator's name."""
    tuning_bytes: int = 0
    """Of the GPU's memory, that measuring takes besides the operators' tensors."""
    fused_rows: int = 64
    """With more rows, norms and adds cost less beside one another than before and after their products."""

    def sample(
        self,
        logits: Tensor,
        temperature: Numbers,
        top_k: Numbers,
        top_p: Numbers,
        min_p: Numbers,
        points: Numbers,
    ) -> Tensor:
        """Logits [B, V] to [B] int64, as `sleb.kernels.reference.ops.sample`; the numbers arrive in one copy."""
        columns = (temperature, top_k, top_p, min_p, points)
        numbers = torch.stack([torch.as_tensor(column, dtype=torch.float64) for column in columns])
        if logits.is_cuda and not numbers.is_cuda:
            numbers = numbers.pin_memory()  # from pageable memory the copy would wait for the device
        return self.sample_packed(logits, numbers.to(logits.device, non_blocking=True))


@dataclass(frozen=True)
class Kernels:
    """The operators of the engine as plain functions."""

    name: str
    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    linear: Callable[[Tensor, Weight, Tensor | None], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    activate: Callable[[Tensor, str], Tensor]
    gated_activate: Callable[[Tensor, str], Tensor]
    store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_attention: Callable[
        [Tensor, Tensor, Tensor, PagedBatch, float, int | None, float | None, Tensor | None], Tensor
    ]
    greedy: Callable[[Tensor], Tensor]
    log_softmax_gather: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Numbers, Numbers, Numbers, Numbers, Numbers], Tensor]
    cpu: CpuKernels | None = None
    """C kernels that run a whole step as one call; the functions above then serve what lies outside of steps."""
    gpu: GpuKernels | None = None
    """Operators that read their row counts on the device; a step then runs on them."""
    why_slower: str = ""
    """Why nothing faster was chosen."""


def torch_gpu_kernels() -> GpuKernels:
    """The specification itself; its attention waits for the device, so it cannot be captured."""
    return GpuKernels(
        name="torch",
        embed=device_reference.embed,
        add_norm=device_reference.add_norm,
        rope_store=device_reference.rope_store,
        gated_activate=device_reference.gated_activate,
        activate=device_reference.activate,
        mix_experts=device_reference.mix_experts,
        soft_cap=device_reference.soft_cap,
        linear=device_reference.linear,
        linear_activate=device_reference.linear_activate,
        linear_add=device_reference.linear_add,
        linear_rope_store=device_reference.linear_rope_store,
        moments=device_reference.moments,
        attention=device_reference.paged_attention,
        greedy=reference.greedy,
        sample_packed=device_reference.sample_packed,
        log_softmax_gather=reference.log_softmax_gather,
        tuning=lambda report: nullcontext(),
    )


def triton_gpu_kernels() -> GpuKernels:
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
        embed,
        experts,
        greedy,
        linear,
        linear_rope,
        paged_attention,
        rope_store,
        sample,
        tuning,
    )

    return GpuKernels(
        name="triton",
        embed=embed.embed,
        add_norm=add_norm.add_norm,
        rope_store=rope_store.rope_store,
        gated_activate=activation.gated_activate,
        activate=activation.activate,
        mix_experts=experts.mix_experts,
        soft_cap=activation.soft_cap,
        linear=linear.linear,
        linear_activate=linear.linear_activate,
        linear_add=linear.linear_add,
        linear_rope_store=linear_rope.linear_rope_store,
        fused_rows=linear.FEW_ROWS,
        moments=add_norm.moments,
        attention=paged_attention.paged_attention,
        greedy=greedy.greedy,
        sample_packed=sample.sample_packed,
        log_softmax_gather=greedy.log_softmax_gather,
        tuning=tuning.tuning,
        tuning_bytes=tuning.MEASURE_BYTES,
    )


def _torch_kernels(why_slower: str = "") -> Kernels:
    return Kernels(
        name="torch",
        why_slower=why_slower,
        rms_norm=reference.rms_norm,
        layer_norm=reference.layer_norm,
        linear=reference.linear,
        rope=reference.rope,
        activate=reference.activate,
        gated_activate=reference.gated_activate,
        store_kv=reference.store_kv,
        paged_attention=reference.paged_attention,
        greedy=reference.greedy,
        log_softmax_gather=reference.log_softmax_gather,
        sample=reference.sample,
    )


def _triton_kernels(device: torch.device) -> Kernels:
    from_triton = triton_gpu_kernels()
    from sleb.kernels.triton.runtime import INTERPRETED

    if device.type != "cuda" and not INTERPRETED:
        raise ConfigError(
            f"kernels 'triton' do not run on {device}; use kernels auto, cpu or torch there "
            "(TRITON_INTERPRET=1 interprets them on a CPU, slowly, for tests)"
        )
    return replace(
        _torch_kernels(),
        name="triton",
        greedy=from_triton.greedy,
        log_softmax_gather=from_triton.log_softmax_gather,
        sample=from_triton.sample,
        gpu=from_triton,
    )


def select_kernels(
    name: str, device: torch.device, num_threads: int | None = None, cpus: Sequence[int] | None = None
) -> Kernels:
    """The kernel set called `name`, or the best one for this device when it is "auto".

    num_threads, cpus: of the C kernels for a CPU, see `CpuKernels.load`. Raises ConfigError when there is none of
    that name, with those that exist, and when it cannot run here, with the reason.
    """
    if name not in ("auto", *KERNELS):
        raise ConfigError(
            f"kernel backend '{name}' does not exist; choose one of: auto, {', '.join(KERNELS)}"
        )
    if name == "torch":
        return _torch_kernels()
    if name == "triton":
        return _triton_kernels(device)
    if device.type != "cpu":
        if name == "cpu":
            raise ConfigError(f"kernels 'cpu' do not run on {device}; use kernels auto, triton or torch")
        try:
            return _triton_kernels(device)
        except ConfigError as reason:
            return _torch_kernels(why_slower=str(reason))
    try:
        cpu = CpuKernels.load(num_threads, cpus=cpus)
    except CpuKernelsUnavailableError as reason:
        if name == "cpu":
            raise ConfigError(f"kernels 'cpu' cannot be used: {reason}; use kernels auto or torch") from None
        return _torch_kernels(why_slower=str(reason))
    return replace(_torch_kernels(), name="cpu", cpu=cpu, sample=cpu.sample)
