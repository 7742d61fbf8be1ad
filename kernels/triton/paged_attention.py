"""Attention over paged context by the Triton kernels: sequences with one new token by one, chunks by the other."""

from __future__ import annotations

import torch
from torch import Tensor

from sleb.kernels.batch import BatchTensors
from sleb.kernels.triton.paged_decode import paged_decode
from sleb.kernels.triton.paged_prefill import paged_prefill


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: BatchTensors,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `sleb.kernels.reference.device.paged_attention`; rows past the batch's last token are not written."""
    out = torch.empty_like(query)
    if batch.max_query_len > 1:
        paged_prefill(query, key_cache, value_cache, batch, scale, window, softcap, sinks, out)
    if batch.has_decodes:
        paged_decode(query, key_cache, value_cache, batch, scale, window, softcap, sinks, out)
    return out
