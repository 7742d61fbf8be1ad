"""Which attention runs on the GPU path: chosen by name once, when the runner is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sleb.errors import ConfigError
from sleb.kernels.attention.flash import FlashUnavailableError, load_flash, why_not
from sleb.kernels.attention.sdpa import PAGE_MULTIPLE, find_varlen
from sleb.kernels.names import ATTENTION_BACKENDS
from sleb.kernels.reference import device as device_reference
from sleb.kernels.registry import Attention, GpuKernels

DEFAULT_PAGE_SIZE = 16


@dataclass(frozen=True)
class AttentionBackend:
    """An attention and what it asks of its surroundings.

    Attributes:
        name: as shown to people: "triton", "flash-attn 2.8.3", "torch varlen", "torch sdpa".
        page_multiple: the page size must be a multiple of this.
        capturable: whether steps with one new token a sequence can be captured in a CUDA graph.
    """

    name: str
    function: Attention
    page_multiple: int = 1
    capturable: bool = True


def select_attention(
    name: str,
    kernels: GpuKernels,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: bool = False,
    sinks: bool = False,
) -> AttentionBackend:
    """The attention called `name`; "auto": that of `kernels`.

    "flash" is the best flash-attn that is installed, "torch" torch's varlen attention, or SDPA where that cannot run.
    softcap, sinks: whether the model caps its scores, and its heads have sinks, which not all of them know.
    Raises ConfigError when there is none of that name, with those that exist, and when it cannot run here, with the
    reason and what can.
    """
    if name not in ("auto", *ATTENTION_BACKENDS):
        known = ", ".join(("auto", *ATTENTION_BACKENDS))
        raise ConfigError(f"attention backend '{name}' does not exist; choose one of: {known}")
    if name == "auto":
        return _triton(kernels) if kernels.name == "triton" else _sdpa()
    try:
        if name == "triton":
            return _triton(kernels)
        if name == "flash":
            return _flash(device, dtype, head_dim, softcap, sinks)
    except _UnusableError as reason:
        usable = ", ".join(_usable(kernels, device, dtype, head_dim, softcap, sinks))
        raise ConfigError(
            f"attention backend '{name}' cannot be used: {reason}; choose one of: {usable}"
        ) from None
    if softcap or sinks:
        return _sdpa(f" (torch varlen has no {'attention sinks' if sinks else 'soft caps'})")
    varlen = find_varlen(device, dtype, head_dim)
    return _sdpa() if varlen is None else AttentionBackend("torch varlen", varlen, PAGE_MULTIPLE)


def choose_page_size(wanted: int | None, backend: AttentionBackend) -> int:
    """Tokens in a KV page: those wanted, or what suits the attention. Raises ConfigError where those wanted do not."""
    multiple = backend.page_multiple
    if wanted is None:
        return max(DEFAULT_PAGE_SIZE, multiple)
    if wanted < 1 or wanted % multiple:
        raise ConfigError(
            f"page_size {wanted} does not suit attention {backend.name}: it must be a positive multiple of "
            f"{multiple}; use {-(-max(wanted, 1) // multiple) * multiple}, leave page_size out, or choose another "
            "attention backend"
        )
    return wanted


class _UnusableError(Exception):
    """The message says why a backend cannot run here."""


def _triton(kernels: GpuKernels) -> AttentionBackend:
    if kernels.name != "triton":
        raise _UnusableError(f"it is part of kernels triton, and kernels {kernels.name} are in use")
    return AttentionBackend("triton", kernels.attention)


def _flash(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool, sinks: bool
) -> AttentionBackend:
    reason = why_not(device, dtype, head_dim)
    if reason is not None:
        raise _UnusableError(reason)
    try:
        flash = load_flash(device, dtype, head_dim, softcap, sinks)
    except FlashUnavailableError as error:
        raise _UnusableError(str(error)) from None
    return AttentionBackend(f"flash-attn {flash.version}", flash.attention, flash.page_multiple)


def _sdpa(why: str = "") -> AttentionBackend:
    return AttentionBackend(f"torch sdpa{why}", device_reference.paged_attention, capturable=False)


def _usable(
    kernels: GpuKernels, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool, sinks: bool
) -> list[str]:
    names = ["auto"]
    if kernels.name == "triton":
        names.append("triton")
    try:
        _flash(device, dtype, head_dim, softcap, sinks)
        names.append("flash")
    except _UnusableError:
        pass
    return [*names, "torch"]
