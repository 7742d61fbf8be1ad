"""A model's config.json for what is left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sleb.errors import ConfigError
from sleb.models.families import FAMILIES

if TYPE_CHECKING:  # it needs torch, which reading a list does not
    from sleb.engine.model.architecture import DecoderSpec


# Lists that are as long as the model is deep by chance only: tokens, names, frequencies of a head, parts of a block.
NOT_PER_BLOCK = frozenset(
    {
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "id2label",
        "label2id",
        "rope_scaling",
        "rope_parameters",
        "ssm_multipliers",
        "mlp_multipliers",
        "time_step_limit",
        "mlp_only_layers",
    }
)
# Remote code is not copied, and a folder's own name means nothing elsewhere.
_DROPPED = ("auto_map", "_name_or_path")


def full_config(raw: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The config.json of a checkpoint in which no block is missing: the source's own."""
    config = {name: value for name, value in raw.items() if name not in _DROPPED}
    config.setdefault("architectures", [architecture])
    return config


def compact_config(raw: Mapping[str, Any], spec: DecoderSpec, kept_blocks: Sequence[int]) -> dict[str, Any]:
    """The config.json of a checkpoint with only these blocks, numbered anew.

    Every list with a value for each block is cut, and what the configuration class would derive from a block's
    number (a window from `max_window_layers`, rotation from `no_rope_layer_interval`) is stated.
    """
    config: dict[str, Any] = cut_lists(full_config(raw, spec.architecture), spec.num_blocks, kept_blocks)
    config[FAMILIES[spec.architecture].own("num_hidden_layers")] = len(kept_blocks)
    if spec.experts is not None and not all(spec.experts.blocks):
        config |= _expert_blocks(spec, [spec.experts.blocks[block] for block in kept_blocks])
    if isinstance(raw.get("max_window_layers"), int):  # the blocks below it have no window
        config["max_window_layers"] = sum(block < raw["max_window_layers"] for block in kept_blocks)
    whole = per_block_lists(spec, range(spec.num_blocks))
    stated = {name for name, values in whole.items() if name in raw or len(set(values)) > 1}
    config |= {name: values for name, values in per_block_lists(spec, kept_blocks).items() if name in stated}
    if "attention_layers" in stated:  # GPT-Neo's class makes them of runs: kinds, and how many times
        config["attention_types"] = [[config["attention_layers"], 1]]
    return config


def _expert_blocks(spec: DecoderSpec, blocks: Sequence[bool]) -> dict[str, Any]:
    """How config.json says which of these blocks have experts. Raises ConfigError where it has no words for it."""
    if "mlp_only_layers" in FAMILIES[spec.architecture].fields:
        dense = [number for number, has_experts in enumerate(blocks) if not has_experts]
        return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    first = blocks.index(True) if True in blocks else len(blocks)
    number = sum(blocks)
    if not all(blocks[first : first + number]):
        raise ConfigError(
            f"{spec.architecture} can only have its experts in neighbouring blocks: use --format zeroed, or another "
            "depth"
        )
    return {
        "moe_layer_start_index": first,
        "moe_layer_end_index": first + number - 1 if number else 0,
        "moe_layer_interval": 1,
    }


def per_block_lists(spec: DecoderSpec, kept_blocks: Sequence[int]) -> dict[str, list[Any]]:
    """The lists that the family reads and that have a value for each block, cut to these blocks."""
    lists: dict[str, list[Any]] = {
        "layer_types": ["full_attention" if each is None else "sliding_attention" for each in spec.windows],
        "attention_layers": ["global" if each is None else "local" for each in spec.windows],
        "no_rope_layers": [int(rotary is not None) for rotary in spec.block_rotary],
    }
    reads = FAMILIES[spec.architecture].fields
    return {name: [lists[name][block] for block in kept_blocks] for name in lists if name in reads}


def cut_lists(value: Any, num_blocks: int, kept_blocks: Sequence[int]) -> Any:
    """A configuration, or a part of one, whose lists with a value for each block are cut to the kept blocks."""
    if isinstance(value, dict):
        return {
            name: each if name in NOT_PER_BLOCK else cut_lists(each, num_blocks, kept_blocks)
            for name, each in value.items()
        }
    if isinstance(value, list) and len(value) == num_blocks:
        return [value[block] for block in kept_blocks]
    return value
