"""The model on its device: loads what the served tiers keep, and turns a step into tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sleb.engine.architecture import DecoderSpec
from sleb.engine.config import EngineConfig, resolve_device, resolve_dtype, resolve_weight_format
from sleb.engine.decoder import Decoder
from sleb.engine.executor import EagerExecutor, Executor, PlannedSublayer
from sleb.engine.kv_cache import PagedKVCache, bytes_per_token, choose_num_pages
from sleb.engine.loader import load_weights
from sleb.engine.native_executor import NativeExecutor, why_unsupported
from sleb.engine.outputs import TokenLogprobs
from sleb.engine.request import Request
from sleb.engine.sampler import SampledToken, Sampler, takes_most_probable
from sleb.engine.step import ScheduledRow, Step
from sleb.engine.weights import DecoderWeights, all_sublayers, num_bytes
from sleb.errors import ConfigError
from sleb.kernels.registry import Kernels, select_kernels
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
        kernels = select_kernels(config.kernels, self.device, config.num_threads, config.cpu_affinity)
        keep = self.kept_sublayers(min(depths))
        weights = load_weights(
            path,
            spec,
            keep,
            self.dtype,
            self.device,
            config.load_format,
            config.seed or 0,
            weight_format=resolve_weight_format(config.weights),
            on_progress=config.on_progress,
        )
        self._weight_sizes = _weight_sizes(weights)
        self.embed_row_bytes = num_bytes(weights.embed) // spec.vocab_size
        self.page_size = config.page_size
        num_blocks = sum(part == "attention" for _, part in keep)
        self.max_model_len, self.num_pages = self._size_cache(config, num_blocks)
        self._why_slower = kernels.note
        self.executor = self._make_executor(config, kernels, weights, keep)
        self._weights_name = config.weights if resolve_weight_format(config.weights) else str(self.dtype)[6:]
        self._sampler = Sampler(kernels, eos_token_ids)

    def _make_executor(
        self, config: EngineConfig, kernels: Kernels, weights: DecoderWeights, keep: set[Sublayer]
    ) -> Executor:
        plan = self._plan(keep)
        if kernels.native is not None:
            lacking = why_unsupported(self.spec, self.page_size)
            if lacking is None:
                return NativeExecutor(
                    kernels.native,
                    self.spec,
                    weights,
                    plan,
                    max_model_len=self.max_model_len,
                    num_pages=self.num_pages,
                    page_size=self.page_size,
                    max_num_tokens=config.max_num_batched_tokens,
                    max_num_seqs=config.max_num_seqs,
                )
            if config.kernels == kernels.name:
                raise ConfigError(f"kernels '{kernels.name}' do not run {lacking}; use kernels auto or torch")
            self._why_slower = f"they lack {lacking}"
            kernels = select_kernels("torch", self.device)
        blocks = sorted(block for block, part in keep if part == "attention")
        decoder = Decoder(self.spec, weights, kernels, self.max_model_len, self.device)
        kv_cache = PagedKVCache(self.spec, blocks, self.num_pages, self.page_size, self.dtype, self.device)
        return EagerExecutor(decoder, kv_cache, plan, self.page_size)

    def kept_sublayers(self, depth: int) -> set[Sublayer]:
        """The sublayers that run at `depth`."""
        return {sublayer for sublayer in all_sublayers(self.spec) if self.layer_map.active(sublayer, depth)}

    @property
    def description(self) -> str:
        """What computes, with which weights, and why nothing faster, in one line."""
        reason = f" (no C kernels: {self._why_slower})" if self._why_slower else ""
        return f"{self.executor.description}, {self._weights_name} weights{reason}"

    def weight_bytes(self, depth: int) -> int:
        """Bytes of all weights that a request at `depth` uses, embedding and head included (once, if tied)."""
        sizes, kept = self._weight_sizes, self.kept_sublayers(depth)
        return sum(size for sublayer, size in sizes.items() if sublayer is None or sublayer in kept)

    def kv_bytes_per_token(self, depth: int) -> int:
        """Bytes of K and V that a token of a request at `depth` needs."""
        num_blocks = sum(part == "attention" for _, part in self.kept_sublayers(depth))
        return bytes_per_token(self.spec, num_blocks, self.dtype)

    def run(self, step: Step) -> StepResult:
        """Computes the step's tokens, then one token for every row that reaches its request's end."""
        sampling = [row.samples and row.request.max_tokens > 0 for row in step.rows]
        requests = [row.request for row, samples in zip(step.rows, sampling, strict=True) if samples]
        ends = itertools.accumulate(row.num_tokens for row in step.rows)
        last_tokens = [end - 1 for end, samples in zip(ends, sampling, strict=True) if samples]
        forward = self.executor.run(step, last_tokens, all(map(takes_most_probable, requests)))
        result = StepResult()
        start = 0
        for row in step.rows:
            wanted = _prompt_logprob_range(row)
            if wanted:
                first, last = (start + position - row.start for position in (wanted.start, wanted.stop))
                rows = forward.hidden[first:last]
                result.prompt_logprobs[row.request] = self._prompt_logprobs(row.request, rows, wanted)
            start += row.num_tokens
        if forward.greedy is not None:
            chosen = [SampledToken(token_id, None) for token_id in forward.greedy]
            result.sampled = dict(zip(requests, chosen, strict=True))
        elif forward.logits is not None:
            result.sampled = dict(zip(requests, self._sampler.sample(forward.logits, requests), strict=True))
        return result

    @torch.inference_mode()
    def _prompt_logprobs(self, request: Request, hidden: Tensor, positions: range) -> list[TokenLogprobs]:
        """Log-probabilities of the tokens that follow `positions`, whose hidden states are [P, E]."""
        top = request.params.prompt_logprobs or 0
        gathered: list[TokenLogprobs] = []
        for first in range(0, len(positions), _LOGPROB_ROWS):
            part = positions[first : first + _LOGPROB_ROWS]
            logits = self.executor.logits(hidden[first : first + len(part)])
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


def _weight_sizes(weights: DecoderWeights) -> dict[Sublayer | None, int]:
    """Bytes of each kept sublayer; under None those that every depth uses: embedding, head, final norm."""
    sizes: dict[Sublayer | None, int] = {
        **{(block, "attention"): num_bytes(part) for block, part in weights.attention.items()},
        **{(block, "mlp"): num_bytes(part) for block, part in weights.mlp.items()},
    }
    sizes[None] = num_bytes(weights) - sum(sizes.values())
    return sizes


def _prompt_logprob_range(row: ScheduledRow) -> range:
    """Positions of the row whose successor's log-probability the request still wants.

    What was gathered before a preemption is not gathered twice.
    """
    request = row.request
    if request.prompt_logprobs is None:
        return range(0)
    first = max(row.start, len(request.prompt_logprobs) - 1)
    return range(first, min(row.end, request.num_prompt_tokens - 1))
