"""The model on its device: loads what the served tiers keep, and turns a step into tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sleb.engine.config import EngineConfig
from sleb.engine.execute.cpu import CpuExecutor, why_unsupported
from sleb.engine.execute.executor import EagerExecutor, Executor, LastSampled, PlannedSublayer
from sleb.engine.execute.gpu_setup import build_gpu
from sleb.engine.execute.grammar_masks import fill_masks
from sleb.engine.execute.kv_cache import PagedKVCache, bytes_per_token, size_cache
from sleb.engine.execute.sampler import (
    PendingLogprobs,
    SampledBatch,
    SampledToken,
    Sampler,
    is_greedy,
)
from sleb.engine.execute.transfer import to_device
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.decoder import Decoder
from sleb.engine.model.loader import load_weights
from sleb.engine.model.resolve import resolve_device, resolve_dtype, resolve_weight_format
from sleb.engine.model.weights import DecoderWeights, all_sublayers, num_bytes
from sleb.engine.outputs import TokenLogprobs
from sleb.engine.requests.request import Request
from sleb.engine.schedule.step import ScheduledRow, Step
from sleb.errors import ConfigError
from sleb.kernels.attention.select import DEFAULT_PAGE_SIZE, AttentionBackend, select_attention
from sleb.kernels.registry import Kernels, select_kernels
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.units import Sublayer

# Rows of logits computed at once for prompt logprobs: 256 rows of 128k entries in float32 are 128 MiB.
_LOGPROB_ROWS = 256


@dataclass
class StepResult:
    """sampled: a token for each row that samples, in the step's order; prompt_logprobs: by request, in order."""

    sampled: dict[Request, SampledToken] = field(default_factory=dict)
    prompt_logprobs: dict[Request, list[TokenLogprobs]] = field(default_factory=dict)


@dataclass(frozen=True)
class LaunchedStep:
    """A step that is queued on the device, or done; `read` waits for what it has sampled."""

    step: Step
    requests: Sequence[Request]
    sampled: SampledBatch | list[int] | None
    prompt_logprobs: dict[Request, list[PendingLogprobs]]

    def read(self) -> StepResult:
        """The tokens and log-probabilities, on the host."""
        tokens: list[SampledToken] = []
        if isinstance(self.sampled, SampledBatch):
            tokens = self.sampled.read()
        elif self.sampled is not None:
            tokens = [SampledToken(token_id, None) for token_id in self.sampled]
        prompt = {
            request: [entry for part in parts for entry in part.read()]
            for request, parts in self.prompt_logprobs.items()
        }
        return StepResult(dict(zip(self.requests, tokens, strict=True)) if tokens else {}, prompt)


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
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        kernels = select_kernels(config.kernels, self.device, config.threads, config.cpu_affinity)
        attention = self._choose_attention(config, kernels)  # before minutes are spent on loading
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
        self._why_slower = kernels.note
        self.executor: Executor
        if attention is not None:
            built = build_gpu(config, spec, weights, kernels, attention, self._plan(keep), depths)
            self.executor, self.page_size = built.executor, built.page_size
            self.max_model_len, self.num_pages = built.max_model_len, built.num_pages
        else:
            self.page_size = config.page_size or DEFAULT_PAGE_SIZE
            num_blocks = sum(part == "attention" for _, part in keep)
            self.max_model_len, self.num_pages = size_cache(
                config, spec, num_blocks, self.page_size, self.dtype, self.device
            )
            self.executor = self._make_executor(config, kernels, weights, keep)
        self._weights_name = config.weights if resolve_weight_format(config.weights) else str(self.dtype)[6:]
        self._eos_token_ids = eos_token_ids
        self._sampler = Sampler(kernels, eos_token_ids)
        self._last_sampled: LastSampled | None = None

    def _choose_attention(self, config: EngineConfig, kernels: Kernels) -> AttentionBackend | None:
        """The attention of kernels for a GPU; None for other ones, which bring their own."""
        if kernels.gpu is not None:
            return select_attention(
                config.attention, kernels.gpu, self.device, self.dtype, self.spec.head_dim
            )
        if config.attention not in ("auto", "torch"):
            raise ConfigError(
                f"attention '{config.attention}' goes with kernels triton, and here kernels {kernels.name} compute; "
                "use attention auto"
            )
        return None

    def _make_executor(
        self, config: EngineConfig, kernels: Kernels, weights: DecoderWeights, keep: set[Sublayer]
    ) -> Executor:
        plan = self._plan(keep)
        if kernels.cpu is not None:
            lacking = why_unsupported(self.spec, self.page_size)
            if lacking is None:
                return CpuExecutor(
                    kernels.cpu,
                    self.spec,
                    weights,
                    plan,
                    max_model_len=self.max_model_len,
                    num_pages=self.num_pages,
                    page_size=self.page_size,
                    max_num_tokens=config.step_tokens,
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
        lacking = "C" if self.device.type == "cpu" else "Triton"
        reason = f" (no {lacking} kernels: {self._why_slower})" if self._why_slower else ""
        return f"{self.executor.description}, {self._weights_name} weights{reason}"

    def weight_bytes(self, depth: int) -> int:
        """Bytes of all weights that a request at `depth` uses, embedding and head included (once, if tied)."""
        sizes, kept = self._weight_sizes, self.kept_sublayers(depth)
        return sum(size for sublayer, size in sizes.items() if sublayer is None or sublayer in kept)

    def kv_bytes_per_token(self, depth: int) -> int:
        """Bytes of K and V that a token of a request at `depth` needs."""
        num_blocks = sum(part == "attention" for _, part in self.kept_sublayers(depth))
        return bytes_per_token(self.spec, num_blocks, self.dtype)

    def launch(self, step: Step) -> LaunchedStep:
        """Computes the step's tokens, then one token for every row that reaches its request's end.

        On a GPU this returns when the work is queued, behind that of the steps before.
        """
        if self.device.type == "cuda":  # the thread that steps may be another than the one that loaded
            torch.cuda.set_device(self.device)
        choosing = [row.chooses for row in step.rows]
        requests = [row.request for row, chooses in zip(step.rows, choosing, strict=True) if chooses]
        ends = itertools.accumulate(row.num_tokens for row in step.rows)
        last_tokens = [end - 1 for end, chooses in zip(ends, choosing, strict=True) if chooses]
        most_probable = all(map(is_greedy, requests))
        forward = self.executor.run(step, last_tokens, most_probable, self._last_sampled)
        prompt_logprobs = self._launch_prompt_logprobs(step, forward.hidden)
        sampled: SampledBatch | list[int] | None = None
        if isinstance(forward.greedy, Tensor):
            sampled = SampledBatch(forward.greedy)
        elif forward.greedy is not None:
            sampled = forward.greedy
        elif forward.logits is not None:
            masks = fill_masks(requests, self.spec.vocab_size, self._eos_token_ids)  # while a GPU computes
            sampled = self._sampler.sample(forward.logits, requests, masks)
        self._last_sampled = None
        if isinstance(sampled, SampledBatch):
            rows = {request: row for row, request in enumerate(requests)}
            self._last_sampled = LastSampled(sampled.token_ids, rows)
        return LaunchedStep(step, requests, sampled, prompt_logprobs)

    def _launch_prompt_logprobs(self, step: Step, hidden: Tensor) -> dict[Request, list[PendingLogprobs]]:
        gathered: dict[Request, list[PendingLogprobs]] = {}
        start = 0
        for row in step.rows:
            wanted = _prompt_logprob_range(row)
            if wanted:
                first, last = (start + position - row.start for position in (wanted.start, wanted.stop))
                gathered[row.request] = self._prompt_logprobs(row.request, hidden[first:last], wanted)
            start += row.num_tokens
        return gathered

    @torch.inference_mode()
    def _prompt_logprobs(self, request: Request, hidden: Tensor, positions: range) -> list[PendingLogprobs]:
        """Log-probabilities of the tokens that follow `positions`, whose hidden states are [P, E]."""
        top = request.params.prompt_logprobs or 0
        gathered: list[PendingLogprobs] = []
        for first in range(0, len(positions), _LOGPROB_ROWS):
            part = positions[first : first + _LOGPROB_ROWS]
            logits = self.executor.logits(hidden[first : first + len(part)])
            following = [request.tokens[position + 1] for position in part]
            token_ids = to_device(following, torch.int64, logits.device)
            gathered.append(self._sampler.logprobs(logits, token_ids, [top] * len(part)))
        return gathered

    def _plan(self, keep: set[Sublayer]) -> tuple[PlannedSublayer, ...]:
        order = sorted(keep)  # "attention" sorts before "mlp", as they run
        return tuple(PlannedSublayer(sublayer, self.layer_map.removed_at(*sublayer)) for sublayer in order)


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
