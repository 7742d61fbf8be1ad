"""GGUF files of llama.cpp's architecture `deci`: a Llama whose blocks may lack attention or MLP, or have a linear layer
in the place of an attention. llama.cpp has it for Nemotron-NAS; the blocks are those of `sleb.formats.decilm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sleb.engine.model.architecture import DecoderSpec
from sleb.errors import ConfigError
from sleb.formats.decilm import LINEAR, Block, decilm_blocks
from sleb.formats.gguf_source import FileModel, GgufSource
from sleb.formats.patched import biases_field
from sleb.formats.removal import Removal
from sleb.models.gguf.tensors import place_of
from sleb.models.gguf.values import Values, made_values
from sleb.models.gguf.writer import as_key, renamed

_IDLE_WIDTH = 32  # of the MLP that adds nothing, where llama.cpp wants one


def deci_model(source: GgufSource, removal: Removal, model: FileModel) -> FileModel:
    """The same blocks as `--format decilm` writes, in llama.cpp's architecture for them."""
    spec, a = source.spec, source.architecture
    if a != "llama":
        raise ConfigError(
            f"of {spec.architecture} only whole blocks can be left out in a GGUF file, without patches: use a depth of "
            "whole blocks with --patches drop, or merge where the family's MLPs may have biases, or --format zeroed"
        )
    every = source.placed(**biases_field(spec)).items()
    prefix = f"{spec.names.block.format(block=0)}."
    named = {each.name.removeprefix(prefix): place_of(name)[1] for name, each in every}
    named[LINEAR] = "attn_output.weight"
    tensors = {name: values for name, values in model.tensors.items() if place_of(name)[0] is None}
    written: list[Block] = []
    for block in decilm_blocks(spec, removal, removal.mending.kept):
        width = block.num_neurons(spec)
        if not (block.attention or block.linear or width):
            continue
        index = len(written)
        written.append(block)
        for name, values in model.tensors.items():
            number, rest = place_of(name)
            kept = block.mlp if rest.startswith("ffn_") else block.attention
            if number is not None and number == block.source and kept:
                tensors[f"blk.{index}.{rest}"] = values
        for name, array in block.tensors.items():
            tensors[f"blk.{index}.{named[name]}"] = made_values(np.asarray(array, np.float32), "exact")
        if not width:  # llama.cpp passes over a block without an MLP, and so over its attention
            tensors |= _idle_mlp(spec, index)
    return FileModel(_deci_keys(source, model.keys, written), tensors)


def _idle_mlp(spec: DecoderSpec, index: int) -> dict[str, Values]:
    hidden = spec.hidden_size
    shapes = {
        "ffn_gate": (_IDLE_WIDTH, hidden),
        "ffn_up": (_IDLE_WIDTH, hidden),
        "ffn_down": (hidden, _IDLE_WIDTH),
    }
    made = {name: made_values(np.zeros(shape, np.float32), "exact") for name, shape in shapes.items()}
    made["ffn_norm"] = made_values(np.ones(hidden, np.float32))
    return {f"blk.{index}.{name}.weight": values for name, values in made.items()}


def _deci_keys(source: GgufSource, keys: Mapping[str, bytes], blocks: list[Block]) -> dict[str, bytes]:
    spec = source.spec
    found: dict[str, bytes] = {}
    for name, raw in keys.items():
        there = f"deci.{name.removeprefix('llama.')}" if name.startswith("llama.") else name
        found[there] = renamed(there, raw)
    lists: dict[str, Any] = {
        "general.architecture": "deci",
        "deci.block_count": len(blocks),
        "deci.attention.head_count": [
            spec.num_heads if each.attention or each.linear else 0 for each in blocks
        ],
        "deci.attention.head_count_kv": [spec.num_kv_heads if each.attention else 0 for each in blocks],
        "deci.feed_forward_length": [each.num_neurons(spec) or _IDLE_WIDTH for each in blocks],
        "deci.attention.key_length": spec.head_dim,
        "deci.attention.value_length": spec.head_dim,
        "deci.rope.dimension_count": spec.head_dim,
    }
    return found | {name: as_key(name, value) for name, value in lists.items()}
