"""The KV tensors: one slot per kept attention sublayer, keyed by original block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sleb.engine.config import EngineConfig
from sleb.engine.memory import GIB, check_fits, free_memory
from sleb.engine.model.architecture import DecoderSpec
from sleb.errors import ConfigError

_CPU_MEMORY_SHARE = 0.25
_CPU_MEMORY_LIMIT = 8 * GIB


class PagedKVCache:
    """K and V of `blocks`, each [num_pages · page_size, K, D]; a token's slot is page · page_size + offset.

    dtype: torch.uint8 for bytes of e4m3, see `sleb.kernels.reference.ops.to_e4m3`.
    With several tiers a page spans the union of their kept attention sublayers. The memory starts as zeros, so
    that a masked position can never bring in a NaN.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        blocks: Sequence[int],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        shape = (len(blocks), num_pages * page_size, spec.num_kv_heads, spec.head_dim)
        self._keys = _zeros(shape, dtype, device)
        self._values = _zeros(shape, dtype, device)
        self._layers = {block: (self._keys[slot], self._values[slot]) for slot, block in enumerate(blocks)}

    def layer(self, block: int) -> tuple[Tensor, Tensor]:
        """Key and value cache of an original block, each [num_pages · page_size, K, D]."""
        return self._layers[block]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory, on a CPU, the system hands out only as pages are first written."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def bytes_per_token(spec: DecoderSpec, num_blocks: int, dtype: torch.dtype, kv_dtype: str) -> int:
    """Bytes of K and V that one token takes in `num_blocks` attention sublayers.

    kv_dtype: "auto" for `dtype`, "fp8", or "int8", which has a float32 scale a token and head.
    """
    if kv_dtype == "int8":
        return 2 * num_blocks * spec.num_kv_heads * (spec.head_dim + 4)
    return 2 * num_blocks * spec.kv_size * (1 if kv_dtype == "fp8" else dtype.itemsize)


def size_cache(
    config: EngineConfig,
    spec: DecoderSpec,
    num_blocks: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    reserve: int = 0,
) -> tuple[int, int]:
    """max_model_len and the number of pages for `num_blocks` attention sublayers; the pages hold a request that long.

    reserve: bytes of a GPU's free memory that are needed for something else. Raises ConfigError.
    """
    wanted, limit = config.max_model_len or spec.max_positions, spec.longest_context
    if wanted > limit:
        raise ConfigError(f"max_model_len is {wanted}, but the model has {limit} positions; ask for no more")
    num_pages = choose_num_pages(
        bytes_per_token(spec, num_blocks, dtype, config.kv_dtype) * page_size,
        -(-wanted // page_size) * config.max_num_seqs,
        config.kv_cache_memory,
        device,
        config.gpu_memory_utilization,
        reserve,
    )
    capacity = num_pages * page_size
    if config.max_model_len is not None and config.max_model_len > capacity:
        raise ConfigError(
            f"max_model_len is {wanted}, but the KV cache holds {capacity} tokens; "
            "lower it (--max-model-len) or give more memory (--kv-cache-memory)"
        )
    return min(wanted, capacity), num_pages


def choose_num_pages(
    page_bytes: int,
    max_useful_pages: int,
    memory: float | None,
    device: torch.device,
    gpu_memory_utilization: float,
    reserve: int = 0,
) -> int:
    """How many pages to allocate: what `memory` GiB hold, or a share of the free memory, at most what is useful.

    reserve: bytes of a GPU's memory, besides what is taken now, that must stay free of pages. Raises ConfigError when
    not one page fits.
    """
    if page_bytes == 0:  # a map that removes all attention needs page numbers, but no bytes
        return max_useful_pages
    if memory is not None:
        num_bytes = int(memory * GIB)
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        num_bytes = int(free - (1 - gpu_memory_utilization) * total) - reserve
    else:
        num_bytes = min(int(free_memory(device).num_bytes * _CPU_MEMORY_SHARE), _CPU_MEMORY_LIMIT)
    num_pages = min(num_bytes // page_bytes, max_useful_pages)
    if num_pages < 1:
        raise ConfigError(
            f"{num_bytes / GIB:.3f} GiB for the KV cache hold no page of {page_bytes} bytes; give more with "
            "kv_cache_memory (--kv-cache-memory) or gpu_memory_utilization (--gpu-memory-utilization), quantise the "
            "weights (--weights int8), or lower max_num_batched_tokens"
        )
    if memory is not None:  # else it is made of what is free
        remedy = "lower --kv-cache-memory, --max-model-len or --max-num-seqs, or quantise the weights (--weights int8)"
        check_fits("the KV cache takes", num_pages * page_bytes, device, remedy, ConfigError)
    return num_pages
