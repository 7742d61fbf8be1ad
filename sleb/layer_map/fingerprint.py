"""The identity of a model's shape, so that a layer map is not applied to a model that it was not found on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sleb.fields import Fields

# The fields of the fingerprint and the names that configurations give them.
FIELDS: dict[str, tuple[str, ...]] = {
    "num_blocks": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocabulary_size": ("vocab_size",),
}
EXPERT_FIELDS = {
    "num_experts": ("num_experts", "num_local_experts", "moe_num_experts"),
    "expert_size": ("moe_intermediate_size",),
}

_MOST = 1 << 40  # of a shape that is only compared


def shape_fingerprint(model_type: str, config: Fields, defaults: Mapping[str, Any]) -> str:
    """`"sha256:" + hex` over the shape in a config.json: family, blocks, widths, heads, vocabulary.

    Names are normalised (OPT's `ffn_dim` is `intermediate_size`) and `defaults`, by the config's names, filled in, so
    that a configuration that writes a default and one that leaves it out agree. Weights, precision, rope and
    generation settings do not count: a fine-tuned model keeps its base model's fingerprint. Raises the config's error
    for a shape that is no number.
    """
    shape: dict[str, Any] = {}
    for field, names in FIELDS.items():
        present = [name for name in names if name in config.values]
        shape[field] = (
            config.integer(present[0], 1, _MOST, None)
            if present
            else next((defaults[name] for name in names if name in defaults), None)
        )
    for field, names in EXPERT_FIELDS.items():  # said of models that have experts alone
        found = [config.integer(name, 1, _MOST, defaults.get(name)) for name in names]
        if number := next((each for each in found if each is not None), None):
            shape[field] = number
    if shape["num_kv_heads"] is None:
        shape["num_kv_heads"] = shape["num_heads"]
    if shape["head_dim"] is None and shape["hidden_size"] and shape["num_heads"]:
        shape["head_dim"] = shape["hidden_size"] // shape["num_heads"]
    text = json.dumps({"family": model_type, **shape}, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
