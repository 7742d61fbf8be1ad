"""Attention by torch itself: its varlen attention over pages where that runs, else SDPA over gathered contexts."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from sleb.kernels.attention.flash import Function, PagedCall, paged_attention_by, why_not
from sleb.kernels.registry import Attention

PAGE_MULTIPLE = 256
"""Tokens of which a page of varlen attention is a multiple: torch's kernel is that of flash-attn 2."""


def find_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention | None:
    """Attention by `torch.nn.attention.varlen`; None where this torch or GPU has none that takes pages."""
    if why_not(device, dtype, head_dim) is not None:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # torch 2.11 has no pages there; without num_splits their results could not be relied on, see below.
    if not {"block_table", "seqused_k", "num_splits"} <= set(inspect.signature(varlen_attn).parameters):
        return None
    return varlen_attention(varlen_attn)


def varlen_attention(varlen: Function) -> Attention:
    """The attention that calls `varlen`, a function of the signature of `torch.nn.attention.varlen.varlen_attn`."""

    def kernel(call: PagedCall) -> Any:
        assert call.softcap is None and call.sinks is None, "it has neither"
        query, starts = call.query, call.starts
        if starts is None:
            query = query.squeeze(1)
            starts = torch.arange(query.shape[0] + 1, dtype=torch.int32, device=query.device)
        return varlen(
            query,
            call.keys,
            call.values,
            starts,
            call.context_starts(),
            call.max_query_len,
            call.max_context_len,
            scale=call.scale,
            # The window alone makes it causal.
            window_size=(-1 if call.window is None else call.window - 1, 0),
            enable_gqa=call.query.shape[-2] != call.keys.shape[-2],
            seqused_k=call.context_lens,
            block_table=call.page_table,
            # Several splits leave rows unwritten: https://github.com/pytorch/pytorch/issues/194167
            num_splits=1,
        )

    return paged_attention_by(kernel)
