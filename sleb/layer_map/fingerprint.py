"""The identity of a model's shape, so that a layer map is not applied to a model that it was not found on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# The fields of the fingerprint and the names that configurations give them.
_FIELDS: dict[str, tuple[str, ...]] = {
    "num_blocks": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocabulary_size": ("vocab_size",),
}

# What transformers' configuration classes fill in for a key that config.json leaves out, in the order of
# _FIELDS. None: derived from the other fields.
_DEFAULTS: dict[str, tuple[int | None, ...]] = {
    "llama": (32, 4096, 11008, 32, None, None, 32000),
    "mistral": (32, 4096, 14336, 32, 8, None, 32000),
    "qwen2": (32, 4096, 22016, 32, 32, None, 151936),
    "qwen3": (32, 4096, 22016, 32, 32, 128, 151936),
    "smollm3": (36, 2048, 11008, 16, 4, None, 128256),
    "phi3": (32, 3072, 8192, 32, None, None, 32064),
    "opt": (12, 768, 3072, 12, None, None, 50272),
}


def model_fingerprint(config: Mapping[str, Any]) -> str:
    """`"sha256:" + hex` over the shape in a config.json: family, blocks, widths, heads, vocabulary.

    Names are normalised (OPT's `ffn_dim` is `intermediate_size`) and defaults filled in, so that a
    configuration that writes a default and one that leaves it out agree. Weights, precision, rope and
    generation settings do not count: a fine-tuned model keeps its base model's fingerprint.
    """
    family = str(config.get("model_type", "unknown"))
    defaults = dict(zip(_FIELDS, _DEFAULTS.get(family, (None,) * len(_FIELDS)), strict=True))
    shape: dict[str, Any] = {}
    for field, names in _FIELDS.items():
        present = [config[name] for name in names if name in config]
        shape[field] = present[0] if present else defaults[field]
    if shape["num_kv_heads"] is None:
        shape["num_kv_heads"] = shape["num_heads"]
    if shape["head_dim"] is None and shape["hidden_size"] and shape["num_heads"]:
        shape["head_dim"] = shape["hidden_size"] // shape["num_heads"]
    text = json.dumps({"family": family, **shape}, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
