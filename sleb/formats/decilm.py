"""Nemotron-NAS (DeciLM) checkpoints: a Llama whose blocks may lack attention or MLP, as `block_configs` say.

    "block_configs": [{"attention": {"n_heads_in_group": 8, "no_op": false, "replace_with_linear": false, …},
                       "ffn": {"ffn_mult": 5.25, "no_op": false, "replace_with_linear": false, …}}, …]

Written by NVIDIA's Puzzle (nvidia/Llama-3_1-Nemotron-51B-Instruct, block_config.py); read by vLLM
(model_executor/models/nemotron_nas.py) and llama.cpp (conversion/deci.py). An MLP has
`ceil256(int(2 · ffn_mult · hidden_size / 3))` features; vLLM reads `intermediate_size` where there is no `ffn_mult`.

A patch is what takes fewer weights of two: a linear layer in place of an attention (`self_attn.linear_attn`, which has
no bias: the MLP behind it, of 256 features that add nothing, has the patch's), or an MLP as narrow as its rank allows
(`sleb.formats.patched`), which vLLM runs too. llama.cpp passes over a block whose MLP is a no_op, and so over its
attention: what we write for a patch always has an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sleb.errors import ConfigError, LayerMapError
from sleb.formats.model_config import full_config
from sleb.formats.removal import Imported, Removal
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Part, Unit, is_int

if TYPE_CHECKING:  # they need torch, which reading a list does not
    from sleb.engine.model.architecture import DecoderSpec
    from sleb.formats.patched import Array

MODEL_FILE = "modeling_decilm.py"
LINEAR = "self_attn.linear_attn.weight"
_MULTIPLE = 256  # of which the widths of MLPs are multiples
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_PARTS: dict[Part, str] = {"attention": "attention", "mlp": "ffn"}


@dataclass(frozen=True)
class Block:
    """A block as it is written.

    source: its number in the original; None: it is there for a patch alone. attention, mlp: whether that part is the
    original's. tensors: of a patch, by their names in the block.
    """

    source: int | None
    attention: bool = False
    mlp: bool = False
    tensors: Mapping[str, Array] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether a linear layer is in the place of the attention."""
        return LINEAR in self.tensors

    def num_neurons(self, spec: DecoderSpec) -> int:
        """The width of its MLP; 0: it has none."""
        made = self.tensors.get(f"{spec.names.down}.weight")
        return spec.intermediate_size if self.mlp else 0 if made is None else made.shape[1]


def decilm_blocks(spec: DecoderSpec, removal: Removal, patches: Sequence[Patch]) -> list[Block]:
    """The blocks to write. They keep their numbers where every patch finds room in one that lacks what it needs."""
    _check(spec, removal, patches)
    gone = set(removal.sublayers)
    blocks = {
        block: Block(block, (block, "attention") not in gone, (block, "mlp") not in gone)
        for block in range(spec.num_blocks)
    }
    added: list[tuple[int, Block]] = []  # with the number of the block before which it stands
    for patch in patches:
        tensors = _tensors(spec, patch)
        places = [
            block
            for block in range(patch.first[0], patch.last[0] + 1)
            if patch.first <= (block, "mlp") <= patch.last
            and (LINEAR not in tensors or patch.first <= (block, "attention"))
        ]
        if places:
            blocks[places[0]] = replace(blocks[places[0]], tensors=tensors)
        else:
            before = patch.first[0] + (patch.first[1] == "mlp")
            added.append((before, Block(None, tensors=tensors)))
    written: list[Block] = []
    for number in range(spec.num_blocks + 1):
        written += [block for before, block in added if before == number]
        written += [blocks[number]] if number in blocks else []
    return written


def _tensors(spec: DecoderSpec, patch: Patch) -> dict[str, Array]:
    from sleb.formats.patched import as_mlp, factors, plain_norm

    down, up = factors(patch)
    width, num_neurons = spec.hidden_size, _ceil(2 * len(down))
    if num_neurons * 3 <= width + _MULTIPLE * 3:
        return as_mlp(spec, down, up, patch.tensors["bias"], num_neurons)
    bias_alone = as_mlp(spec, down[:0], up[:, :0], patch.tensors["bias"], _MULTIPLE)
    return {LINEAR: up @ down} | plain_norm(spec, spec.names.attention_norm) | bias_alone


def decilm_config(raw: Mapping[str, Any], spec: DecoderSpec, blocks: Sequence[Block]) -> dict[str, Any]:
    """The config.json of a checkpoint of these blocks."""
    config = full_config(raw, spec.architecture) | {
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
        "num_hidden_layers": len(blocks),
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": spec.activation,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "block_configs": [_block_config(spec, block) for block in blocks],
    }
    if any(block.tensors for block in blocks):
        config["mlp_bias"] = True
    config.pop("sliding_window", None)
    return config


def _check(spec: DecoderSpec, removal: Removal, patches: Sequence[Patch]) -> None:
    """Raises ConfigError for what the format, or vLLM, cannot run."""
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
    if patches and patches[0].first == (0, "attention"):
        raise ConfigError(
            f"{patches[0].where} stands before the first attention, and vLLM's nemotron_nas.py can only start with "
            "one: use --format zeroed, --patches drop, or another depth"
        )


def _block_config(spec: DecoderSpec, block: Block) -> dict[str, dict[str, Any]]:
    attention: dict[str, Any] = {
        "no_op": not block.attention and not block.linear,
        "replace_with_linear": block.linear,
        "n_heads_in_group": spec.num_heads // spec.num_kv_heads if block.attention else None,
    }
    num_neurons = block.num_neurons(spec)
    ffn: dict[str, Any] = {"no_op": not num_neurons, "replace_with_linear": False}
    multiple = ffn_mult(num_neurons, spec.hidden_size)
    if ffn["no_op"]:
        ffn["ffn_mult"] = None
    elif multiple is not None:
        ffn["ffn_mult"] = multiple
    else:
        ffn["intermediate_size"] = num_neurons
    return {"attention": attention, "ffn": ffn}


def ffn_mult(intermediate_size: int, hidden_size: int) -> float | None:
    """The multiple that readers turn back into `intermediate_size`, or None: they round up to a multiple of 256."""
    multiple = 3 * intermediate_size / (2 * hidden_size)
    size = int(2 * multiple * hidden_size / 3)
    return multiple if _ceil(size) == intermediate_size else None


def _ceil(size: int) -> int:
    """`size` rounded up to what `ffn_mult` can say."""
    return -(-size // _MULTIPLE) * _MULTIPLE


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
