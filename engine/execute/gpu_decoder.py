"""The decoder over operators for a GPU: what runs a unit reads on the device how many rows it has.

The arithmetic is that of `sleb.engine.model.decoder.Decoder`, which lends its weights, tables and embedding. A product
also does what stands before and after it, so a block of a Llama is five operators: queries, keys and values, normed,
rotated and stored; attention; its output, added; gate and up, normed and activated; their output, added. For the norms,
each row's sums of squares are kept beside the residual (`moments`).

Otherwise an update is added by the norm of the next unit: where that is a LayerNorm, or stands before a mixture, where
updates have norms of their own, and for many rows. A norm of a unit's own update, and a factor on it, are parts of that
add; units without a norm before them only add. A parallel block adds both its updates at once.

A patch of a matrix is a product that norms what it reads, and an add; one of low rank two products, the second of which
adds; one that scales is a norm that only scales. Every operator takes its rows from the device: launched over a bucket,
captured or not, it leaves those that are not its unit's as they are. Which experts a token gets is found on the device
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sleb.engine.execute.kv_cache import PagedKVCache
from sleb.engine.model.decoder import Decoder
from sleb.engine.model.weights import (
    AttentionWeights,
    ExpertsWeights,
    Linear,
    MLPWeights,
    Norm,
    PatchWeights,
)
from sleb.kernels.batch import BatchTensors
from sleb.kernels.reference.device import MOMENT_CHUNK, HeadNorm, RowNorm
from sleb.kernels.reference.experts import route
from sleb.kernels.registry import Attention, GpuKernels
from sleb.layer_map.units import Sublayer


@dataclass(frozen=True)
class UnitRows:
    """A sublayer and the rows that run it.

    Attributes:
        num_tokens: tokens that are laid out for it, a bound that the host knows.
        token_count: [1] int32, how many of them are there.
        batch: their sequences.
    """

    sublayer: Sublayer
    num_tokens: int
    token_count: Tensor
    batch: BatchTensors


@dataclass(frozen=True)
class PatchRows:
    """A patch and the rows that get it.

    Attributes:
        first_token, num_tokens: from which to before which token rows are laid out for it: bounds that the host knows.
        token_start, token_count: [1] int32, from which to before which of them are there. token_start None: from the
            first token of all.
    """

    patch: PatchWeights
    first_token: int
    num_tokens: int
    token_start: Tensor | None
    token_count: Tensor


@dataclass(frozen=True)
class Stream:
    """The residual stream [T, E], with an update that is not added yet.

    Attributes:
        moments: of the residual, always in step with it, where products norm what they read; else None.
        delta: [N, E], of which the rows from delta_start[0], or 0, to before num_delta[0] count; None for none.
        delta_norm, delta_scale: norm of the update, and factor on that, before it is added.
    """

    residual: Tensor
    moments: Tensor | None = None
    delta: Tensor | None = None
    num_delta: Tensor | None = None
    delta_start: Tensor | None = None
    delta_norm: Norm | None = None
    delta_scale: float = 1.0

    @property
    def added(self) -> Stream:
        """The stream once the update is added."""
        return Stream(self.residual, self.moments)


class GpuDecoder:
    """Runs units over a stream. T tokens, E hidden size."""

    def __init__(
        self, decoder: Decoder, kernels: GpuKernels, attention: Attention, kv_cache: PagedKVCache
    ) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self._kernels = kernels
        self._attention = attention
        self._head_norms = {
            block: self._head_norm(weights) for block, weights in decoder.weights.attention.items()
        }

    def run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        units: Sequence[UnitRows | PatchRows],
        pending: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Stream:
        """token_ids, positions and slots [T] int32 through the units; K and V are stored on the way.

        pending: of tokens that the host does not know yet; see `sleb.kernels.reference.device.embed`. out: what the
        residual is to be, [T, E].
        """
        spec, weights = self.decoder.spec, self.decoder.weights
        stream = self._embed(token_ids, positions, pending, out)
        inputs, norm = stream.residual, None  # of the sublayer before
        for unit in units:
            if isinstance(unit, PatchRows):
                stream = self._patch(stream, unit)
                if not spec.norm_first:
                    stream = self.add(stream)
                continue
            block, part = unit.sublayer
            own = weights.attention[block] if part == "attention" else weights.mlp[block]
            beside = stream.delta if spec.parallel and part == "mlp" else None
            if beside is None or not spec.shared_norm:
                entry = stream if beside is None else stream.added
                inputs, norm = self._inputs(entry, own, unit)
            if part == "attention":
                stream = self._attend(stream, inputs, norm, positions, slots, unit)
            else:
                stream = self._mlp(stream, inputs, norm, unit)
            if own.norm is not None and not spec.norm_first:
                self.norm(stream, own.norm, unit.token_count, post=True)
                stream = stream.added
        return stream

    def _embed(
        self,
        token_ids: Tensor,
        positions: Tensor,
        pending: tuple[Tensor, Tensor] | None,
        out: Tensor | None,
    ) -> Stream:
        """The stream that the units begin with: as `sleb.engine.model.decoder.Decoder.embed`."""
        spec, weights, num_tokens = self.decoder.spec, self.decoder.weights, token_ids.shape[0]
        learned, dtype = None, weights.dtype
        if weights.position_embed is not None:
            learned = (positions, weights.position_embed[spec.position_offset :])
        if out is None:
            out = torch.empty(num_tokens, spec.hidden_size, dtype=dtype, device=self.decoder.device)
        embed = partial(
            self._kernels.embed, token_ids, weights.embed, pending=pending, scale=spec.embed_scale
        )
        if weights.project_in is None:
            moments = None
            if self._keeps_moments and num_tokens <= self._kernels.fused_rows:
                chunks = -(-spec.hidden_size // MOMENT_CHUNK)
                moments = torch.empty(num_tokens, chunks, dtype=torch.float32, device=self.decoder.device)
            embed(out, moments, learned=learned)
            return Stream(out, moments)
        narrow = torch.empty(num_tokens, spec.embed_size, dtype=dtype, device=self.decoder.device)
        embed(narrow, None)
        out.copy_(self._kernels.linear(narrow, weights.project_in.weight, None))
        if learned is not None:
            out += learned[1][positions.long()]
        return Stream(out)

    @property
    def _keeps_moments(self) -> bool:
        """Whether products do the norms, where rows are few."""
        spec = self.decoder.spec
        if spec.norm != "rms" or spec.norm_bias or not spec.pre_norm:
            return False
        return not (spec.post_norm or spec.parallel)

    def _inputs(
        self, stream: Stream, own: AttentionWeights | MLPWeights, unit: UnitRows
    ) -> tuple[Tensor, RowNorm | None]:
        """What a unit reads, and the norm that is still to be done as it does; in place, what was not added is."""
        if own.norm is None or not self.decoder.spec.norm_first:
            return self.add(stream).residual[: unit.num_tokens], None
        is_mixture = isinstance(own, MLPWeights) and own.experts is not None
        norm = self._row_norm(stream, own.norm)
        if norm is None or is_mixture:
            return self.norm(stream, own.norm, unit.token_count, unit.num_tokens), None
        return stream.residual[: unit.num_tokens], norm

    def _row_norm(self, stream: Stream, norm: Norm) -> RowNorm | None:
        """A norm that a product may do; None where there are no moments, or is something to add first."""
        if stream.moments is None or stream.delta is not None:
            return None
        return RowNorm(norm.weight, self.decoder.spec.norm_eps, stream.moments)

    def _updated(
        self, stream: Stream, x: Tensor, linear: Linear, post: Norm | None, unit: UnitRows
    ) -> Stream:
        """The stream with the product as the update of `unit`: added, or to be added."""
        kernels, scale, count = self._kernels, self.decoder.spec.residual_scale, unit.token_count
        if self.decoder.spec.parallel and unit.sublayer[1] == "mlp" and stream.delta is not None:
            kernels.linear_add(x, linear.weight, linear.bias, stream.delta, None, count)
            return stream
        if stream.moments is not None and stream.delta is None and post is None:
            of_stream = (stream.residual, stream.moments, count)
            kernels.linear_add(x, linear.weight, linear.bias, *of_stream, scale=scale)
            return stream
        return self._pending(stream, kernels.linear(x, linear.weight, linear.bias), post, unit)

    def _pending(self, stream: Stream, delta: Tensor, post: Norm | None, unit: UnitRows) -> Stream:
        scale = self.decoder.spec.residual_scale
        kept = stream.added
        return replace(kept, delta=delta, num_delta=unit.token_count, delta_norm=post, delta_scale=scale)

    def norm(
        self,
        stream: Stream,
        norm: Norm,
        count: Tensor,
        max_rows: int | None = None,
        *,
        start: Tensor | None = None,
        kind: str | None = None,
        post: bool = False,
    ) -> Tensor:
        """Adds what is not added yet, in place, and norms the rows from start[0], or 0, to count[0]; see `add_norm`."""
        spec, update = self.decoder.spec, stream.delta_norm
        return self._kernels.add_norm(
            stream.residual,
            stream.delta,
            norm.weight,
            norm.bias,
            spec.norm_eps,
            kind or spec.norm,
            stream.num_delta,
            count,
            delta_start=stream.delta_start,
            norm_start=start,
            max_rows=max_rows,
            post=post,
            delta_kind="none" if update is None else spec.norm,
            delta_weight=None if update is None else update.weight,
            delta_bias=None if update is None else update.bias,
            delta_scale=stream.delta_scale,
            moments=stream.moments,
        )

    def add(self, stream: Stream) -> Stream:
        """The stream with nothing left to add; in place."""
        if stream.num_delta is not None:
            start = stream.delta_start
            self.norm(stream, Norm(None, None), stream.num_delta, start=start, kind="none", post=True)
        return stream.added

    def head(self, stream: Stream, count: Tensor) -> Tensor:
        """A stream of `count` rows [B, E], all that it has, to logits [B, V] in the weights' dtype; what was not added
        is, in place."""
        weights, linear, cap = self.decoder.weights, self._kernels.linear, self.decoder.spec.logit_softcap
        norm = None
        if weights.final_norm is None:
            hidden = self.add(stream).residual
        else:
            norm = self._row_norm(stream, weights.final_norm)
            hidden = stream.residual if norm else self.norm(stream, weights.final_norm, count)
        if weights.project_out is not None:
            hidden, norm = linear(hidden, weights.project_out.weight, None, norm=norm), None
        logits = linear(hidden, weights.head.weight, weights.head.bias, norm=norm)
        return logits if cap is None else self._kernels.soft_cap(logits, cap)

    def _head_norm(self, weights: AttentionWeights) -> HeadNorm | None:
        spec, query, key = self.decoder.spec, weights.query_norm, weights.key_norm
        if query is None or key is None:
            return None
        return HeadNorm(
            spec.norm,
            *(query.weight, key.weight, query.bias, key.bias),
            eps=spec.norm_eps,
            whole=spec.qk_norm == "whole",
            after_rotation=spec.qk_norm_after_rotation,
        )

    def _patch(self, stream: Stream, rows: PatchRows) -> Stream:
        """As `sleb.engine.model.decoder.Decoder.patch`."""
        patch, kernels, start, count = rows.patch, self._kernels, rows.token_start, rows.token_count
        if patch.scale is not None:
            self.norm(stream, Norm(patch.scale, patch.bias), count, start=start, kind="none", post=True)
            return stream.added
        norm = self._row_norm(stream, Norm(None, None))
        if norm is None:
            kind = None if patch.normed else "none"
            hidden = self.norm(stream, Norm(None, None), count, rows.num_tokens, start=start, kind=kind)
        else:
            hidden = stream.residual[: rows.num_tokens]
            norm = replace(norm, moments=norm.moments[rows.first_token :]) if patch.normed else None
        # What the host knows is cut off here; what only the device knows, operators leave out.
        hidden, stream = hidden[rows.first_token :], stream.added
        ranged = None if start is None or rows.first_token else (start, count)
        if patch.first is not None:
            hidden = kernels.linear(hidden, patch.first.weight, patch.first.bias, rows=ranged, norm=norm)
        assert patch.second is not None
        weight, bias = patch.second.weight, patch.second.bias
        cut, moments = slice(rows.first_token, rows.num_tokens), stream.moments
        kept = Stream(stream.residual[cut], None if moments is None else moments[cut])
        start = start if ranged else None
        if patch.first is not None and stream.moments is not None:
            kernels.linear_add(hidden, weight, bias, kept.residual, kept.moments, count, start=start)
            return stream
        delta = kernels.linear(
            hidden, weight, bias, rows=ranged, norm=None if patch.first is not None else norm
        )
        if not rows.first_token:
            return replace(stream, delta=delta, num_delta=count, delta_start=start)
        self.add(replace(kept, delta=delta, num_delta=count))
        return stream

    def _attend(
        self,
        stream: Stream,
        inputs: Tensor,
        norm: RowNorm | None,
        positions: Tensor,
        slots: Tensor,
        unit: UnitRows,
    ) -> Stream:
        block = unit.sublayer[0]
        spec, weights = self.decoder.spec, self.decoder.weights.attention[block]
        rotary = spec.block_rotary[block]
        rotation = None if rotary is None else self.decoder.tables[rotary].both
        key_cache, value_cache = self.kv_cache.layer(block)
        query = self._kernels.linear_rope_store(
            inputs,
            weights.qkv.weight,
            weights.qkv.bias,
            spec.num_heads,
            rotation,
            positions[: unit.num_tokens],
            self._head_norms[block],
            key_cache,
            value_cache,
            slots[: unit.num_tokens],
            unit.token_count,
            spec.clip_qkv,
            norm=norm,
        )
        attended = self._attention(
            query,
            key_cache,
            value_cache,
            unit.batch,
            spec.attention_scale,
            spec.windows[block],
            spec.attention_softcap,
            weights.sinks,
        )
        return self._updated(
            stream.added, attended.view(-1, spec.query_size), weights.out, weights.post_norm, unit
        )

    def _mlp(self, stream: Stream, inputs: Tensor, norm: RowNorm | None, unit: UnitRows) -> Stream:
        spec, weights = self.decoder.spec, self.decoder.weights.mlp[unit.sublayer[0]]
        if not spec.parallel:
            stream = stream.added  # of the unit before: what made `inputs` has added it
        if weights.experts is None:
            inner = self._neurons(weights.up, spec.activation, inputs, unit.token_count, norm)
            return self._updated(stream, inner, weights.down, weights.post_norm, unit)
        update = self._mixture(weights, weights.experts, inputs, unit.token_count)
        if stream.delta is not None:
            update += stream.delta
        return self._pending(stream, update, weights.post_norm, unit)

    def _mixture(self, weights: MLPWeights, beside: ExpertsWeights, inputs: Tensor, count: Tensor) -> Tensor:
        spec, kernels = self.decoder.spec, self._kernels
        experts, linear = spec.experts, kernels.linear
        assert experts is not None
        exact = inputs.float()
        logits = linear(exact, beside.router.weight, beside.router.bias)
        chosen, shares = route(logits, experts.top_k, experts.normalised, beside.correction)
        update = kernels.mix_experts(
            inputs,
            weights.up.weight,
            weights.up.bias,
            weights.down.weight,
            weights.down.bias,
            chosen,
            shares,
            num_experts=experts.number,
            activation=experts.activation,
            gated=spec.gated,
            num_rows=count,
        )
        if beside.shared_up is None or beside.shared_down is None:
            return update
        inner, down = self._neurons(beside.shared_up, experts.activation, inputs, count), beside.shared_down
        if beside.shared_gate is None:
            kernels.linear_add(inner, down.weight, down.bias, update, None, count)
            return update
        shared = linear(inner, down.weight, down.bias)
        return update + shared * linear(exact, beside.shared_gate, None).sigmoid().to(shared.dtype)

    def _neurons(
        self, up: Linear, activation: str, inputs: Tensor, count: Tensor, norm: RowNorm | None = None
    ) -> Tensor:
        gated = self.decoder.spec.gated
        return self._kernels.linear_activate(inputs, up.weight, up.bias, activation, gated, count, norm=norm)
