"""LLM-Drop's lists (github.com/CASE-Lab-UMD/LLM-Drop, src/llmtuner/compression/prune): two fields of a config.json.

    "drop_mlp_list": [26, 27, 25, 24], "drop_attn_list": [25, 26, 24, 22]

Each holds the numbers of the blocks that lose that part, or, as `save_pretrained` of a loaded model writes it, a truth
value a block (configuration_dropped_llama.py takes both). A block in both lists is dropped whole. The number of
blocks in the config stays that of the original model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sleb.errors import LayerMapError
from sleb.formats.removal import Imported, Removal, block_numbers
from sleb.layer_map.units import Unit, is_int

_ATTENTION, _MLP = "drop_attn_list", "drop_mlp_list"


def write_llm_drop(removal: Removal) -> str:
    """The two fields, to be put into the config.json of a model with LLM-Drop's code."""
    fields = {
        name: [block for block, kind in removal.sublayers if kind == part]
        for name, part in ((_MLP, "mlp"), (_ATTENTION, "attention"))
    }
    return json.dumps(fields) + "\n"


def is_llm_drop(document: Any) -> bool:
    return isinstance(document, dict) and (_ATTENTION in document or _MLP in document)


def read_llm_drop(document: Any) -> Imported:
    """Blocks in both lists become whole blocks, in the order of the attention list; MLPs alone come last."""
    if not is_llm_drop(document):
        raise LayerMapError(f"it has neither {_ATTENTION} nor {_MLP}, which LLM-Drop writes into config.json")
    num_blocks = document.get("num_hidden_layers")
    if num_blocks is not None and not is_int(num_blocks):
        raise LayerMapError(f"num_hidden_layers is {str(num_blocks)[:40]!r}; it must be an integer")
    attention = _dropped(document, _ATTENTION, num_blocks)
    mlp = _dropped(document, _MLP, num_blocks)
    units = [Unit(block, "block" if block in mlp else "attention") for block in attention]
    units += [Unit(block, "mlp") for block in mlp if block not in attention]
    return Imported(
        tuple(units),
        num_blocks=num_blocks,
        config=document if "model_type" in document else None,
        source="LLM-Drop's config.json",
    )


def _dropped(document: Mapping[str, Any], name: str, num_blocks: int | None) -> tuple[int, ...]:
    """The numbers in a list, each once: the tool may add one that was dropped before."""
    values = document.get(name) or []
    if not isinstance(values, list):
        raise LayerMapError(f"{name} is {str(values)[:40]!r}; it must be a list")
    if values and all(isinstance(value, bool) for value in values):
        if num_blocks is not None and len(values) != num_blocks:
            raise LayerMapError(
                f"{name} has {len(values)} truth values for {num_blocks} blocks; one a block is needed"
            )
        values = [block for block, value in enumerate(values) if value]
    return tuple(dict.fromkeys(block_numbers(values, name)))
