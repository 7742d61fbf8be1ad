"""The decoder: embedding, sublayers and head over rows of tokens, for every architecture that a spec describes.

It knows neither requests nor pages: attention over the context is a callable given with each call, so that the
paged engine and the scorer run the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.rotary import RotaryTables
from sleb.engine.model.weights import DecoderWeights, ExpertsWeights, MLPWeights, Norm, PatchWeights
from sleb.kernels.reference.experts import mix_experts, route
from sleb.kernels.reference.ops import embedding
from sleb.kernels.registry import Kernels
from sleb.layer_map.units import Sublayer

# (block, query [T, H, D], key [T, K, D], value [T, K, D]) -> [T, H, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rotation:
    """For each of the spec's rotaries cos and sin of the tokens' positions, each [T, R/2] float32."""

    tables: tuple[tuple[Tensor, Tensor], ...]

    def prefix(self, num_tokens: int) -> Rotation:
        """The rotation of the first `num_tokens` tokens, as views."""
        return Rotation(tuple((cos[:num_tokens], sin[:num_tokens]) for cos, sin in self.tables))


class Decoder:
    """Weights and arithmetic of the kept sublayers. T is the number of tokens, E the hidden size."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        kernels: Kernels,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.kernels = kernels
        self.device = device
        self.tables = tuple(RotaryTables(rotary, max_model_len, device) for rotary in spec.rotaries)
        self._entry: Tensor | None = None  # of a parallel block, from its attention to its MLP

    def select_context(self, long: bool) -> None:
        """Whether the sequences of what follows are past the original context: see `RotaryTables`."""
        for tables in self.tables:
            tables.select(long)

    def rotation(self, positions: Tensor) -> Rotation:
        """The Rotation of positions [T] int64."""
        return Rotation(tuple((tables.cos[positions], tables.sin[positions]) for tables in self.tables))

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids and positions [T] int64 to the residual stream [T, E]."""
        hidden = embedding(token_ids, self.weights.embed, self.weights.dtype)
        if self.spec.embed_scale != 1.0:
            hidden = hidden * self.spec.embed_scale
        if self.weights.project_in is not None:
            hidden = self.kernels.linear(hidden, self.weights.project_in.weight, None)
        if self.weights.position_embed is not None:
            hidden = hidden + F.embedding(positions + self.spec.position_offset, self.weights.position_embed)
        return hidden

    def run(self, sublayer: Sublayer, residual: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """The residual stream [T, E] after one sublayer, as a new tensor.

        The MLP of a parallel block must follow its attention, over the same rows: it reads what that has read.
        """
        block, part = sublayer
        spec = self.spec
        weights = self.weights.attention[block] if part == "attention" else self.weights.mlp[block]
        entry = residual
        if spec.parallel and part == "attention":
            self._entry = residual
        elif spec.parallel:
            assert self._entry is not None and self._entry.shape == residual.shape
            entry, self._entry = self._entry, None
        inputs = self._norm(entry, weights.norm) if spec.norm_first and weights.norm is not None else entry
        if part == "attention":
            update = self._attention(block, inputs, rotation, attend)
        else:
            update = self._mlp(block, inputs)
        if weights.post_norm is not None:
            update = self._norm(update, weights.post_norm)
        if spec.residual_scale != 1.0:
            update = update * spec.residual_scale
        residual = residual + update
        if spec.norm_first or weights.norm is None:
            return residual
        return self._norm(residual, weights.norm)

    def patch(self, weights: PatchWeights, residual: Tensor) -> Tensor:
        """The residual stream [T, E] after a patch, as a new tensor; see `sleb.layer_map.patches`."""
        if weights.scale is not None and weights.bias is not None:
            return torch.addcmul(weights.bias, residual, weights.scale)
        inputs, linear = self.normed(residual) if weights.normed else residual, self.kernels.linear
        if weights.first is not None:
            inputs = linear(inputs, weights.first.weight, None)
        assert weights.second is not None
        return residual + linear(inputs, weights.second.weight, weights.second.bias)

    def normed(self, residual: Tensor) -> Tensor:
        """The residual stream [T, E] after a norm of the model's kind without weight or bias."""
        return self._norm(residual, Norm(None, None))

    def logits(self, residual: Tensor) -> Tensor:
        """Final norm and head: residual [B, E] to logits [B, V] in float32."""
        return self.head(self.head_inputs(residual))

    def head(self, inputs: Tensor) -> Tensor:
        """What `head_inputs` gives, to logits [B, V] in float32."""
        head, cap = self.weights.head, self.spec.logit_softcap
        logits = self.kernels.linear(inputs, head.weight, head.bias).float()
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def head_inputs(self, residual: Tensor) -> Tensor:
        """What the head multiplies: residual [B, E] after the final norm and, where there is one, the projection."""
        weights = self.weights
        hidden = residual if weights.final_norm is None else self._norm(residual, weights.final_norm)
        if weights.project_out is not None:
            hidden = self.kernels.linear(hidden, weights.project_out.weight, None)
        return hidden

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        if self.spec.norm == "rms":
            return self.kernels.rms_norm(x, norm.weight, self.spec.norm_eps)
        return self.kernels.layer_norm(x, norm.weight, norm.bias, self.spec.norm_eps)

    def _attention(self, block: int, inputs: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        spec, weights, kernels = self.spec, self.weights.attention[block], self.kernels
        heads = kernels.linear(inputs, weights.qkv.weight, weights.qkv.bias)
        heads = heads.view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        query, key, value = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if not spec.qk_norm_after_rotation:
            query, key = self._head_norm(query, weights.query_norm), self._head_norm(key, weights.key_norm)
        if (clip := spec.clip_qkv) is not None:
            query, key, value = (part.clamp(-clip, clip) for part in (query, key, value))
        if (rotary := spec.block_rotary[block]) is not None:
            cos, sin = rotation.tables[rotary]
            query, key = kernels.rope(query, cos, sin), kernels.rope(key, cos, sin)
        if spec.qk_norm_after_rotation:
            query, key = self._head_norm(query, weights.query_norm), self._head_norm(key, weights.key_norm)
        attended = attend(block, query, key, value)
        return kernels.linear(attended.reshape(-1, spec.query_size), weights.out.weight, weights.out.bias)

    def _head_norm(self, heads: Tensor, norm: Norm | None) -> Tensor:
        """heads [T, H, D], each normed alone or all of a token together, as the spec says."""
        if norm is None:
            return heads
        if self.spec.qk_norm == "whole":
            return self._norm(heads.flatten(1), norm).view(heads.shape)
        return self._norm(heads, norm)

    def neurons(self, block: int, residual: Tensor) -> Tensor:
        """The residual stream [T, E] before a block's MLP to what its output projection multiplies: [T, I]."""
        norm = self.weights.mlp[block].norm
        return self._neurons(
            block, self._norm(residual, norm) if self.spec.norm_first and norm is not None else residual
        )

    def _neurons(self, block: int, inputs: Tensor) -> Tensor:
        spec, up, kernels = self.spec, self.weights.mlp[block].up, self.kernels
        gate = kernels.gated_activate if spec.gated else kernels.activate
        return gate(kernels.linear(inputs, up.weight, up.bias), spec.activation)

    def _mlp(self, block: int, inputs: Tensor) -> Tensor:
        weights, down = self.weights.mlp[block], self.weights.mlp[block].down
        if weights.experts is not None:
            return self._mixture(weights, weights.experts, inputs)
        return self.kernels.linear(self._neurons(block, inputs), down.weight, down.bias)

    def _mixture(self, weights: MLPWeights, beside: ExpertsWeights, inputs: Tensor) -> Tensor:
        spec, kernels, experts = self.spec, self.kernels, self.spec.experts
        assert experts is not None
        exact = inputs.float()
        logits = kernels.linear(exact, beside.router.weight, beside.router.bias)
        chosen, shares = route(logits, experts.top_k, experts.normalised, beside.correction)
        up, down = weights.up, weights.down
        update = mix_experts(
            *(inputs, up.weight, up.bias, down.weight, down.bias, chosen, shares),
            *(experts.number, experts.activation, spec.gated),
        )
        if beside.shared_up is None or beside.shared_down is None:
            return update
        hidden = kernels.linear(inputs, beside.shared_up.weight, beside.shared_up.bias)
        hidden = (kernels.gated_activate if spec.gated else kernels.activate)(hidden, experts.activation)
        shared = kernels.linear(hidden, beside.shared_down.weight, beside.shared_down.bias)
        if beside.shared_gate is not None:
            shared = shared * torch.sigmoid(kernels.linear(exact, beside.shared_gate, None)).to(shared.dtype)
        return update + shared
