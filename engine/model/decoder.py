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
from sleb.engine.model.weights import DecoderWeights, Norm, PatchWeights
from sleb.kernels.reference.ops import embedding
from sleb.kernels.registry import Kernels
from sleb.layer_map.units import Sublayer

# (block, query [T, H, D], key [T, K, D], value [T, K, D]) -> [T, H, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rotation:
    """cos and sin, each [T, R/2] float32, of the tokens' positions; both None without rotary embedding."""

    cos: Tensor | None
    sin: Tensor | None

    def prefix(self, num_tokens: int) -> Rotation:
        """The rotation of the first `num_tokens` tokens, as views."""
        if self.cos is None or self.sin is None or num_tokens == self.cos.shape[0]:
            return self
        return Rotation(self.cos[:num_tokens], self.sin[:num_tokens])


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
        self.scale = spec.head_dim**-0.5
        self.tables = RotaryTables(spec.rotary, max_model_len, device) if spec.rotary else None

    def select_context(self, long: bool) -> None:
        """Whether the sequences of what follows are past the original context: see `RotaryTables`."""
        if self.tables is not None:
            self.tables.select(long)

    def rotation(self, positions: Tensor) -> Rotation:
        """The Rotation of positions [T] int64."""
        if self.tables is None:
            return Rotation(None, None)
        return Rotation(self.tables.cos[positions], self.tables.sin[positions])

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids and positions [T] int64 to the residual stream [T, E]."""
        hidden = embedding(token_ids, self.weights.embed, self.weights.dtype)
        if self.weights.project_in is not None:
            hidden = self.kernels.linear(hidden, self.weights.project_in.weight, None)
        if self.weights.position_embed is not None:
            hidden = hidden + F.embedding(positions + self.spec.position_offset, self.weights.position_embed)
        return hidden

    def run(self, sublayer: Sublayer, residual: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """The residual stream [T, E] after one sublayer, as a new tensor."""
        block, part = sublayer
        norm = self.weights.attention[block].norm if part == "attention" else self.weights.mlp[block].norm
        inputs = self._norm(residual, norm) if self.spec.norm_first else residual
        if part == "attention":
            update = self._attention(block, inputs, rotation, attend)
        else:
            update = self._mlp(block, inputs)
        residual = residual + update
        return residual if self.spec.norm_first else self._norm(residual, norm)

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
        return self.kernels.linear(self.head_inputs(residual), self.weights.head.weight, None).float()

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
        num_rotated = spec.num_heads + spec.num_kv_heads
        heads = kernels.linear(inputs, weights.qkv.weight, weights.qkv.bias)
        heads = heads.view(-1, num_rotated + spec.num_kv_heads, spec.head_dim)
        query, key = heads[:, : spec.num_heads], heads[:, spec.num_heads : num_rotated]
        if weights.query_norm is not None and weights.key_norm is not None:
            query = kernels.rms_norm(query, weights.query_norm.weight, spec.norm_eps)
            key = kernels.rms_norm(key, weights.key_norm.weight, spec.norm_eps)
        if spec.rotary_blocks[block] and rotation.cos is not None and rotation.sin is not None:
            if weights.query_norm is None:  # still adjacent: one call for both
                rotated = kernels.rope(heads[:, :num_rotated], rotation.cos, rotation.sin)
                query, key = rotated[:, : spec.num_heads], rotated[:, spec.num_heads :]
            else:
                query = kernels.rope(query, rotation.cos, rotation.sin)
                key = kernels.rope(key, rotation.cos, rotation.sin)
        attended = attend(block, query, key, heads[:, num_rotated:])
        return kernels.linear(attended.reshape(-1, spec.query_size), weights.out.weight, weights.out.bias)

    def neurons(self, block: int, residual: Tensor) -> Tensor:
        """The residual stream [T, E] before a block's MLP to what its output projection multiplies: [T, I]."""
        norm = self.weights.mlp[block].norm
        return self._neurons(block, self._norm(residual, norm) if self.spec.norm_first else residual)

    def _neurons(self, block: int, inputs: Tensor) -> Tensor:
        spec, up, kernels = self.spec, self.weights.mlp[block].up, self.kernels
        gate = kernels.gated_activate if spec.gated else kernels.activate
        return gate(kernels.linear(inputs, up.weight, up.bias), spec.activation)

    def _mlp(self, block: int, inputs: Tensor) -> Tensor:
        down = self.weights.mlp[block].down
        return self.kernels.linear(self._neurons(block, inputs), down.weight, down.bias)
