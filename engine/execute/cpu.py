"""A whole step as one call of the C kernels, over weights packed once and a KV cache in the kernels' own layout."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from sleb.engine.execute.executor import Forward, PlannedUnit
from sleb.engine.execute.step_arrays import StepArrays
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.rotary import RotaryTables
from sleb.engine.model.weights import (
    AttentionWeights,
    DecoderWeights,
    ExpertsWeights,
    Linear,
    MLPWeights,
    Norm,
    PatchWeights,
)
from sleb.errors import ConfigError
from sleb.kernels.cpu import records
from sleb.kernels.cpu.library import (
    ACTIVATIONS,
    ATTENTION,
    FORMATS,
    MLP,
    NORMS,
    NOT_SHARED,
    PAGE_SIZES,
    PATCH,
    SHARED,
    SHARED_GATED,
    CpuKernels,
    format_of,
)
from sleb.kernels.quantization import rows_of


def unsupported_feature(spec: DecoderSpec, page_size: int) -> str | None:
    """What this model needs and the C kernels lack, or None."""
    if not spec.norm_first:
        return "norms after the residual add"
    if spec.embed_size != spec.hidden_size:
        return "projected embeddings"
    if spec.qk_norm == "whole" and spec.qk_norm_after_rotation:
        return "norms of all heads together after their rotation"
    if spec.experts is not None and (spec.parallel or spec.post_norm):
        return "mixtures of experts in parallel blocks, or with norms of their updates"
    if spec.activation not in ACTIVATIONS:
        return f"activation {spec.activation}"
    if page_size not in PAGE_SIZES:
        return f"a page size of {page_size}"
    return None


class CpuExecutor:
    """Runs steps by the C kernels. Takes its weights out of `weights` as it packs them, so that no copy remains.

    Not thread-safe. What a step returns is valid until the next one.
    """

    name = "cpu"
    kernels = "cpu"
    attention: str | None = None
    asynchronous = False

    def __init__(
        self,
        kernels: CpuKernels,
        spec: DecoderSpec,
        weights: DecoderWeights,
        plan: tuple[PlannedUnit, ...],
        *,
        max_model_len: int,
        num_pages: int,
        page_size: int,
        max_num_tokens: int,
        max_num_seqs: int,
        kv_dtype: str = "auto",
    ) -> None:
        self._kv_int8 = kv_dtype == "int8"
        self.instruction_set: str | None = kernels.level
        self._kernels = kernels
        self._spec = spec
        self.page_size = page_size
        self.unit_depths = tuple(planned.depths for planned in plan)
        self._max_tokens = max_num_tokens
        self._kept: list[object] = []  # what the records point to
        self._logits = torch.empty(0)
        self._tables = tuple(
            RotaryTables(rotary, max_model_len, torch.device("cpu")) for rotary in spec.rotaries
        )
        self._argmax = (ctypes.c_int32 * max_num_seqs)()
        self._dtype = weights.dtype
        self._head = kernels.pack(weights.head.weight, weights.head.bias)
        self._model = self._make_model(weights, max_num_tokens)
        units = (records.Unit * len(plan))()
        for number, (unit, planned) in enumerate(zip(units, plan, strict=True)):
            if isinstance(planned.unit, int):
                self._fill_patch(unit, weights.patches[planned.unit])
            elif planned.unit[1] == "attention":
                block = planned.unit[0]
                self._fill_attention(unit, block, weights.attention.pop(block), num_pages)
            else:
                self._fill_mlp(unit, weights.mlp.pop(planned.unit[0]))
                if spec.shared_norm:  # the same record: the kernels see that the rows are normed already
                    unit.norm = units[number - 1].norm
                kernels.library.sleb_trim()
        self._kept.append(units)
        self._model.units = ctypes.addressof(units)
        self._model.num_units = len(plan)
        self._make_workspace(units, max_num_seqs)

    @property
    def num_threads(self) -> int:
        """Threads that run a step, the caller's included."""
        return self._kernels.num_threads

    @property
    def description(self) -> str:
        """The kernels in words, for a line at start."""
        kv_cache = ", KV cache in int8" if self._kv_int8 else ""
        return f"C kernels for {self.instruction_set}, {self.num_threads} threads{kv_cache}"

    def run(
        self, step: StepArrays, samples: Sequence[int], greedy: bool, last: Tensor | None = None
    ) -> Forward:
        """One step; see `sleb.engine.execute.executor.Executor`."""
        assert step.sources is None, "this executor takes tokens from the host alone"
        assert step.num_tokens <= self._max_tokens, "a step has more tokens than the workspace"
        for tables in self._tables:
            tables.select(step.long_context)
        sampled = array("i", samples)
        record = records.Step(
            num_tokens=step.num_tokens,
            num_sequences=step.num_sequences,
            num_samples=len(samples),
            token_ids=_address(step.token_ids),
            positions=_address(step.positions),
            query_starts=_address(step.query_starts),
            context_lens=_address(step.context_lens),
            page_starts=_address(step.page_starts),
            pages=_address(step.pages),
            unit_starts=_address(step.unit_starts),
            unit_ends=_address(step.unit_rows),
            samples=_address(sampled),
        )
        logits: Tensor | None = None
        if samples and greedy:
            record.argmax = ctypes.addressof(self._argmax)
        elif samples:
            logits = self._logits_buffer(len(samples))
            record.logits = logits.data_ptr()
        self._kernels.isa.forward(self._model, record)
        chosen = self._argmax[: len(samples)] if samples and greedy else None
        return Forward(self._residual[: record.num_tokens], logits, chosen)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: residual [B, E] float32 to logits [B, V] float32."""
        rows = hidden.to(torch.float32).contiguous()
        out = torch.empty(rows.shape[0], self._spec.vocab_size)
        for start in range(0, rows.shape[0], self._max_samples):
            part = rows[start : start + self._max_samples]
            self._kernels.isa.head(self._model, part.data_ptr(), part.shape[0], out[start:].data_ptr(), None)
        return out

    def _logits_buffer(self, num_rows: int) -> Tensor:
        if self._logits.shape[0] < num_rows:
            self._logits = torch.empty(num_rows, self._spec.vocab_size)
        return self._logits[:num_rows]

    def _make_model(self, weights: DecoderWeights, max_num_tokens: int) -> records.Model:
        spec, keep = self._spec, self._kernels.keep
        model = records.Model(
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            vocab_size=spec.vocab_size,
            page_size=self.page_size,
            kv_format=FORMATS[weights.dtype],
            kv_int8=self._kv_int8,
            max_tokens=max_num_tokens,
            position_offset=spec.position_offset,
            norm_eps=spec.norm_eps,
            scale=spec.attention_scale,
            embed_scale=spec.embed_scale,
            residual_scale=spec.residual_scale,
            clip=spec.clip_qkv or 0.0,
            softcap=spec.attention_softcap or 0.0,
            logit_softcap=spec.logit_softcap or 0.0,
            qk_whole=spec.qk_norm == "whole",
            qk_after=spec.qk_norm_after_rotation,
            head=self._head,
            pool=self._kernels.pool,
        )
        if weights.head.weight is weights.embed:
            model.embed_packed = 1
        else:
            assert isinstance(weights.embed, Tensor)
            self._kept.append(weights.embed)
            model.embed = weights.embed.data_ptr()
            model.embed_format = FORMATS[weights.embed.dtype]
        if weights.position_embed is not None:
            model.position_embed = keep(weights.position_embed)
        model.final_norm = self._norm(weights.final_norm)
        if (experts := spec.experts) is not None:
            model.expert_slots = experts.top_k + (experts.shared_size > 0)
            model.router_size = experts.number + (experts.names.shared_gate is not None)
        return model

    def _norm(self, norm: Norm | None) -> records.Norm:
        if norm is None:
            return records.Norm()
        keep = self._kernels.keep
        return records.Norm(keep(norm.weight), keep(norm.bias), NORMS[self._spec.norm])

    def _fill_attention(
        self, unit: records.Unit, block: int, weights: AttentionWeights, num_pages: int
    ) -> None:
        spec, kernels = self._spec, self._kernels
        unit.kind = ATTENTION
        unit.norm, unit.post_norm = self._norm(weights.norm), self._norm(weights.post_norm)
        unit.first = kernels.pack(weights.qkv.weight, weights.qkv.bias)
        unit.second = kernels.pack(weights.out.weight, weights.out.bias)
        unit.query_norm, unit.key_norm = self._norm(weights.query_norm), self._norm(weights.key_norm)
        if (rotary := spec.block_rotary[block]) is not None:
            cos, sin = self._tables[rotary].both
            unit.cos, unit.sin, unit.rotary_half = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        unit.sinks = kernels.keep(weights.sinks)
        unit.parallel = spec.parallel
        unit.window = spec.windows[block] or 0
        padded = -(-spec.head_dim // 16) * 16
        token = padded + 4 if self._kv_int8 else padded * self._dtype.itemsize
        size = num_pages * self.page_size * spec.num_kv_heads * token
        unit.key_cache = kernels.arena.map(size, huge=False)[0]
        unit.value_cache = kernels.arena.map(size, huge=False)[0]

    def _fill_mlp(self, unit: records.Unit, weights: MLPWeights) -> None:
        spec, kernels = self._spec, self._kernels
        unit.kind = MLP
        unit.norm, unit.post_norm = self._norm(weights.norm), self._norm(weights.post_norm)
        if weights.experts is not None:
            self._fill_experts(unit, weights, weights.experts)
            return
        unit.activation = ACTIVATIONS[spec.activation]
        unit.first = kernels.pack(weights.up.weight, weights.up.bias, gated=spec.gated)
        unit.second = kernels.pack(weights.down.weight, weights.down.bias)

    def _fill_experts(self, unit: records.Unit, weights: MLPWeights, beside: ExpertsWeights) -> None:
        spec, kernels, experts = self._spec, self._kernels, self._spec.experts
        assert experts is not None
        ups, downs = (_each(linear, experts.number) for linear in (weights.up, weights.down))
        router, bias = beside.router.weight, beside.router.bias
        assert isinstance(router, Tensor)
        record = records.Experts(
            count=experts.number, top_k=experts.top_k, normalised=experts.normalised, shared=NOT_SHARED
        )
        if beside.shared_up is not None and beside.shared_down is not None:
            ups, downs = [*ups, beside.shared_up], [*downs, beside.shared_down]
            record.shared = SHARED
            if {format_of(each.weight) for each in (*ups, *downs)} != {format_of(ups[0].weight)}:
                raise ConfigError(
                    "the expert that every token gets is not quantised as the others are here: use --kernels torch"
                )
        if beside.shared_gate is not None:
            assert bias is None, "no family has both"
            record.shared, router = SHARED_GATED, torch.cat((router, beside.shared_gate))
        record.router = kernels.pack(router, bias)
        record.correction = kernels.keep(beside.correction)
        up = (records.Linear * len(ups))(
            *(kernels.pack(each.weight, each.bias, gated=spec.gated) for each in ups)
        )
        down = (records.Linear * len(downs))(*(kernels.pack(each.weight, each.bias) for each in downs))
        record.up, record.down = ctypes.addressof(up), ctypes.addressof(down)
        unit.activation, unit.experts = ACTIVATIONS[experts.activation], ctypes.addressof(record)
        self._kept += [record, up, down]

    def _fill_patch(self, unit: records.Unit, weights: PatchWeights) -> None:
        kernels = self._kernels
        unit.kind = PATCH
        unit.norm = self._norm(Norm(None, None) if weights.normed else None)
        if weights.first is not None:
            unit.first = kernels.pack(weights.first.weight)
        if weights.second is not None:
            unit.second = kernels.pack(weights.second.weight, weights.second.bias)
        unit.scale, unit.shift = kernels.keep(weights.scale), kernels.keep(weights.bias)

    def _make_workspace(self, units: ctypes.Array[records.Unit], max_num_seqs: int) -> None:
        spec, library = self._spec, self._kernels.library
        size = ctypes.c_size_t()
        # Prompt logprobs go through the head in pieces of as many rows.
        self._max_samples = max(max_num_seqs, 64)
        attended = [unit.second.k for unit in units if unit.kind == ATTENTION]
        activated = max((unit.second.k for unit in units if unit.kind != ATTENTION), default=0)
        if spec.experts is not None:
            activated = max(activated, spec.experts.intermediate_size, spec.experts.shared_size)
        widest = max(spec.hidden_size, activated, *attended)
        workspace = library.sleb_workspace_create(
            self._model, widest, activated, self._max_samples, max_num_seqs, size
        )
        if not workspace:
            raise MemoryError("the system gives no memory for the workspace")
        self._model.workspace = workspace
        weakref.finalize(self, library.sleb_workspace_destroy, workspace, size.value)
        count = self._max_tokens * spec.hidden_size
        pointer = ctypes.cast(library.sleb_workspace_residual(workspace), ctypes.POINTER(ctypes.c_float))
        values = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * count)).contents
        self._residual = torch.frombuffer(values, dtype=torch.float32).view(
            self._max_tokens, spec.hidden_size
        )


def _each(linear: Linear, number: int) -> list[Linear]:
    """The experts' own of their stacked matrices."""
    size = linear.weight.shape[0] // number
    starts = range(0, number * size, size)
    return [
        Linear(
            rows_of(linear.weight, start, start + size),
            None if linear.bias is None else linear.bias[start : start + size],
        )
        for start in starts
    ]


def _address(values: array[int]) -> int:
    return values.buffer_info()[0]
