"""The model on its device: loads what the served tiers keep, and turns a step into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sleb.engine.config import EngineConfig
from sleb.engine.execute.build import build_executor, select_backends
from sleb.engine.execute.executor import LOGPROB_ROWS, Forward, PlannedUnit
from sleb.engine.execute.grammar_masks import fill_masks
from sleb.engine.execute.kv_cache import bytes_per_token
from sleb.engine.execute.sampler import PendingLogprobs, SampledBatch, SampledToken, Sampler
from sleb.engine.execute.step_arrays import NEVER, StepArrays
from sleb.engine.execute.transfer import to_device
from sleb.engine.memory import refusal_told
from sleb.engine.model.allocation import all_sublayers, allocate
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.loader import load_weights
from sleb.engine.model.resolve import (
    AS_STORED,
    make_current,
    resolve_device,
    resolve_dtype,
    resolve_weight_format,
)
from sleb.engine.model.weights import DecoderWeights, formats_of, num_bytes
from sleb.engine.outputs import TokenLogprobs
from sleb.engine.requests.request import Request
from sleb.engine.schedule.step import ScheduledRow, Step
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Sublayer


@dataclass
class StepResult:
    """sampled: a token for each row that samples, in the step's order; prompt_logprobs: by request, in order."""

    sampled: dict[Request, SampledToken] = field(default_factory=dict)
    prompt_logprobs: dict[Request, list[TokenLogprobs]] = field(default_factory=dict)


@dataclass(frozen=True)
class SampledStep:
    """A step whose tokens are chosen, or are queued to be on the device; `read` waits for them."""

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
        make_current(self.device)
        self.dtype = resolve_dtype(
            *(config.dtype, config.weights, spec.checkpoint_dtype, self.device), wide_range=spec.wide_range
        )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        backends = select_backends(config, spec, self.device, self.dtype)
        keep = self.kept_sublayers(min(depths))
        weight_format = resolve_weight_format(config.weights)
        self._kv_dtype = config.kv_dtype
        self._patches = self._served_patches(depths)
        weights = load_weights(
            path,
            spec,
            keep,
            self.dtype,
            self.device,
            config.load_format,
            config.seed or 0,
            weight_format=weight_format,
            as_stored=config.weights in AS_STORED,
            patches=self._patches,
            on_progress=config.on_progress,
        )
        # A head that is stored with values of its own is none that the config ties.
        self.spec = spec = replace(spec, tied_embeddings=weights.head.weight is weights.embed)
        self.weights_name = config.weights if weight_format else " and ".join(formats_of(weights))
        self._weight_sizes = _weight_sizes(weights)
        self._expert_bytes = {
            block: num_bytes([part.up, part.down]) for block, part in weights.mlp.items() if part.experts
        }
        self.embed_row_bytes = num_bytes(weights.embed) // spec.vocab_size
        remedy = "lower --kv-cache-memory, --max-num-seqs or --max-num-batched-tokens, or quantise (--weights int8)"
        with refusal_told("the KV cache and the steps", self.device, remedy):
            built = build_executor(config, spec, weights, backends, self._plan(keep), depths)
        self.executor, self._why_slower = built.executor, backends.kernels.why_slower
        self.max_model_len, self.num_pages = built.max_model_len, built.num_pages
        self._eos_token_ids = eos_token_ids
        self._sampler = Sampler(backends.kernels, eos_token_ids)
        self._last_sampled: Tensor | None = None  # [B] int64 on the device, of the step before
        self._last_rows: dict[Request, int] = {}  # the place of each request's token in it

    def kept_sublayers(self, depth: int) -> set[Sublayer]:
        """The sublayers that run at `depth`."""
        return {sublayer for sublayer in all_sublayers(self.spec) if self.layer_map.active(sublayer, depth)}

    @property
    def description(self) -> str:
        """What computes, with which weights, and why nothing faster, in one line."""
        lacking = "C" if self.device.type == "cpu" else "Triton"
        reason = f" (no {lacking} kernels: {self._why_slower})" if self._why_slower else ""
        return f"{self.executor.description}, {self.weights_name} weights{reason}"

    def num_parameters(self, depth: int) -> int:
        """Of all weights that a request at `depth` uses, whatever their format; patches left out."""
        weights, _ = allocate(self.spec, self.kept_sublayers(depth), torch.float32, torch.device("meta"))
        return num_bytes(weights) // torch.float32.itemsize

    def weight_bytes(self, depth: int) -> int:
        """Bytes of all weights that a request at `depth` uses: patches, embedding and head too (once, if tied)."""
        used = {*self.kept_sublayers(depth), *self.patches(depth), None}
        return sum(size for unit, size in self._weight_sizes.items() if unit in used)

    def expert_bytes(self, depth: int) -> int:
        """Of `weight_bytes`, those of experts, of which a token reads only some."""
        kept = self.kept_sublayers(depth)
        return sum(size for block, size in self._expert_bytes.items() if (block, "mlp") in kept)

    def patches(self, depth: int) -> dict[int, Patch]:
        """The patches of a served depth, by their place in `DecoderWeights.patches`."""
        return {index: patch for index, patch in enumerate(self._patches) if patch.serves(depth)}

    def kv_bytes_per_token(self, depth: int) -> int:
        """Bytes of K and V that a token of a request at `depth` needs."""
        num_blocks = sum(part == "attention" for _, part in self.kept_sublayers(depth))
        return bytes_per_token(self.spec, num_blocks, self.dtype, self._kv_dtype)

    def run(self, step: Step) -> Forward:
        """Computes the step's tokens; on a GPU, queues that behind the work of the steps before."""
        make_current(self.device)  # the thread that steps may be another than the one that loaded
        executor = self.executor
        arrays = StepArrays.of(step.rows, executor.unit_depths, executor.page_size, self._last_rows)
        ends = arrays.query_starts[1:]
        last_tokens = [end - 1 for row, end in zip(step.rows, ends, strict=True) if row.chooses]
        greedy = all(row.request.is_greedy for row in step.rows if row.chooses)
        return executor.run(arrays, last_tokens, greedy, self._last_sampled)

    def sample(self, step: Step, forward: Forward) -> SampledStep:
        """Chooses a token for every row that reaches its request's end; on a GPU, queues that."""
        requests = [row.request for row in step.rows if row.chooses]
        prompt_logprobs = self._launch_prompt_logprobs(step, forward.hidden)
        sampled: SampledBatch | list[int] | None = None
        if isinstance(forward.greedy, Tensor):
            sampled = SampledBatch(forward.greedy)
        elif forward.greedy is not None:
            sampled = forward.greedy
        elif forward.logits is not None:
            masks = fill_masks(requests, self.spec.vocab_size, self._eos_token_ids)  # while a GPU computes
            sampled = self._sampler.sample(forward.logits, requests, masks)
        self._last_sampled, self._last_rows = None, {}
        if isinstance(sampled, SampledBatch):
            self._last_sampled = sampled.token_ids
            self._last_rows = {request: row for row, request in enumerate(requests)}
        return SampledStep(step, requests, sampled, prompt_logprobs)

    def _launch_prompt_logprobs(self, step: Step, hidden: Tensor) -> dict[Request, list[PendingLogprobs]]:
        gathered: dict[Request, list[PendingLogprobs]] = {}
        start = 0
        for row in step.rows:
            if row.request.prompt_logprobs is not None and (wanted := _prompt_logprob_range(row)):
                first, last = (start + position - row.start for position in (wanted.start, wanted.stop))
                gathered[row.request] = self._prompt_logprobs(row.request, hidden[first:last], wanted)
            start += row.num_tokens
        return gathered

    @torch.inference_mode()
    def _prompt_logprobs(self, request: Request, hidden: Tensor, positions: range) -> list[PendingLogprobs]:
        """Log-probabilities of the tokens that follow `positions`, whose hidden states are [P, E]."""
        top = request.params.prompt_logprobs or 0
        gathered: list[PendingLogprobs] = []
        for first in range(0, len(positions), LOGPROB_ROWS):
            part = positions[first : first + LOGPROB_ROWS]
            logits = self.executor.logits(hidden[first : first + len(part)])
            following = [request.tokens[position + 1] for position in part]
            token_ids = to_device(following, torch.int64, logits.device)
            gathered.append(self._sampler.logprobs(logits, token_ids, [top] * len(part)))
        return gathered

    def _served_patches(self, depths: Sequence[int]) -> tuple[Patch, ...]:
        """The patches of `depths`, each once, from the bottom up."""
        found = {
            id(patch): patch
            for depth in depths
            for patch in self.layer_map.patches_at(depth, self.spec.hidden_size)
        }
        return tuple(sorted(found.values(), key=lambda patch: (patch.last, patch.first_depth)))

    def _plan(self, keep: set[Sublayer]) -> tuple[PlannedUnit, ...]:
        """The sublayers in `keep` and the patches, each of which stands where the last of its run stood."""
        plan: list[tuple[Sublayer, int, PlannedUnit]] = []
        for sublayer in keep:
            at = self.layer_map.removed_at(*sublayer)
            plan.append((sublayer, 0, PlannedUnit(sublayer, (0, NEVER if at is None else at))))
        for index, patch in enumerate(self._patches):
            end = NEVER if patch.last_depth is None else patch.last_depth + 1
            plan.append((patch.last, 1 + index, PlannedUnit(index, (patch.first_depth, end))))
        # "attention" sorts before "mlp", as they run.
        return tuple(planned for _, _, planned in sorted(plan, key=lambda each: each[:2]))


def _weight_sizes(weights: DecoderWeights) -> dict[Sublayer | int | None, int]:
    """Bytes of each kept sublayer and patch; under None those that every depth uses: embedding, head, final norm."""
    sizes: dict[Sublayer | int | None, int] = {
        **{(block, "attention"): num_bytes(part) for block, part in weights.attention.items()},
        **{(block, "mlp"): num_bytes(part) for block, part in weights.mlp.items()},
        **{index: num_bytes(part) for index, part in enumerate(weights.patches)},
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
