"""A decoder for the search: embed, run one unit, loss, over dense windows of tokens without a KV cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sleb.engine.architecture import resolve_spec
from sleb.engine.config import EngineConfig, resolve_device, resolve_dtype
from sleb.engine.decoder import Decoder
from sleb.engine.loader import load_weights
from sleb.engine.text import TextProcessor
from sleb.engine.weights import all_sublayers
from sleb.fetch import resolve_model
from sleb.kernels.reference import causal_attention
from sleb.kernels.registry import select_kernels
from sleb.layer_map import Unit

# Rows of logits at once: 512 rows of 128k entries in float32 are 256 MiB.
_LOSS_ROWS = 512


class DecoderScorer:
    """`sleb.search.ScoringModel` over the engine's decoder. W windows of L tokens, hidden size E.

    Attributes:
        num_blocks, hidden_size, max_length: of the model; max_length is its longest window in tokens.
        fingerprint, model_name: for the layer map. tokenizer: a `tokenizers.Tokenizer`, or None.
    """

    def __init__(self, decoder: Decoder, model_name: str, text: TextProcessor) -> None:
        spec = decoder.spec
        self._decoder = decoder
        self.num_blocks = spec.num_blocks
        self.hidden_size = spec.hidden_size
        self.max_length = spec.max_positions
        self.fingerprint = spec.fingerprint
        self.model_name = model_name
        self.tokenizer = text.tokenizer

    @classmethod
    def load(cls, model: str, dtype: str = "float32", device: str = "auto") -> DecoderScorer:
        """The scorer of MODEL (folder, hub id, .gguf or alias). Raises ModelError or ConfigError."""
        EngineConfig(model, dtype=dtype).check()
        target = resolve_device(device)
        resolved = resolve_model(model)
        spec = resolve_spec(resolved.path)
        chosen = resolve_dtype(dtype, "auto", spec.checkpoint_dtype)
        weights = load_weights(resolved.path, spec, all_sublayers(spec), chosen, target)
        kernels = select_kernels("torch", target)
        decoder = Decoder(spec, weights, kernels, spec.max_positions, target)
        return cls(decoder, resolved.name, TextProcessor(resolved.path))

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [W, L] int64 to hidden states [W, L, E]."""
        flat = token_ids.to(self._decoder.device).reshape(-1)
        return self._decoder.embed(flat, self._positions(*token_ids.shape)).view(*token_ids.shape, -1)

    @torch.inference_mode()
    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        """Hidden states [W, L, E] after `unit`, as a new tensor; a block is its attention, then its MLP."""
        num_windows, length, _ = hidden.shape
        rotation = self._decoder.rotation(self._positions(num_windows, length))
        flat = hidden.reshape(num_windows * length, -1)

        def attend(block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (part.unflatten(0, (num_windows, length)) for part in (query, key, value))
            window = self._decoder.spec.windows[block]
            return causal_attention(query, key, value, self._decoder.scale, window)

        for sublayer in unit.sublayers:
            flat = self._decoder.run(sublayer, flat, rotation, attend)
        return flat.view(hidden.shape)

    @torch.inference_mode()
    def loss(self, hidden: Tensor, token_ids: Tensor) -> float:
        """Sum over the windows of mean cross-entropy (L − 1 targets, float32) × L."""
        num_windows, length = token_ids.shape
        states = hidden[:, :-1].reshape(num_windows * (length - 1), -1)
        targets = token_ids[:, 1:].reshape(-1).to(states.device)
        total = 0.0
        for start in range(0, states.shape[0], _LOSS_ROWS):
            logits = self._decoder.logits(states[start : start + _LOSS_ROWS])
            total += F.cross_entropy(logits, targets[start : start + _LOSS_ROWS], reduction="sum").item()
        return total / (length - 1) * length

    def _positions(self, num_windows: int, length: int) -> Tensor:
        return torch.arange(length, device=self._decoder.device).repeat(num_windows)
