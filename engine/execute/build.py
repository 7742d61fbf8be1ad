"""Which executor runs steps on this machine, over how large a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sleb.engine.config import EngineConfig
from sleb.engine.execute.cpu import CpuExecutor, unsupported_feature
from sleb.engine.execute.eager import EagerExecutor
from sleb.engine.execute.executor import Executor, PlannedUnit, attention_blocks
from sleb.engine.execute.gpu_setup import GpuSetup, lacks_feature
from sleb.engine.execute.kv_cache import PagedKVCache, size_cache
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.decoder import Decoder
from sleb.engine.model.weights import DecoderWeights
from sleb.errors import ConfigError
from sleb.kernels.attention.select import (
    DEFAULT_PAGE_SIZE,
    AttentionBackend,
    choose_page_size,
    select_attention,
)
from sleb.kernels.registry import Kernels, select_kernels


@dataclass(frozen=True)
class Backends:
    """What computes on a device.

    Attributes:
        attention: on a GPU; None: the kernels bring their own.
        page_size: tokens in a KV page, as suits both.
    """

    device: torch.device
    kernels: Kernels
    attention: AttentionBackend | None
    page_size: int


def select_backends(
    config: EngineConfig, spec: DecoderSpec, device: torch.device, dtype: torch.dtype
) -> Backends:
    """The fastest that can be had of what `config` asks for; known before minutes are spent on loading.

    Raises ConfigError for kernels, an attention, a KV dtype or a page size that was asked for and cannot be had.
    """
    backends = _select(config, spec, device, dtype)
    _check_kv_dtype(config.kv_dtype, backends)
    return backends


def _check_kv_dtype(kv_dtype: str, backends: Backends) -> None:
    kernels, attention = backends.kernels, backends.attention
    triton = attention is not None and attention.name == "triton"
    usable = {"auto": True, "int8": kernels.cpu is not None, "fp8": triton}
    if usable[kv_dtype]:
        return
    needed = {"int8": "the C kernels", "fp8": "the attention of kernels triton"}[kv_dtype]
    why = f" ({kernels.why_slower})" if kernels.why_slower else ""
    beside = "" if attention is None else f" with attention {attention.name}"
    remedy = (
        "attention triton, or kv_dtype " if kv_dtype == "fp8" and kernels.gpu is not None else "kv_dtype "
    )
    remedy += " or ".join(each for each in usable if usable[each])
    raise ConfigError(
        f"kv_dtype '{kv_dtype}' goes with {needed}, and here kernels {kernels.name} compute{why}{beside}; use {remedy}"
    )


def _select(config: EngineConfig, spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> Backends:
    kernels = select_kernels(config.kernels, device, config.threads, config.cpu_affinity)
    lacking = lacks_feature(spec) if kernels.gpu is not None else None
    if kernels.gpu is not None and lacking is None:
        attention = select_attention(
            *(config.attention, kernels.gpu, device, dtype, spec.head_dim),
            softcap=spec.attention_softcap is not None,
            sinks=spec.sinks,
        )
        return Backends(device, kernels, attention, choose_page_size(config.page_size, attention))
    if config.attention not in ("auto", "torch"):
        raise ConfigError(
            f"attention '{config.attention}' goes with kernels triton, and here kernels {kernels.name} compute; "
            "use attention auto"
        )
    page_size = config.page_size or DEFAULT_PAGE_SIZE
    if kernels.cpu is not None:
        lacking = unsupported_feature(spec, page_size)
    if lacking is not None:
        if config.kernels == kernels.name:
            raise ConfigError(f"kernels '{kernels.name}' do not run {lacking}; use kernels auto or torch")
        # They still sample: that needs nothing of the model.
        kernels = replace(kernels, name="torch", cpu=None, gpu=None, why_slower=f"they lack {lacking}")
    return Backends(device, kernels, None, page_size)


@dataclass(frozen=True)
class BuiltExecutor:
    """An executor and its cache: num_pages pages hold a request of max_model_len tokens, the most that one may have."""

    executor: Executor
    max_model_len: int
    num_pages: int


def build_executor(
    config: EngineConfig,
    spec: DecoderSpec,
    weights: DecoderWeights,
    backends: Backends,
    plan: tuple[PlannedUnit, ...],
    depths: Sequence[int],
) -> BuiltExecutor:
    """The executor for `backends`, over as large a KV cache as `config` gives.

    plan: the sublayers and patches that any of `depths` runs, in order. Raises ConfigError for too little memory.
    """
    device, kernels, page_size = backends.device, backends.kernels, backends.page_size
    setup = None
    if kernels.gpu is not None and backends.attention is not None:
        setup = GpuSetup(
            *(config, spec, weights, kernels, kernels.gpu, backends.attention),
            *(plan, depths, page_size, device),
        )
    blocks = attention_blocks(plan)
    max_model_len, num_pages = size_cache(
        *(config, spec, len(blocks), page_size, weights.dtype, device),
        reserve=0 if setup is None else setup.reserve(),
    )
    executor: Executor
    if setup is not None:
        executor = setup.build(max_model_len, num_pages)
    elif kernels.cpu is not None:
        executor = CpuExecutor(
            kernels.cpu,
            spec,
            weights,
            plan,
            max_model_len=max_model_len,
            num_pages=num_pages,
            page_size=page_size,
            max_num_tokens=config.step_tokens,
            max_num_seqs=config.max_num_seqs,
            kv_dtype=config.kv_dtype,
        )
    else:
        decoder = Decoder(spec, weights, kernels, max_model_len, device)
        cache = PagedKVCache(spec, blocks, num_pages, page_size, weights.dtype, device)
        executor = EagerExecutor(decoder, cache, plan, page_size)
    return BuiltExecutor(executor, max_model_len, num_pages)
