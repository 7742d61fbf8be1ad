"""The model on its device: loads what the served tiers keep, and turns a step into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sleb.engine.architecture import DecoderSpec
from sleb.engine.config import EngineConfig, resolve_device, resolve_dtype
from sleb.engine.decoder import Decoder
from sleb.engine.executor import EagerExecutor, PlannedSublayer
from sleb.engine.kv_cache import PagedKVCache, bytes_per_token, choose_num_pages
from sleb.engine.loader import load_weights
from sleb.engine.outputs import TokenLogprobs
from sleb.engine.request import Request
from sleb.engine.sampler import SampledToken, Sampler
from sleb.engine.step import ScheduledRow, Step, StepInput
from sleb.engine.weights import all_sublayers, num_bytes
from sleb.errors import ConfigError
from sleb.kernels.registry import select_kernels
from sleb.layer_map import LayerMap
from sleb.units import Sublayer

# Rows of logits computed at once for prompt logprobs: 256 rows of 128k entries in float32 are 128 MiB.
_LOGPROB_ROWS = 256


@dataclass
class StepResult:
    """sampled: a token for each row that samples, in the step's order; prompt_logprobs: by request, in order."""

    sampled: dict[Request, SampledToken] = field(default_factory=dict)
    prompt_logprobs: dict[Request, list[TokenLogprobs]] = field(default_factory=dict)


class Runner:
    """Owns weights, KV cache and executor for the depths in `depths`.

    Attributes:
        max_model_len: tokens that one request may have; num_pages pages hold at least that many.
    """

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        spec: DecoderSpec,
        layer_map: LayerMap,
        depths: Sequence[int],
        eos_token_ids: frozenset[int],
    ) -> None:
        self.spec = spec
        self.layer_map = layer_map
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, config.weights, spec.checkpoint_dtype)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        kernels = select_kernels(config.kernels, self.device, self.dtype)
        keep = self.kept_sublayers(min(depths))
        self.weights = load_weights(
            path, spec, keep, self.dtype, self.device, config.load_format, config.seed or 0
        )
        blocks = sorted(block for block, part in keep if part == "attention")
        self.page_size = config.page_size
        self.max_model_len, self.num_pages = self._size_cache(config, len(blocks))
        self.decoder = Decoder(spec, self.weights, kernels, self.max_model_len, self.device)
        kv_cache = PagedKVCache(spec, blocks, self.num_pages, self.page_size, self.dtype, self.device)
        self._execute = EagerExecutor(self.decoder, kv_cache, self._plan(keep))
        self._sampler = Sampler(kernels, eos_token_ids)

    def kept_sublayers(self, depth: int) -> set[Sublayer]:
        """The sublayers that run at `depth`."""
        return {sublayer for sublayer in all_sublayers(self.spec) if self.layer_map.active(sublayer, depth)}

    def weight_bytes(self, depth: int) -> int:
        """Bytes of all weights that a request at `depth` uses, embedding and head included (once, if tied)."""
        kept = self.kept_sublayers(depth)
        unused = [
            weights
            for part, parts in (("attention", self.weights.attention), ("mlp", self.weights.mlp))
            for block, weights in parts.items()
            if (block, part) not in kept
        ]
        return num_bytes(self.weights) - num_bytes(unused)

    def kv_bytes_per_token(self, depth: int) -> int:
        """Bytes of K and V that a token of a request at `depth` needs."""
        num_blocks = sum(part == "attention" for _, part in self.kept_sublayers(depth))
        return bytes_per_token(self.spec, num_blocks, self.dtype)

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Computes the step's tokens, then one token for every row that reaches its request's end."""
        inputs = StepInput(step, self.page_size, self.device)
        hidden = self._execute(inputs)
        result = StepResult()
        start = 0
        last_tokens: list[int] = []
        for row in step.rows:
            wanted = _prompt_logprob_range(row)
            if wanted:
                rows = hidden[start + wanted.start - row.start : start + wanted.stop - row.start]
                result.prompt_logprobs[row.request] = self._prompt_logprobs(row.request, rows, wanted)
            start += row.num_tokens
            if row.samples and row.request.max_tokens > 0:
                last_tokens.append(start - 1)
        if last_tokens:
            requests = [row.request for row in step.rows if row.samples and row.request.max_tokens > 0]
            logits = self.decoder.logits(hidden[torch.tensor(last_tokens, device=self.device)])
            result.sampled = dict(zip(requests, self._sampler.sample(logits, requests), strict=True))
        return result

    def _prompt_logprobs(self, request: Request, hidden: Tensor, positions: range) -> list[TokenLogprobs]:
        """Log-probabilities of the tokens that follow `positions`, whose hidden states are [P, E]."""
        top = request.params.prompt_logprobs or 0
        gathered: list[TokenLogprobs] = []
        for first in range(0, len(positions), _LOGPROB_ROWS):
            part = positions[first : first + _LOGPROB_ROWS]
            logits = self.decoder.logits(hidden[first : first + len(part)])
            following = [request.tokens[position + 1] for position in part]
            gathered.extend(self._sampler.logprobs(logits, following, [top] * len(part)))
        return gathered

    def _plan(self, keep: set[Sublayer]) -> tuple[PlannedSublayer, ...]:
        order = sorted(keep)  # "attention" sorts before "mlp", as they run
        return tuple(PlannedSublayer(sublayer, self.layer_map.removed_at(*sublayer)) for sublayer in order)

    def _size_cache(self, config: EngineConfig, num_blocks: int) -> tuple[int, int]:
        """max_model_len and the number of pages; the pages hold a request of that length."""
        limit = self.spec.max_positions
        wanted = config.max_model_len or limit
        if wanted > limit:
            raise ConfigError(
                f"max_model_len is {wanted}, but the model has {limit} positions; ask for no more"
            )
        page_bytes = bytes_per_token(self.spec, num_blocks, self.dtype) * self.page_size
        pages_a_request = -(-wanted // self.page_size)
        num_pages = choose_num_pages(
            page_bytes,
            pages_a_request * config.max_num_seqs,
            config.kv_cache_memory,
            self.device,
            config.gpu_memory_utilization,
        )
        capacity = num_pages * self.page_size
        if config.max_model_len is not None and config.max_model_len > capacity:
            raise ConfigError(
                f"max_model_len is {wanted}, but the KV cache holds {capacity} tokens; "
                "lower it (--max-model-len) or give more memory (--kv-cache-memory)"
            )
        return min(wanted, capacity), num_pages


def _prompt_logprob_range(row: ScheduledRow) -> range:
    """Positions of the row whose successor's log-probability the request still wants.

    What was gathered before a preemption is not gathered twice.
    """
    request = row.request
    if request.prompt_logprobs is None:
        return range(0)
    first = max(row.start, len(request.prompt_logprobs) - 1)
    return range(first, min(row.end, request.num_prompt_tokens - 1))
