"""A decoder over dense windows of tokens, without a KV cache: embed, run one unit, losses, logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sleb.engine.config import EngineConfig
from sleb.engine.model.allocation import all_sublayers, num_parameters, patch_weights
from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.engine.model.decoder import Decoder
from sleb.engine.model.loader import load_weights
from sleb.engine.model.resolve import resolve_device, resolve_dtype, resolve_weight_format
from sleb.engine.text import TextProcessor
from sleb.kernels.names import FILE
from sleb.kernels.reference.cross_entropy import expected_rows, linear_cross_entropy, linear_divergence
from sleb.kernels.reference.ops import causal_attention
from sleb.kernels.registry import select_kernels
from sleb.layer_map.layer_map import Patch, Unit
from sleb.models.resolve import resolve_model

_MAX_WINDOW = 1 << 17  # tokens: what a config claims may be more than the tables of its angles find room for


def _longest_window(spec: DecoderSpec) -> int:
    return min(spec.max_positions, _MAX_WINDOW)


class DecoderScorer:
    """`sleb.pruning.search.ScoringModel` over the engine's decoder. W windows of L tokens, hidden size E.

    Differentiable with respect to hidden states; callers that need no gradient say torch.no_grad().

    Attributes:
        num_blocks, hidden_size, max_length: of the model; max_length is its longest window in tokens.
        fingerprint, model_name: for the layer map. tokenizer: a `tokenizers.Tokenizer`, or None; text: what knows it.
        vocab_size, device, dtype: of the logits, of the weights, and of activations.
    """

    def __init__(self, decoder: Decoder, model_name: str, text: TextProcessor) -> None:
        spec = decoder.spec
        self._decoder = decoder
        self.num_blocks = spec.num_blocks
        self.hidden_size = spec.hidden_size
        self.max_length = _longest_window(spec)
        self.fingerprint = spec.fingerprint
        self.vocab_size = spec.vocab_size
        self.device = decoder.device
        self.dtype = decoder.weights.dtype
        self._bias, self._softcap = decoder.weights.head.bias, spec.logit_softcap
        self.model_name = model_name
        self.text = text  # renders conversations for the calibration
        self.tokenizer = text.tokenizer

    @classmethod
    def load(
        cls,
        model: str,
        dtype: str = "float32",
        device: str = "auto",
        weights: str = "auto",
        check: Callable[[DecoderSpec], object] = lambda spec: None,
    ) -> DecoderScorer:
        """The scorer of MODEL (folder, hub id, .gguf or alias); dtype, weights: as EngineConfig's.

        check: called before the weights are loaded. Raises ModelError or ConfigError.
        """
        EngineConfig(model, dtype=dtype, weights=weights).check()
        target = resolve_device(device)
        resolved = resolve_model(model, keep_bits=weights == FILE)
        spec = resolve_spec(resolved.path)
        check(spec)
        asked = dtype, weights, spec.checkpoint_dtype
        chosen = resolve_dtype(*asked, target, wide_range=spec.wide_range)
        loaded = load_weights(
            resolved.path,
            spec,
            all_sublayers(spec),
            chosen,
            target,
            weight_format=resolve_weight_format(weights),
            as_stored=weights == FILE,  # else they are dequantised once, not for each of many passes
        )
        kernels = select_kernels("torch", target)
        decoder = Decoder(spec, loaded, kernels, _longest_window(spec), target)
        return cls(decoder, resolved.name, TextProcessor(resolved.path, spec.vocab_size))

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [W, L] int64 to hidden states [W, L, E]."""
        flat = token_ids.to(self._decoder.device).reshape(-1)
        return self._decoder.embed(flat, self._positions(*token_ids.shape)).view(*token_ids.shape, -1)

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        """Hidden states [W, L, E] after `unit`, as a new tensor; a block is its attention, then its MLP."""
        num_windows, length, _ = hidden.shape
        short = self._decoder.spec.short_context
        self._decoder.select_context(short is not None and length > short)
        rotation = self._decoder.rotation(self._positions(num_windows, length))
        flat = hidden.reshape(num_windows * length, -1)

        def attend(block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (part.unflatten(0, (num_windows, length)) for part in (query, key, value))
            spec, sinks = self._decoder.spec, self._decoder.weights.attention[block].sinks
            scale, window = spec.attention_scale, spec.windows[block]
            return causal_attention(query, key, value, scale, window, spec.attention_softcap, sinks)

        for sublayer in unit.sublayers:
            flat = self._decoder.run(sublayer, flat, rotation, attend)
        return flat.view(hidden.shape)

    def apply(self, patch: Patch, hidden: Tensor) -> Tensor:
        """Hidden states [W, L, E] after `patch`, as a new tensor."""
        weights = patch_weights(patch, self.dtype, self.device)
        return self._decoder.patch(weights, hidden.flatten(0, 1)).view(hidden.shape)

    def normed(self, hidden: Tensor) -> Tensor:
        """What a normed patch multiplies: hidden states [..., E] after a norm without a weight, float32."""
        return self._decoder.normed(hidden.float().reshape(-1, hidden.shape[-1])).view(hidden.shape)

    def neurons(self, block: int, hidden: Tensor) -> Tensor:
        """Hidden states [W, L, E] before a block's MLP to what its output projection multiplies: [W, L, I]."""
        return self._decoder.neurons(block, hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)

    def output_projection(self, block: int) -> tuple[Tensor, Tensor | None]:
        """Weight [E, I] and bias [E] of the output projection of a block's MLP; the weights must not be quantised."""
        down = self._decoder.weights.mlp[block].down
        assert isinstance(down.weight, Tensor)
        return down.weight, down.bias

    def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Cross-entropy [W, L − 1] float32 in nats of each token given those before it."""
        states, targets = self.head_states(hidden[:, :-1]), self._targets(token_ids)
        losses = linear_cross_entropy(states, self._head(states), targets, self._bias, self._softcap)
        return losses.view(len(token_ids), -1)

    def expected_rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of the next-token distributions at hidden [W, L, E], the last apart, what `divergences` needs of them."""
        states = self.head_states(hidden[:, :-1])
        return expected_rows(states, self._head(states), self._bias, self._softcap)

    def divergences(
        self, hidden: Tensor, token_ids: Tensor, expected: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """KL(p ‖ q) [W, L − 1] float32 in nats from the distributions p of `expected_rows`, and `token_losses`."""
        states, targets = self.head_states(hidden[:, :-1]), self._targets(token_ids)
        found = linear_divergence(states, self._head(states), *expected, targets, self._bias, self._softcap)
        return found[0].view(len(token_ids), -1), found[1].view(len(token_ids), -1)

    def _targets(self, token_ids: Tensor) -> Tensor:
        return token_ids[:, 1:].reshape(-1).to(self.device)

    def _head(self, states: Tensor) -> Tensor:
        weight = self._decoder.weights.head.weight
        return weight if isinstance(weight, Tensor) else weight.dequantize(states.dtype)

    def head_states(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., E] at the end to what the head multiplies, a row a token: [T, E]."""
        return self._decoder.head_inputs(hidden.reshape(-1, hidden.shape[-1]))

    def logits(self, states: Tensor) -> Tensor:
        """Rows of `head_states` to their logits [T, vocab_size] float32: callers pass a few rows at a time."""
        return self._decoder.head(states)

    def num_parameters(self, unit: Unit) -> int:
        """How many weights a unit has."""
        return num_parameters(self._decoder.spec, unit)

    def _positions(self, num_windows: int, length: int) -> Tensor:
        return torch.arange(length, device=self._decoder.device).repeat(num_windows)
