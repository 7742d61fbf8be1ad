"""What families with rotary embedding read of a config.json, and what they have in common."""

from __future__ import annotations

from typing import Any

from sleb.models.families.family import TensorNames

ABSENT: Any = object()  # in the place of a shape's number: a field that the family does not read

LLAMA_BIASES: Any = {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"}
ATTENTION_BIASES: Any = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
USE_BIAS: Any = {"qkv_bias": "use_bias", "out_bias": "use_bias", "mlp_bias": "use_bias"}
ALL_BIASES: Any = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
WINDOW: Any = {"sliding_window": 4096, "layer_types": None}
MULTIPLIERS: Any = {
    "embed_scale": "embedding_multiplier",
    "attention_scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
}
MULTIPLIER_FIELDS: Any = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
POST_NORMS = TensorNames(
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)


def rotary_fields(
    *shape: Any,
    positions: int,
    eps: tuple[str, float] | None = ("rms_norm_eps", 1e-6),
    biases: tuple[str, ...] = (),
    theta: float = 10000.0,
    tokens: tuple[Any, Any, Any] = (None, None, None),
    **own: Any,
) -> dict[str, Any]:
    """The fields of such a family, each with what stands for it where it is absent.

    shape: in the order of its names below. eps: the field of the norms' epsilon. biases: fields that say whether
    there are some, false in silence. tokens: that begin, end and fill up. own: beside these, or instead.
    """
    blocks = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    heads = ("num_key_value_heads", "head_dim", "vocab_size")
    fields = {
        **dict(zip(blocks + heads, shape, strict=True)),
        "max_position_embeddings": positions,
        "original_max_position_embeddings": None,  # rotary scaling takes it before the one in its own object
        "rope_theta": theta,
        "hidden_act": "silu",
        **dict([] if eps is None else [eps]),
        **dict.fromkeys(biases, False),
        "tie_word_embeddings": False,
        **dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), tokens, strict=True)),
        **own,
    }
    return {name: default for name, default in fields.items() if default is not ABSENT}
