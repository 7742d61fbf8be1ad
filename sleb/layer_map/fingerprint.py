"""The identity of a model's shape, so that a layer map is not applied to a model that it was not found on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

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


def shape_fingerprint(
    model_type: str, config: Mapping[str, Any], defaults: Sequence[int | None] | None
) -> str:
    """`"sha256:" + hex` over the shape in a config.json: family, blocks, widths, heads, vocabulary.

    Names are normalised (OPT's `ffn_dim` is `intermediate_size`) and `defaults`, in the order of FIELDS, filled in, so
    that a configuration that writes a default and one that leaves it out agree. Weights, precision, rope and
    generation settings do not count: a fine-tuned model keeps its base model's fingerprint.
    """
    missing = dict(zip(FIELDS, defaults or (None,) * len(FIELDS), strict=True))
    shape: dict[str, Any] = {}
    for field, names in FIELDS.items():
        present = [config[name] for name in names if name in config]
        shape[field] = present[0] if present else missing[field]
    if shape["num_kv_heads"] is None:
        shape["num_kv_heads"] = shape["num_heads"]
    if shape["head_dim"] is None and shape["hidden_size"] and shape["num_heads"]:
        shape["head_dim"] = shape["hidden_size"] // shape["num_heads"]
    text = json.dumps({"family": model_type, **shape}, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
