"""Which implementation of each operator runs: chosen once, when the runner is built, never in the hot path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb.errors import ConfigError
from sleb.kernels import reference
from sleb.kernels.batch import PagedBatch


@dataclass(frozen=True)
class Kernels:
    """The operators of the engine as plain functions; `sleb.kernels.reference` states what each computes."""

    name: str
    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    activate: Callable[[Tensor, str], Tensor]
    gated_activate: Callable[[Tensor, str], Tensor]
    store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_attention: Callable[[Tensor, Tensor, Tensor, PagedBatch, float, int | None], Tensor]
    greedy: Callable[[Tensor], Tensor]
    log_softmax_gather: Callable[[Tensor, Tensor], Tensor]


def _torch_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    return Kernels(
        name="torch",
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
    )


BACKENDS: dict[str, Callable[[torch.device, torch.dtype], Kernels]] = {"torch": _torch_kernels}


def select_kernels(name: str, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernel set called `name`, or the best one for this device and dtype when it is "auto".

    Raises ConfigError when there is none of that name; the message lists those that exist.
    """
    chosen = "torch" if name == "auto" else name
    if chosen not in BACKENDS:
        raise ConfigError(
            f"kernel backend '{name}' does not exist; choose one of: auto, {', '.join(BACKENDS)}"
        )
    return BACKENDS[chosen](device, dtype)
