"""Attention by an installed flash-attn 2, 3 or 4, imported when it is chosen (Dao 2023, arXiv 2307.08691).

All of them read the paged cache in place. What they ask for, besides float16 or bfloat16 and head dimensions that are
multiples of 8:

    flash-attn 2    `flash_attn`            compute capability 8 and newer, pages of a multiple of 256 tokens
    flash-attn 3    `flash_attn_interface`  compute capability 9
    flash-attn 4    `flash_attn.cute`       compute capability 9, 10 and 11; head dimensions up to 128 from 10 on

All of them cap scores, from flash-attn 2.6 on; sinks are known to flash-attn 4 alone.

An installed one need not have this GPU's kernels: flash-attn 2 is built for the architectures of FLASH_ATTN_CUDA_ARCHS
(by default 80, 90, 100 and 120, of which CUDA before 12.8 knows the first two), and one that is built for 80 runs on
every GPU of 8.x and on no other. So each is tried on the GPU before it is chosen.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sleb.kernels.batch import BatchTensors, PagedBatch
from sleb.kernels.registry import Attention

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_MAX_HEAD_DIM_4 = 128  # from compute capability 10 on; its kernel for 256 takes no lengths of contexts

Function: TypeAlias = Callable[..., Any]


class FlashUnavailableError(Exception):
    """A version of flash-attn that cannot be used here; the message says why."""


@dataclass(frozen=True)
class Flash:
    """An imported flash-attn: its version for people, and its attention."""

    version: str
    attention: Attention
    page_multiple: int = 1


@dataclass(frozen=True)
class PagedCall:
    """What the kernels of this family are called with.

    Attributes:
        query: [T, H, D], or [S, 1, H, D] where every sequence has one new token.
        keys, values: [num_pages, page_size, K, D].
        context_lens: [S] int32. page_table: [S, width] int32.
        starts: [S + 1] int32, index of each sequence's first token; None where every sequence has one new token.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    context_lens: Tensor
    page_table: Tensor
    starts: Tensor | None
    max_query_len: int
    max_context_len: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.keys, self.values

    def arguments(self, unbounded: int | None = -1) -> dict[str, Any]:
        """What all versions of flash-attn call by the same names; unbounded: how they write no window."""
        arguments: dict[str, Any] = {
            "softmax_scale": self.scale,
            "causal": True,
            "window_size": (unbounded, unbounded) if self.window is None else (self.window - 1, 0),
        }
        if self.starts is not None:
            arguments |= {"cu_seqlens_q": self.starts, "max_seqlen_q": self.max_query_len}
        if self.softcap is not None:
            arguments["softcap"] = self.softcap
        if self.sinks is not None:
            arguments["learnable_sink"] = self.sinks.to(torch.bfloat16)  # which is all that it takes
        return arguments

    def context_starts(self) -> Tensor:
        """[S + 1] int32: where contexts would begin, were they side by side."""
        return F.pad(self.context_lens.cumsum(0, dtype=torch.int32), (1, 0))


def paged_attention_by(kernel: Callable[[PagedCall], Any]) -> Attention:
    """The attention that calls `kernel`, which returns the result, or a tuple that begins with it.

    Nothing waits for the device. Result rows that belong to no sequence of the batch are unspecified.
    """

    def attention(
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: BatchTensors,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        num_tokens, num_rows = query.shape[0], batch.context_lens.shape[0]
        if not (num_tokens and num_rows and batch.max_query_len):  # which the kernels refuse
            return torch.empty_like(query)
        decode = batch.max_query_len == 1
        rows = min(num_tokens, num_rows) if decode else num_rows
        result = kernel(
            PagedCall(
                # The sequence at row r then has token r, also where rows are padding.
                query=query[:rows, None] if decode else query,
                keys=key_cache.unflatten(0, (-1, batch.page_size)),
                values=value_cache.unflatten(0, (-1, batch.page_size)),
                context_lens=batch.context_lens[:rows],
                page_table=batch.gathered_table(rows),
                starts=None if decode else _starts(batch),
                max_query_len=batch.max_query_len,
                max_context_len=batch.max_context_len,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
        )
        attended: Tensor = result[0] if isinstance(result, tuple) else result
        if attended.shape[0] == num_tokens:
            return attended.reshape(query.shape)
        padded = torch.empty_like(query)
        padded[:rows] = attended.reshape(rows, *query.shape[1:])
        return padded

    return attention


def _starts(batch: BatchTensors) -> Tensor:
    """The batch's query_starts, where sequences past num_rows begin at the end of the last one: they have no tokens."""
    rows = torch.arange(batch.query_starts.shape[0], dtype=torch.int32, device=batch.query_starts.device)
    return batch.query_starts.index_select(0, torch.minimum(rows, batch.num_rows))


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no kernel of this family computes this, whatever is installed; None where one may."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs a CUDA GPU, and does not run on {device}"
    if dtype not in _DTYPES:
        return f"it computes in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        return f"it takes head dimensions that are multiples of 8 up to {_MAX_HEAD_DIM}, not {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, not {major}.{minor}"
    return None


def load_flash(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool = False, sinks: bool = False
) -> Flash:
    """The best flash-attn that is installed and runs, for a GPU, dtype and head dimension that `why_not` lets pass.

    softcap, sinks: whether scores are capped, and heads have sinks. Raises FlashUnavailableError with the reasons of
    all that were tried, and how to have one.
    """
    major = torch.cuda.get_device_capability(device)[0]
    # Paged caches are refused by flash-attn 4 on 8 and 12, and the kernels of flash-attn 3 are for 9.
    order = {9: (3, 4, 2), 10: (4, 2), 11: (4, 2)}.get(major, (2,))
    reasons = []
    for version in order:
        if version == 4 and major > 9 and head_dim > _MAX_HEAD_DIM_4:
            reasons.append(f"flash-attn 4 takes head dimensions up to {_MAX_HEAD_DIM_4} here, not {head_dim}")
            continue
        if sinks and version != 4:
            reasons.append(f"flash-attn {version} has no attention sinks")
            continue
        try:
            flash = LOADERS[version](("softcap",) * softcap + ("learnable_sink",) * sinks)
            try_on(device, dtype, head_dim, flash, softcap, sinks)
            return flash
        except FlashUnavailableError as reason:
            reasons.append(f"flash-attn {version}: {reason}")
    raise FlashUnavailableError(f"{'; '.join(reasons)} ({_remedy(order, major, sinks)})")


def _remedy(order: Sequence[int], major: int, sinks: bool) -> str:
    if sinks and 4 not in order:
        return "attention triton knows sinks on every GPU"
    of_2 = f"FLASH_ATTN_CUDA_ARCHS={10 * major} pip install flash-attn --no-build-isolation --no-binary flash-attn"
    return f"to install flash-attn: {'pip install flash-attn-4' if 4 in order[:1] or sinks else of_2}"


def try_on(
    device: torch.device, dtype: torch.dtype, head_dim: int, flash: Flash, softcap: bool, sinks: bool
) -> None:
    """Attention of a new token over itself, and of two. Raises FlashUnavailableError where the GPU does not do it."""
    page_size = max(16, flash.page_multiple)
    zeros = partial(torch.zeros, dtype=dtype, device=device)
    cache = zeros(page_size, 1, head_dim)
    for count in (1, 2):
        only_page = torch.zeros(1, 1, dtype=torch.int64)
        batch = BatchTensors.of(PagedBatch((count,), (count,), only_page, page_size), device)
        more = (30.0 if softcap else None, zeros(1) if sinks else None)
        try:
            flash.attention(zeros(count, 1, head_dim), cache, cache, batch, 1.0, None, *more)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # of CUDA, of its checks, of a compiler
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FlashUnavailableError(f"it is installed and does not run on this GPU ({reason})") from None


def _load_2(more: tuple[str, ...]) -> Flash:
    both = ("block_table", "window_size", *more)
    decode = _find("flash_attn", "flash_attn_with_kvcache", ("cache_seqlens", *both))
    varlen = _find("flash_attn", "flash_attn_varlen_func", ("cu_seqlens_k", *both))

    def kernel(call: PagedCall) -> Any:
        if call.starts is None:
            return decode(
                *call.tensors,
                cache_seqlens=call.context_lens,
                block_table=call.page_table,
                **call.arguments(),
            )
        return varlen(
            *call.tensors,
            cu_seqlens_k=call.context_starts(),
            max_seqlen_k=call.max_context_len,
            block_table=call.page_table,
            **call.arguments(),
        )

    return Flash(_version("flash_attn", "flash-attn", "2"), paged_attention_by(kernel), page_multiple=256)


def _load_3(more: tuple[str, ...]) -> Flash:
    # Its varlen function takes no pages; this one takes ragged queries too.
    arguments = ("cache_seqlens", "page_table", "cu_seqlens_q", "max_seqlen_q", "window_size", *more)
    function = _find("flash_attn_interface", "flash_attn_with_kvcache", arguments)

    def kernel(call: PagedCall) -> Any:
        return function(
            *call.tensors, cache_seqlens=call.context_lens, page_table=call.page_table, **call.arguments()
        )

    return Flash(_version("flash_attn_interface", "flash-attn-3", "3"), paged_attention_by(kernel))


def _load_4(more: tuple[str, ...]) -> Flash:
    # flash-attn 2.8 brings an early version of this module, without some of these.
    arguments = ("cu_seqlens_q", "max_seqlen_q", "max_seqlen_k", "seqused_k", "page_table", "window_size")
    function = _find("flash_attn.cute", "flash_attn_varlen_func", (*arguments, *more))

    def kernel(call: PagedCall) -> Any:
        return function(
            *call.tensors,
            seqused_k=call.context_lens,
            max_seqlen_k=call.max_context_len,
            page_table=call.page_table,
            **call.arguments(unbounded=None),
        )

    return Flash(_version("flash_attn.cute", "flash-attn-4", "4"), paged_attention_by(kernel))


LOADERS: dict[int, Callable[[tuple[str, ...]], Flash]] = {2: _load_2, 3: _load_3, 4: _load_4}
"""Version: what imports it, or raises FlashUnavailableError; given the names of arguments that it must have besides."""


def _find(module: str, name: str, arguments: tuple[str, ...]) -> Function:
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except Exception as error:  # an extension that was built for another torch fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FlashUnavailableError(f"module {module} cannot be imported ({reason})") from None
    missing = [argument for argument in arguments if argument not in inspect.signature(function).parameters]
    if missing:
        raise FlashUnavailableError(f"{module}.{name} has no argument {', '.join(missing)}: it is too old")
    return function


def _version(module: str, distribution: str, otherwise: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a build that was put on the path
        return str(getattr(importlib.import_module(module), "__version__", otherwise))
