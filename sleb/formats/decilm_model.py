"""A Llama whose blocks may lack attention or MLP, as `block_configs` say: for transformers and for vLLM's config.

This file is copied beside an exported DeciLM checkpoint, so it imports torch and transformers alone. vLLM takes only
the configuration from it (with --trust-remote-code) and runs a model of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class BlockSettings(dict[str, Any]):
    """A dictionary, so that it can be saved as JSON, whose keys are attributes, as readers expect."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """A Llama's configuration and, for each block, {"attention": {"no_op": …}, "ffn": {"no_op": …}}."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **options: Any) -> None:
        super().__init__(**options)
        blocks = block_configs or []
        self.block_configs = [
            BlockSettings({name: BlockSettings(settings) for name, settings in block.items()})
            for block in blocks
        ]


class NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class LinearAttention(nn.Module):
    """A linear layer in place of an attention."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        return self.linear_attn(hidden_states), None


class NoFeedForward(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class DeciLMForCausalLM(LlamaForCausalLM):
    """Removed parts have no weights and add zero; the KV cache counts the attentions that are left."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        num_attentions = 0
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            if block.attention.no_op:
                layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
            elif block.attention.replace_with_linear:
                layer.self_attn = LinearAttention(config.hidden_size)
            else:
                layer.self_attn.layer_idx = num_attentions
                num_attentions += 1
            if block.ffn.no_op:
                layer.mlp, layer.post_attention_layernorm = NoFeedForward(), nn.Identity()
            elif (size := intermediate_size(block.ffn, config.hidden_size)) != config.intermediate_size:
                own = copy.deepcopy(config)
                own.intermediate_size = size
                layer.mlp = type(layer.mlp)(own)


def intermediate_size(ffn: BlockSettings, hidden_size: int) -> int:
    """The width of a block's MLP: what `ffn_mult` says, rounded up to a multiple of 256."""
    if ffn.get("ffn_mult") is None:
        return int(ffn.intermediate_size)
    return -(-int(2 * ffn.ffn_mult * hidden_size / 3) // 256) * 256
