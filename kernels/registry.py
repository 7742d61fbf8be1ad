"""Which implementation of each operator runs: chosen once, when the runner is built, never in the hot path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sleb.errors import ConfigError
from sleb.kernels.batch import PagedBatch
from sleb.kernels.cpu.library import NativeKernels, NativeUnavailableError
from sleb.kernels.fused import FusedKernels, triton_fused_kernels
from sleb.kernels.quantization import Weight
from sleb.kernels.reference import ops as reference
from sleb.kernels.reference.ops import Numbers


@dataclass(frozen=True)
class Kernels:
    """The operators of the engine as plain functions; `sleb.kernels.reference.ops` states what each computes."""

    name: str
    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    linear: Callable[[Tensor, Weight, Tensor | None], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    activate: Callable[[Tensor, str], Tensor]
    gated_activate: Callable[[Tensor, str], Tensor]
    store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_attention: Callable[[Tensor, Tensor, Tensor, PagedBatch, float, int | None], Tensor]
    greedy: Callable[[Tensor], Tensor]
    log_softmax_gather: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[Tensor, Numbers, Numbers, Numbers, Numbers, Numbers], Tensor]
    native: NativeKernels | None = None
    """C kernels that run a whole step as one call; the functions above then serve what lies outside of steps."""
    fused: FusedKernels | None = None
    """Operators that read their row counts on the device; a step then runs on them."""
    note: str = ""
    """Why nothing faster was chosen."""


def _torch_kernels(note: str = "") -> Kernels:
    return Kernels(
        name="torch",
        note=note,
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
        draw=reference.draw,
    )


def _triton_kernels(device: torch.device) -> Kernels:
    from_triton = triton_fused_kernels()
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
        draw=from_triton.draw,
        fused=from_triton,
    )


BACKENDS = ("triton", "torch", "cpu")


def select_kernels(
    name: str, device: torch.device, num_threads: int | None = None, cpus: Sequence[int] | None = None
) -> Kernels:
    """The kernel set called `name`, or the best one for this device when it is "auto".

    num_threads, cpus: of the C kernels for a CPU, see `NativeKernels.load`. Raises ConfigError when there is none of
    that name, with those that exist, and when it cannot run here, with the reason.
    """
    if name not in ("auto", *BACKENDS):
        raise ConfigError(
            f"kernel backend '{name}' does not exist; choose one of: auto, {', '.join(BACKENDS)}"
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
            return _torch_kernels(note=str(reason))
    try:
        native = NativeKernels.load(num_threads, cpus=cpus)
    except NativeUnavailableError as reason:
        if name == "cpu":
            raise ConfigError(f"kernels 'cpu' cannot be used: {reason}; use kernels auto or torch") from None
        return _torch_kernels(note=str(reason))
    return replace(_torch_kernels(), name="cpu", native=native, draw=native.draw)
