"""The attention backends: flash-attn 2, 3 and 4 and torch's varlen attention, and their choice by name.

Without a GPU they are called through stand-ins: functions with the parameter lists of the real ones (read in their
sources), which refuse what the real ones refuse and compute in float32, one query at a time. With a GPU the real ones
are tested too, wherever they can be imported.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import random
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sleb.errors import ConfigError
from sleb.kernels.attention import flash, sdpa
from sleb.kernels.attention.select import (
    ATTENTION_BACKENDS,
    AttentionBackend,
    choose_page_size,
    select_attention,
)
from sleb.kernels.batch import BatchTensors
from sleb.kernels.reference import device as device_reference
from sleb.kernels.registry import torch_gpu_kernels

HEAD_DIM = 16  # of the stand-ins; real kernels are built for wider ones everywhere
REAL_HEAD_DIM = 64
CUDA = torch.device("cuda")
CPU = torch.device("cpu")

# (new tokens, context) of each sequence; contexts end before, at and after the borders of pages of 16 and of 256.
BATCHES = {
    "decode": ((1, 1), (1, 15), (1, 16), (1, 17), (1, 256), (1, 257), (1, 3)),
    "decode-one": ((1, 512),),
    "prefill": ((5, 5), (16, 16), (17, 17)),
    "chunks": ((7, 20), (3, 256), (16, 272), (2, 258)),
    "mixed": ((1, 30), (1, 256), (9, 25), (1, 1), (4, 4), (1, 257)),
}


class Case:
    """Sequences in scattered pages; with padding, sequences past num_rows whose numbers are junk or a dummy page's."""

    def __init__(
        self,
        lens,
        page_size,
        heads=(6, 3),
        padding=0,
        device=CPU,
        dtype=torch.bfloat16,
        filler=torch.nan,
        head_dim=HEAD_DIM,
    ):
        query_lens, context_lens = zip(*lens, strict=True)
        generator = torch.Generator().manual_seed(0)
        num_pages = [-(-length // page_size) for length in context_lens]
        order = list(range(1, sum(num_pages) + 3))  # page 0 is the dummy
        random.Random(0).shuffle(order)
        # A view into a wider table, as the engine's is; what is past a sequence's pages is no page.
        table = torch.full((len(lens) + padding, max(num_pages) + 4), 1 << 30, dtype=torch.int32)
        shape = ((sum(num_pages) + 3) * page_size, heads[1], head_dim)
        self.key_cache, self.value_cache = torch.full(shape, filler), torch.full(shape, filler)
        for row, (count, length) in enumerate(zip(num_pages, context_lens, strict=True)):
            pages = [order.pop() for _ in range(count)]
            table[row, :count] = torch.tensor(pages)
            slots = torch.cat([torch.arange(page_size) + page * page_size for page in pages])[:length]
            for cache in (self.key_cache, self.value_cache):
                cache[slots] = torch.randn(length, *shape[1:], generator=generator)
        num_tokens = sum(query_lens)
        starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
        if padding:
            table[len(lens) :, 0] = 0
            self.key_cache[:page_size] = self.value_cache[:page_size] = 0.0
        junk = torch.tensor([3, 1 << 20, 0, -5][:padding], dtype=torch.int32)
        self.query = torch.randn(num_tokens + padding, heads[0], head_dim, generator=generator).to(
            device, dtype
        )
        self.key_cache, self.value_cache = (
            cache.to(device, dtype) for cache in (self.key_cache, self.value_cache)
        )
        self.num_tokens, self.scale = num_tokens, 0.3
        self.batch = BatchTensors(
            query_starts=torch.cat((starts, junk)).to(device),
            context_lens=torch.tensor(
                [*context_lens, *[0, 1, 1, 0][:padding]], dtype=torch.int32, device=device
            ),
            # Backwards, behind a row of nobody's.
            page_table=torch.cat((table[:1] * 0 + (1 << 30), table.flip(0))).to(device)[:, : max(num_pages)],
            table_rows=torch.arange(len(table), 0, -1, dtype=torch.int32, device=device),
            num_rows=torch.tensor([len(lens)], dtype=torch.int32, device=device),
            page_size=page_size,
            max_query_len=max(query_lens),
            max_context_len=max(context_lens) + 5,
            has_decodes=1 in query_lens,
        )

    def run(self, attention, window=None, more=()):
        arguments = (self.query, self.key_cache, self.value_cache, self.batch, self.scale, window)
        result = attention(*arguments, *more)
        assert result.shape == self.query.shape and result.dtype == self.query.dtype
        return result[: self.num_tokens].float().cpu()

    def expected(self, window=None, more=()):
        """By the specification, in float32 from the same rounded numbers."""
        widened = (each.float() for each in (self.query, self.key_cache, self.value_cache))
        return device_reference.paged_attention(*widened, self.batch, self.scale, window, *more)[
            : self.num_tokens
        ].cpu()

    def check(self, attention, window=None, more=()):
        actual, expected = self.run(attention, window, more), self.expected(window, more)
        torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


# --- stand-ins -------------------------------------------------------------------------------------------------------


def int32(name, tensor, *shape):
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32, f"{name} must have dtype int32"
    assert tuple(tensor.shape) == shape, f"{name} must have shape {shape}, not {tuple(tensor.shape)}"
    assert tensor.stride(-1) == 1, f"{name} must have a contiguous last dimension"


def attend(
    q,
    k,
    v,
    table,
    lengths,
    starts,
    max_q,
    max_k,
    scale,
    causal,
    window,
    page_multiple,
    softcap=0.0,
    sinks=None,
):
    """The result [T, H, D] of a flash kernel over pages, with the checks that all of them share.

    q: [T, H, D]. window: (left, right), -1 without bound. max_q, max_k: None where not given.
    """
    with _disable_current_modes():  # what a kernel reads, it reads on its device
        assert q.dtype in (torch.float16, torch.bfloat16) and k.dtype == v.dtype == q.dtype
        assert k.dim() == 4 and k.shape == v.shape and q.shape[-1] == k.shape[-1]
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[1] % k.shape[2] == 0
        (num_pages, page_size), num_rows = k.shape[:2], len(lengths)
        assert page_size % page_multiple == 0, (
            f"Paged KV cache block size must be divisible by {page_multiple}"
        )
        assert num_rows > 0, "batch size must be positive"
        int32("table", table, num_rows, table.shape[1])
        int32("lengths", lengths, num_rows)
        int32("starts", starts, num_rows + 1)
        assert lengths.is_contiguous() and starts.is_contiguous()
        assert isinstance(scale, float) and causal in (True, False)
        assert isinstance(window, tuple) and all(type(side) is int for side in window)
        assert starts[0] == 0 and (starts.diff() >= 0).all() and starts[-1] <= len(q), starts
        assert max_q is None or (type(max_q) is int and max_q >= starts.diff().max())
        assert max_k is None or (type(max_k) is int and max_k >= lengths.max())
        out = torch.full_like(q, torch.nan)
        for row in range(num_rows):
            begin, end, length = int(starts[row]), int(starts[row + 1]), int(lengths[row])
            assert 0 <= length <= table.shape[1] * page_size
            pages = table[row, : -(-length // page_size)].long()
            assert ((pages >= 0) & (pages < num_pages)).all(), "a page out of bounds is read"
            keys, values = (cache[pages].flatten(0, 1)[:length].float() for cache in (k, v))
            for token in range(begin, end):
                position = length - (end - token)  # aligned to the bottom right corner
                first = 0 if window[0] < 0 else max(0, position - window[0])
                last = length if window[1] < 0 else position + window[1] + 1
                last = min(last, position + 1) if causal else last
                group = q.shape[1] // k.shape[2]
                for head in range(q.shape[1]):
                    seen = keys[first:last, head // group]
                    scores = seen @ q[token, head].float() * scale
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sinks is not None:
                        scores = torch.cat((scores, sinks[head : head + 1].float()))
                    weights = scores.softmax(dim=0)[: last - first]
                    out[token, head] = weights @ values[first:last, head // group]
        return out


def side_by_side(q):
    """[S, 1, H, D] as [S, H, D], with the starts of its sequences."""
    assert q.dim() == 4 and q.shape[1] == 1
    return q[:, 0], torch.arange(len(q) + 1, dtype=torch.int32)


def unused(**arguments):
    given = [
        name for name, (value, default) in arguments.items() if value is not default and value != default
    ]
    assert not given, f"not expected: {given}"


# fmt: off
def kvcache_2(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):
    """flash_attn.flash_attn_with_kvcache of flash-attn 2.8.3."""
    unused(k=(k, None), v=(v, None), rotary_cos=(rotary_cos, None), rotary_sin=(rotary_sin, None),
           cache_batch_idx=(cache_batch_idx, None), cache_leftpad=(cache_leftpad, None),
           alibi_slopes=(alibi_slopes, None), lse=(return_softmax_lse, False))
    tokens, starts = side_by_side(q)
    return attend(tokens, k_cache, v_cache, block_table, cache_seqlens, starts, None, None, softmax_scale, causal,
                  window_size, 256, softcap)[:, None]


def varlen_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):
    """flash_attn.flash_attn_varlen_func of flash-attn 2.8.3."""
    unused(dropout_p=(dropout_p, 0.0), alibi_slopes=(alibi_slopes, None),
           return_attn_probs=(return_attn_probs, False))
    int32("cu_seqlens_k", cu_seqlens_k, *cu_seqlens_q.shape)
    with _disable_current_modes():
        assert cu_seqlens_k[0] == 0 and (cu_seqlens_k.diff() >= 0).all() and cu_seqlens_k.is_contiguous()
        lengths = cu_seqlens_k.diff()
    assert max_seqlen_q is not None and max_seqlen_k is not None
    return attend(q, k, v, block_table, lengths, cu_seqlens_q, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                  window_size, 256, softcap)


def kvcache_3(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):
    """flash_attn_interface.flash_attn_with_kvcache of flash-attn 3."""
    unused(k=(k, None), v=(v, None), qv=(qv, None), cache_batch_idx=(cache_batch_idx, None),
           leftpad=(cache_leftpad, None), cu_seqlens_k_new=(cu_seqlens_k_new, None), chunk=(attention_chunk, 0),
           lse=(return_softmax_lse, False))
    if cu_seqlens_q is None:
        q, starts = side_by_side(q)
    else:
        assert max_seqlen_q is not None, "max_seqlen_q must be provided if cu_seqlens_q is provided"
        assert q.dim() == 3
        starts = cu_seqlens_q
    out = attend(q, k_cache, v_cache, page_table, cache_seqlens, starts, max_seqlen_q, None, softmax_scale, causal,
                 window_size, 1, softcap)
    return out[:, None] if cu_seqlens_q is None else out


def varlen_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
):
    """flash_attn.cute.flash_attn_varlen_func of flash-attn 4.0.0.beta27."""
    assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
    unused(qv=(qv, None), seqused_q=(seqused_q, None), gather=(gather_kv_indices, None),
           num_splits=(num_splits, 1), lse=(return_lse, False))
    assert learnable_sink is None or (learnable_sink.dtype, len(learnable_sink)) == (torch.bfloat16, q.shape[-2])
    assert window_size == (None, None) or window_size[1] == 0
    window = (-1, -1) if window_size == (None, None) else window_size
    if cu_seqlens_q is None:
        tokens, starts = side_by_side(q)
    else:
        assert q.dim() == 3
        tokens, starts = q, cu_seqlens_q
    out = attend(tokens, k, v, page_table, seqused_k, starts, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                 window, 1, softcap, learnable_sink)
    return out.view(q.shape), None


def varlen_torch(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):
    """torch.nn.attention.varlen.varlen_attn of torch 2.13."""
    assert return_aux is None and num_splits == 1
    assert enable_gqa or query.shape[1] == key.shape[2]
    int32("cu_seq_k", cu_seq_k, *cu_seq_q.shape)
    if max_q == 1:  # the heads of a group are then swapped for queries, one a sequence
        assert len(query) == len(cu_seq_q) - 1
    return attend(query, key, value, block_table, seqused_k, cu_seq_q, max_q, max_k, scale, False, window_size, 256)
# fmt: on

STAND_INS = {
    2: ("flash_attn", {"flash_attn_with_kvcache": kvcache_2, "flash_attn_varlen_func": varlen_2}),
    3: ("flash_attn_interface", {"flash_attn_with_kvcache": kvcache_3, "flash_attn_varlen_func": varlen_2}),
    4: ("flash_attn.cute", {"flash_attn_varlen_func": varlen_4}),
}
VERSIONS = {2: "2.8.3", 3: "3", 4: "4"}


@pytest.fixture
def install(monkeypatch):
    """install(2, 4): those versions of flash-attn are there, as stand-ins, and no other."""

    def not_found(distribution):
        raise importlib.metadata.PackageNotFoundError(distribution)

    def put(*versions):
        for version, (name, functions) in STAND_INS.items():
            module = types.ModuleType(name)
            module.__dict__.update(functions)
            if version == 2:
                module.__version__ = "2.8.3"
            monkeypatch.setitem(sys.modules, name, module if version in versions else None)
        if 4 in versions and 2 not in versions:
            monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))

    monkeypatch.setattr(importlib.metadata, "version", not_found)
    return put


@pytest.fixture
def gpu(monkeypatch):
    """gpu(9, 0): the GPU's compute capability. What is tried on it is tried on the CPU."""
    try_on = flash.try_on
    monkeypatch.setattr(flash, "try_on", lambda device, *arguments: try_on(CPU, *arguments))

    def put(major, minor=0):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.version, "hip", None)

    return put


@pytest.fixture(params=[2, 3, 4, "torch"])
def backend(request, install):
    """Name, attention and the smallest page of every adapter, over its stand-in."""
    if request.param == "torch":
        return AttentionBackend("torch", sdpa.varlen_attention(varlen_torch), sdpa.PAGE_MULTIPLE)
    install(request.param)
    loaded = flash.LOADERS[request.param](())
    return AttentionBackend(loaded.version, loaded.attention, loaded.page_multiple)


# --- adapters --------------------------------------------------------------------------------------------------------


def pages_of(backend):
    return (256,) if backend.page_multiple == 256 else (16, 256)


@pytest.mark.parametrize("name", BATCHES)
def test_attention_is_that_of_the_reference(backend, name):
    for page_size in pages_of(backend):
        Case(BATCHES[name], page_size).check(backend.function)


@pytest.mark.parametrize("window", [1, 2, 16, 17, 300])
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_windows(backend, name, window):
    Case(BATCHES[name], max(16, backend.page_multiple)).check(backend.function, window)


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (9, 3)])
@pytest.mark.parametrize("name", ["decode", "chunks"])
def test_groups_of_heads(backend, name, heads):
    Case(BATCHES[name], max(16, backend.page_multiple), heads=heads).check(backend.function)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", ["decode", "decode-one", "chunks", "mixed"])
def test_sequences_past_num_rows_are_left_alone(backend, name, window):
    """Their query_starts are junk, their contexts empty or a dummy page's; nothing else is read for them."""
    Case(BATCHES[name], max(16, backend.page_multiple), padding=4).check(backend.function, window)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_soft_caps_and_sinks(install, version, name):
    """A cap by all of them, sinks by flash-attn 4, in whatever dtype they are stored."""
    install(version)
    attention, case = flash.LOADERS[version](()).attention, Case(BATCHES[name], 256)
    case.check(attention, 17, (1.25,))
    if version == 4:
        case.check(attention, None, (None, torch.linspace(-2, 3, 6).to(torch.float16)))


def test_more_or_fewer_tokens_than_rows(backend):
    """A buffer of queries may be longer than the rows laid out, or shorter when these are padded."""
    case = Case(BATCHES["decode"], max(16, backend.page_multiple), padding=3)
    whole, num_rows = case.batch, len(BATCHES["decode"])
    case.batch = replace(
        whole,
        query_starts=whole.query_starts[: num_rows + 1],
        context_lens=whole.context_lens[:num_rows],
        table_rows=whole.table_rows[:num_rows],
    )
    case.check(backend.function)
    case.batch, case.query = whole, case.query[:num_rows]
    case.check(backend.function)


def test_nothing_to_compute(backend):
    case = Case(BATCHES["decode"], 256)
    empty = replace(
        case.batch,
        query_starts=case.batch.query_starts[:1],
        context_lens=case.batch.context_lens[:0],
        table_rows=case.batch.table_rows[:0],
        max_query_len=0,
    )
    result = backend.function(case.query[:0], case.key_cache, case.value_cache, empty, 1.0, None)
    assert result.shape == (0, *case.query.shape[1:])


class NoReads(TorchDispatchMode):
    """Refuses what waits for a device: a number, or a size, that the host reads from a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in (
            "_local_scalar_dense",
            "item",
            "nonzero",
            "is_nonzero",
            "equal",
            "masked_select",
        ), name
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_the_host_reads_nothing(backend, name):
    case = Case(BATCHES[name], max(16, backend.page_multiple), padding=2)
    with NoReads():
        case.run(backend.function)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():  # the reference does
        case.run(device_reference.paged_attention)


# --- selection -------------------------------------------------------------------------------------------------------


def select(name, device=CUDA, dtype=torch.bfloat16, head_dim=HEAD_DIM, kernels="torch", **needs):
    found = replace(torch_gpu_kernels(), name=kernels)
    return select_attention(name, found, device, dtype, head_dim, **needs)


def test_the_attention_has_what_the_model_needs(install, gpu, monkeypatch):
    """Sinks are flash-attn 4's alone, caps those of versions with that argument; torch's own kernel has neither."""
    gpu(9)
    install(2, 3, 4)
    assert select("flash", softcap=True).name == "flash-attn 3"
    assert select("flash", sinks=True).name == "flash-attn 4"
    assert select("auto", kernels="triton", sinks=True, softcap=True).name == "triton"
    install(2, 3)
    with pytest.raises(
        ConfigError, match=r"3 has no attention sinks.*2 has no attention sinks.*: auto, torch"
    ):
        select("flash", sinks=True)
    monkeypatch.setattr("sleb.kernels.attention.select.find_varlen", lambda *arguments: varlen_torch)
    for needs, why in (({"softcap": True}, "soft caps"), ({"sinks": True}, "attention sinks")):
        backend = select("torch", **needs)
        assert backend.name == f"torch sdpa (torch varlen has no {why})" and not backend.capturable
    old = types.ModuleType("flash_attn")
    # fmt: off
    old.flash_attn_with_kvcache = lambda q, k, v, cache_seqlens, block_table, window_size, softmax_scale, causal: q
    old.flash_attn_varlen_func = lambda q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, \
        window_size, softmax_scale, causal: q
    # fmt: on
    install()
    monkeypatch.setitem(sys.modules, "flash_attn", old)
    gpu(8)
    assert select("flash").name == "flash-attn 2"
    with pytest.raises(ConfigError, match="no argument softcap: it is too old"):
        select("flash", softcap=True)


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        (8, (2, 3, 4), 2),
        (9, (2, 3, 4), 3),
        (9, (2, 4), 4),
        (9, (4,), 4),
        (9, (2,), 2),
        (10, (2, 3, 4), 4),
        (10, (2, 3), 2),
        (11, (2, 4), 4),
        (12, (2, 3, 4), 2),
    ],
)
def test_the_version_of_flash_attn(install, gpu, capability, installed, chosen):
    install(*installed)
    gpu(capability)
    backend = select("flash")
    assert backend.name == f"flash-attn {VERSIONS[chosen]}"
    assert backend.capturable
    assert backend.page_multiple == (256 if chosen == 2 else 1)
    Case(BATCHES["mixed"], 256).check(backend.function)


NO_KERNELS = "CUDA error: no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    ("capability", "installed", "lacking", "chosen", "remedy"),
    [
        # A wheel of flash-attn 2 that CUDA before 12.8 built knows 8 and 9; of flash-attn 4 a GPU's compiler may fail.
        ((12, 0), (2,), (2,), None, "FLASH_ATTN_CUDA_ARCHS=120 pip install flash-attn"),
        ((10, 0), (2,), (2,), None, "pip install flash-attn-4"),
        ((10, 0), (2, 4), (2,), 4, None),
        ((10, 0), (2, 4), (4,), 2, None),
        ((10, 3), (2, 4), (2, 4), None, "pip install flash-attn-4"),
        # One that was built for 8 alone.
        ((9, 0), (2, 3), (2,), 3, None),
        ((9, 0), (2, 3), (3,), 2, None),
        ((9, 0), (2,), (2,), None, "FLASH_ATTN_CUDA_ARCHS=90 pip install flash-attn"),
        ((8, 9), (2, 3, 4), (2,), None, "FLASH_ATTN_CUDA_ARCHS=80 pip install flash-attn"),
    ],
)
@pytest.mark.parametrize("of", ["decode", "prompts"])
def test_one_that_was_not_built_for_this_gpu(
    install, gpu, monkeypatch, capability, installed, lacking, chosen, remedy, of
):
    """It can be imported, and its first launch fails: the next one is chosen, or how to have one is told."""
    install(*installed)
    gpu(*capability)

    def without_kernels(function):
        def call(*arguments, **named):
            wanted = 4 if arguments[0].dim() == 4 else 3  # [S, 1, H, D] of decode, [T, H, D] of prompts
            if (wanted == 4) == (of == "decode"):
                raise RuntimeError(f"{NO_KERNELS}\nCompile with TORCH_USE_CUDA_DSA")
            return function(*arguments, **named)

        call.__signature__ = inspect.signature(function)
        return call

    for version in lacking:
        name, functions = STAND_INS[version]
        for function in functions:
            monkeypatch.setattr(sys.modules[name], function, without_kernels(functions[function]))
    if chosen is None:
        with pytest.raises(ConfigError) as caught:
            select("flash", kernels="triton")
        said = str(caught.value)
        assert f"does not run on this GPU ({NO_KERNELS})" in said and remedy in said and "DSA" not in said
        assert said.endswith("choose one of: auto, triton, torch")
    else:
        assert select("flash").name == f"flash-attn {VERSIONS[chosen]}"
    assert select("auto", kernels="triton").name == "triton"


def test_flash_attn_4_on_wide_heads(install, gpu):
    install(2, 4)
    gpu(10)
    assert select("flash", head_dim=128).name == "flash-attn 4"
    assert select("flash", head_dim=256).name == "flash-attn 2.8.3"
    install(4)
    with pytest.raises(ConfigError, match="flash-attn 4 takes head dimensions up to 128 here, not 256"):
        select("flash", head_dim=256)


def test_an_early_flash_attn_4_is_passed_over(install, gpu, monkeypatch):
    """flash-attn 2.8.3 has a folder flash_attn/cute whose function knows no max_seqlen_q."""
    install(2, 4)
    gpu(10)

    def early(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None, page_table=None, window_size=None
    ):
        raise AssertionError

    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_varlen_func", early)
    assert select("flash").name == "flash-attn 2.8.3"
    install(4)
    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_varlen_func", early)
    with pytest.raises(ConfigError, match="no argument max_seqlen_q, max_seqlen_k: it is too old"):
        select("flash")


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"device": CPU}, "does not run on cpu"),
        ({"dtype": torch.float32}, "float16 and bfloat16, not in float32"),
        ({"head_dim": 288}, "up to 256, not 288"),
        ({"head_dim": 100}, "multiples of 8 up to 256, not 100"),
    ],
)
def test_what_flash_attn_does_not_compute(install, gpu, asked, complaint):
    install(2, 3, 4)
    gpu(9)
    with pytest.raises(
        ConfigError, match=f"'flash' cannot be used: .*{complaint}.*; choose one of: auto, torch$"
    ):
        select("flash", **asked)


def test_an_old_gpu_and_nothing_installed(install, gpu):
    install()
    gpu(7, 5)
    with pytest.raises(ConfigError, match=r"compute capability 8.0 or newer, not 7.5"):
        select("flash")
    gpu(9)
    with pytest.raises(
        ConfigError,
        match=r"flash-attn 3: .*flash-attn 4: .*flash-attn 2: .*pip install flash-attn .*: auto, torch",
    ):
        select("flash")


def test_triton_is_that_of_the_triton_kernels(install, gpu):
    install(2)
    gpu(8)
    for name in ("auto", "triton"):
        backend = select(name, kernels="triton")
        assert backend.name == "triton" and backend.page_multiple == 1 and backend.capturable
        assert backend.function is torch_gpu_kernels().attention
    with pytest.raises(ConfigError, match=r"kernels torch are in use; choose one of: auto, flash, torch$"):
        select("triton")
    with pytest.raises(ConfigError, match=r"choose one of: auto, torch$"):
        select("triton", device=CPU)


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_sdpa_is_the_fallback(name):
    backend = select(name, device=CPU, dtype=torch.float32)
    assert backend.name == "torch sdpa" and not backend.capturable and choose_page_size(None, backend) == 16
    case = Case(BATCHES["mixed"], 16, padding=2)
    case.check(backend.function, window=20)


def test_torch_varlen_where_it_takes_pages(gpu, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    gpu(9)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_torch)
    backend = select("torch", dtype=torch.float16)
    assert backend.name == "torch varlen" and backend.page_multiple == 256
    Case(BATCHES["mixed"], 256, dtype=torch.float16).check(backend.function)
    assert select("auto").name == "torch sdpa"
    assert select("torch", dtype=torch.float32).name == "torch sdpa"
    assert select("torch", head_dim=300).name == "torch sdpa"
    gpu(7, 5)
    assert select("torch").name == "torch sdpa"
    gpu(9)
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: query
    )
    assert select("torch").name == "torch sdpa"


def test_importing_needs_neither_triton_nor_flash_attn():
    absent = ("triton", "flash_attn", "flash_attn_interface")
    program = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\nimport sleb.kernels.attention.select"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_unknown_names():
    with pytest.raises(
        ConfigError, match=f"'xformers' does not exist.*auto, {', '.join(ATTENTION_BACKENDS)}"
    ):
        select("xformers")


@pytest.mark.parametrize(
    ("multiple", "wanted", "page_size"), [(1, None, 16), (256, None, 256), (256, 512, 512), (1, 7, 7)]
)
def test_page_sizes(multiple, wanted, page_size):
    assert (
        choose_page_size(wanted, AttentionBackend("x", device_reference.paged_attention, multiple))
        == page_size
    )


@pytest.mark.parametrize(("wanted", "suggested"), [(16, 256), (257, 512), (0, 256), (-3, 256)])
def test_page_sizes_that_do_not_suit(wanted, suggested):
    backend = AttentionBackend("flash-attn 2.8.3", device_reference.paged_attention, page_multiple=256)
    with pytest.raises(
        ConfigError, match=f"page_size {wanted} .*flash-attn 2.8.3.*multiple of 256; use {suggested}"
    ):
        choose_page_size(wanted, backend)


# --- on a GPU -------------------------------------------------------------------------------------------------------


def real_attention(name):
    """An attention that is installed here, with its page multiple; skips where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if name == "torch":
        found = sdpa.find_varlen(CUDA, torch.bfloat16, REAL_HEAD_DIM)
        if found is None:
            pytest.skip("no varlen attention over pages in this torch")
        return found, sdpa.PAGE_MULTIPLE
    module, _ = STAND_INS[name]
    pytest.importorskip(module, exc_type=ImportError)
    major = torch.cuda.get_device_capability()[0]
    if major not in {2: (8, 9, 10, 11, 12), 3: (9,), 4: (9, 10, 11)}[name]:
        pytest.skip(f"flash-attn {name} is not used on compute capability {major}")
    try:
        loaded = flash.LOADERS[name](())
    except flash.FlashUnavailableError as reason:
        pytest.skip(str(reason))
    return loaded.attention, loaded.page_multiple


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("window", [None, 1, 17])
@pytest.mark.parametrize("heads", [(6, 3), (3, 3), (8, 1)])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", [2, 3, 4, "torch"])
def test_real_attention(name, batch, heads, window, padding):
    attention, multiple = real_attention(name)
    case = Case(BATCHES[batch], max(16, multiple), heads, padding, CUDA, filler=0.0, head_dim=REAL_HEAD_DIM)
    case.check(attention, window)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("name", [2, 3, 4, "torch"])
def test_real_decode_in_a_graph(name, window):
    """The captured decode path follows lengths and queries that change between replays."""
    attention, multiple = real_attention(name)
    case = Case(
        BATCHES["decode"], max(16, multiple), padding=4, device=CUDA, filler=0.0, head_dim=REAL_HEAD_DIM
    )
    arguments = (case.query, case.key_cache, case.value_cache, case.batch, case.scale, window)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attention(*arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attention(*arguments)
    case.query.copy_(torch.randn_like(case.query))
    case.batch.context_lens[:3] -= torch.tensor([0, 9, 15], dtype=torch.int32, device=CUDA)
    graph.replay()
    torch.testing.assert_close(
        result[: case.num_tokens].float().cpu(), case.expected(window), atol=1e-2, rtol=1e-2
    )
