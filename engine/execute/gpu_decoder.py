"""The decoder over operators for a GPU: what runs a unit reads on the device how many rows it has.

The arithmetic is that of `sleb.engine.model.decoder.Decoder`, which lends its weights, tables and embedding. The
residual add of a unit is done by the norm of the next one, so a block is two norms, two pairs of matrix products,
one rotation that also stores K and V, one attention and one activation. A norm of a unit's own update, and a factor on
it, are parts of that add; units without a norm before them only add. A parallel block adds both its updates at once. A
patch is a norm and a product or two, whose result is added by the norm of the next unit in the same way; one that
scales is a norm that only scales. Every operator takes its rows from the device: launched over a bucket, captured or
not, it leaves those that are not its unit's as they are. Which experts a token gets is found on the device too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sleb.engine.execute.kv_cache import PagedKVCache
from sleb.engine.model.decoder import Decoder
from sleb.engine.model.weights import AttentionWeights, Linear, Norm, PatchWeights
from sleb.kernels.batch import BatchTensors
from sleb.kernels.reference.device import HeadNorm
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
    """The residual stream [T, E] with an update that is not added yet.

    Attributes:
        delta: [N, E], of which the rows from delta_start[0], or 0, to before num_delta[0] count; None for none.
        delta_norm, delta_scale: norm of the update, and factor on that, before it is added.
    """

    residual: Tensor
    delta: Tensor | None = None
    num_delta: Tensor | None = None
    delta_start: Tensor | None = None
    delta_norm: Norm | None = None
    delta_scale: float = 1.0


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
        self, token_ids: Tensor, positions: Tensor, slots: Tensor, units: Sequence[UnitRows | PatchRows]
    ) -> Stream:
        """token_ids, positions and slots [T] int32 through the units; K and V are stored on the way."""
        spec, weights = self.decoder.spec, self.decoder.weights
        stream = Stream(self.decoder.embed(token_ids, positions))
        inputs = stream.residual  # of the sublayer before
        for unit in units:
            if isinstance(unit, PatchRows):
                stream = self._patch(stream, unit)
                if not spec.norm_first:
                    stream = self.add(stream)
                continue
            block, part = unit.sublayer
            own = weights.attention[block] if part == "attention" else weights.mlp[block]
            beside = stream.delta if spec.parallel and part == "mlp" else None
            entry = stream if beside is None else Stream(stream.residual)
            if own.norm is None or not spec.norm_first:
                inputs = self.add(entry).residual[: unit.num_tokens]
            elif beside is None or not spec.shared_norm:
                inputs = self.norm(entry, own.norm, unit.token_count, unit.num_tokens)
            if part == "attention":
                delta = self._attend(block, inputs, positions, slots, unit)
            else:
                delta = self._mlp(block, inputs, unit)
            if beside is not None:
                delta += beside
            stream = Stream(
                *(stream.residual, delta, unit.token_count),
                delta_norm=own.post_norm,
                delta_scale=spec.residual_scale,
            )
            if own.norm is not None and not spec.norm_first:
                self.norm(stream, own.norm, unit.token_count, post=True)
                stream = Stream(stream.residual)
        return stream

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
        )

    def add(self, stream: Stream) -> Stream:
        """The stream with nothing left to add; in place."""
        if stream.num_delta is not None:
            start = stream.delta_start
            self.norm(stream, Norm(None, None), stream.num_delta, start=start, kind="none", post=True)
        return Stream(stream.residual)

    def head(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [B, E] to logits [B, V] in the weights' dtype."""
        weights, linear, cap = self.decoder.weights, self._kernels.linear, self.decoder.spec.logit_softcap
        if weights.project_out is not None:
            hidden = linear(hidden, weights.project_out.weight, None)
        logits = linear(hidden, weights.head.weight, weights.head.bias)
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
        patch, linear, start, count = rows.patch, self._kernels.linear, rows.token_start, rows.token_count
        if patch.scale is not None:
            self.norm(stream, Norm(patch.scale, patch.bias), count, start=start, kind="none", post=True)
            return Stream(stream.residual)
        kind = None if patch.normed else "none"
        hidden = self.norm(stream, Norm(None, None), count, rows.num_tokens, start=start, kind=kind)
        # What the host knows is cut off here; what only the device knows, operators leave out.
        hidden = hidden[rows.first_token :]
        ranged = None if start is None or rows.first_token else (start, count)
        if patch.first is not None:
            hidden = linear(hidden, patch.first.weight, patch.first.bias, rows=ranged)
        assert patch.second is not None
        delta = linear(hidden, patch.second.weight, patch.second.bias, rows=ranged)
        if rows.first_token:
            stream.residual[rows.first_token : rows.num_tokens] += delta
            return Stream(stream.residual)
        return Stream(stream.residual, delta, count, start)

    def _attend(self, block: int, inputs: Tensor, positions: Tensor, slots: Tensor, unit: UnitRows) -> Tensor:
        spec, weights, kernels = self.decoder.spec, self.decoder.weights.attention[block], self._kernels
        heads = kernels.linear(inputs, weights.qkv.weight, weights.qkv.bias)
        rotary = spec.block_rotary[block]
        rotation = None if rotary is None else self.decoder.tables[rotary].both
        key_cache, value_cache = self.kv_cache.layer(block)
        query = kernels.rope_store(
            heads.view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim),
            spec.num_heads,
            rotation,
            positions[: unit.num_tokens],
            self._head_norms[block],
            key_cache,
            value_cache,
            slots[: unit.num_tokens],
            unit.token_count,
            spec.clip_qkv,
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
        return kernels.linear(attended.view(-1, spec.query_size), weights.out.weight, weights.out.bias)

    def _mlp(self, block: int, inputs: Tensor, unit: UnitRows) -> Tensor:
        spec, weights, kernels = self.decoder.spec, self.decoder.weights.mlp[block], self._kernels
        if weights.experts is None:
            return self._neurons(weights.up, weights.down, spec.activation, inputs, unit.token_count)
        experts, beside, linear = spec.experts, weights.experts, kernels.linear
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
            num_rows=unit.token_count,
        )
        if beside.shared_up is None or beside.shared_down is None:
            return update
        of_all = (beside.shared_up, beside.shared_down, experts.activation)
        shared = self._neurons(*of_all, inputs, unit.token_count)
        if beside.shared_gate is not None:
            shared = shared * linear(exact, beside.shared_gate, None).sigmoid().to(shared.dtype)
        return update + shared

    def _neurons(self, up: Linear, down: Linear, activation: str, inputs: Tensor, count: Tensor) -> Tensor:
        kernels = self._kernels
        gate = kernels.gated_activate if self.decoder.spec.gated else kernels.activate
        activated = gate(kernels.linear(inputs, up.weight, up.bias), activation, count)
        return kernels.linear(activated, down.weight, down.bias)
