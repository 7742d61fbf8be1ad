"""Nemotron-NAS (DeciLM) checkpoints: a Llama whose blocks may lack attention or MLP, as `block_configs` say.

    "block_configs": [{"attention": {"n_heads_in_group": 8, "no_op": false, "replace_with_linear": false, …},
                       "ffn": {"ffn_mult": 5.25, "no_op": false, "replace_with_linear": false, …}}, …]

Written by NVIDIA's Puzzle (nvidia/Llama-3_1-Nemotron-51B-Instruct, block_config.py); read by vLLM
(model_executor/models/nemotron_nas.py) and llama.cpp (conversion/deci.py). An MLP has
`ceil256(int(2 · ffn_mult · hidden_size / 3))` features; vLLM reads `intermediate_size` where there is no `ffn_mult`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sleb.errors import ConfigError, LayerMapError
from sleb.formats.model_config import full_config
from sleb.formats.removal import Imported, Removal
from sleb.layer_map.units import Part, Unit, is_int

if TYPE_CHECKING:  # it needs torch, which reading a list does not
    from sleb.engine.model.architecture import DecoderSpec

MODEL_FILE = "modeling_decilm.py"
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_PARTS: dict[Part, str] = {"attention": "attention", "mlp": "ffn"}


def decilm_config(raw: Mapping[str, Any], spec: DecoderSpec, removal: Removal) -> dict[str, Any]:
    """The config.json; blocks keep their numbers. Raises ConfigError for what the format, or vLLM, cannot run."""
    _check(spec, removal)
    config = full_config(raw, spec) | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": MODEL_FILE.replace(".py", ".DeciLMConfig"),
            "AutoModelForCausalLM": MODEL_FILE.replace(".py", ".DeciLMForCausalLM"),
        },
        # Stated, since Mistral's defaults are not Llama's.
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_blocks,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": spec.activation,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "block_configs": [_block_config(spec, removal, block) for block in range(spec.num_blocks)],
    }
    config.pop("sliding_window", None)
    return config


def _check(spec: DecoderSpec, removal: Removal) -> None:
    if spec.architecture not in _ARCHITECTURES or any(spec.windows):
        raise ConfigError(
            f"format decilm is a Llama without sliding windows; {spec.architecture} here is none: use --format zeroed, "
            "or hf for whole blocks"
        )
    first = removal.kept_blocks[0]
    if (first, "attention") in removal.parts:
        raise ConfigError(
            f"block {first}, the first that runs, has no attention at depth {removal.depth}, which vLLM's "
            "nemotron_nas.py cannot start with: use --format zeroed, or another depth"
        )
    if all((block, "attention") in removal.sublayers for block in range(spec.num_blocks)):
        raise ConfigError(
            f"depth {removal.depth} removes every attention: use --format zeroed, or another depth"
        )


def _block_config(spec: DecoderSpec, removal: Removal, block: int) -> dict[str, dict[str, Any]]:
    attention: dict[str, Any] = {
        "no_op": (block, "attention") in removal.sublayers,
        "replace_with_linear": False,
    }
    attention["n_heads_in_group"] = None if attention["no_op"] else spec.num_heads // spec.num_kv_heads
    ffn: dict[str, Any] = {"no_op": (block, "mlp") in removal.sublayers, "replace_with_linear": False}
    multiple = ffn_mult(spec.intermediate_size, spec.hidden_size)
    if ffn["no_op"]:
        ffn["ffn_mult"] = None
    elif multiple is not None:
        ffn["ffn_mult"] = multiple
    else:
        ffn["intermediate_size"] = spec.intermediate_size
    return {"attention": attention, "ffn": ffn}


def ffn_mult(intermediate_size: int, hidden_size: int) -> float | None:
    """The multiple that readers turn back into `intermediate_size`, or None: they round up to a multiple of 256."""
    multiple = 3 * intermediate_size / (2 * hidden_size)
    size = int(2 * multiple * hidden_size / 3)
    return multiple if -(-size // 256) * 256 == intermediate_size else None


def is_decilm(document: Any) -> bool:
    return isinstance(document, dict) and "block_configs" in document


def read_decilm(document: Any) -> Imported:
    """What the blocks lack, from the first block to the last: the notation has no order.

    Raises LayerMapError for blocks that have something else in the place of a part.
    """
    blocks = document.get("block_configs") if isinstance(document, dict) else None
    if not isinstance(blocks, list) or not blocks:
        raise LayerMapError("it has no list block_configs, which a DeciLM config.json has")
    units: list[Unit] = []
    kept: set[str] = set()
    for block, entry in enumerate(blocks):
        gone: list[Part] = []
        for part, name in _PARTS.items():
            settings = entry.get(name) if isinstance(entry, dict) else None
            if not isinstance(settings, dict):
                raise LayerMapError(f"block_configs[{block}] has no {name}; it must be an object with no_op")
            if settings.get("no_op"):
                gone.append(part)
            elif settings.get("replace_with_linear"):
                raise LayerMapError(
                    f"block_configs[{block}].{name} is replaced by a linear layer; a layer map can only remove"
                )
            else:
                kept.add(f"{name} {settings.get('ffn_mult', settings.get('n_heads_in_group'))}")
        units += [Unit(block)] if len(gone) == len(_PARTS) else [Unit(block, part) for part in gone]
    notes: tuple[str, ...] = ()
    if len(kept) > len(_PARTS):
        notes = ("its blocks differ in width or in heads too; the map only says what is removed",)
    num_blocks = document.get("num_hidden_layers", len(blocks))
    if not is_int(num_blocks) or num_blocks != len(blocks):
        raise LayerMapError(
            f"num_hidden_layers is {str(num_blocks)[:20]}, but block_configs has {len(blocks)} entries"
        )
    return Imported(tuple(units), num_blocks=num_blocks, source="DeciLM config.json", notes=notes)
