"""Pruned checkpoints: which tensors of the source go where, its configuration, and what is copied beside them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.checkpoint import open_checkpoint
from sleb.errors import ConfigError
from sleb.fields import shown_path
from sleb.formats.decilm import MODEL_FILE, decilm_blocks, decilm_config
from sleb.formats.model_config import compact_config, full_config
from sleb.formats.output import new_folder
from sleb.formats.patched import (
    as_mlp,
    biases_field,
    check_exact,
    factors,
    made_tensors,
    zero_biases,
    zero_tensors,
)
from sleb.formats.provenance import write_provenance
from sleb.formats.removal import Removal
from sleb.formats.safetensors_copy import (
    SHARD_BYTES,
    LocatedTensor,
    Progress,
    locate,
    write_checkpoint,
)
from sleb.formats.source import Source
from sleb.layer_map.patches import Array
from sleb.layer_map.units import Part, Sublayer
from sleb.models.config import read_config
from sleb.models.weight_files import stored_tensors

# Everything of a model's folder but its configuration, weights, code and papers.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def export_folder(
    removal: Removal,
    source: Source,
    target: Path,
    notation: str,
    *,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes the folder `target` in one of FOLDER_FORMATS. Memory holds the tensors of patches, and little else.

    Raises ConfigError for what the notation cannot express or a place that cannot be written, ModelError for a
    checkpoint that is not whole.
    """
    contents = _contents if source.known else _any_contents
    config, tensors = contents(removal, source, notation)
    with new_folder(target, force=force, source=source.path) as folder:
        write_checkpoint(tensors, folder, shard_bytes=shard_bytes, progress=progress)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        if notation == "decilm":
            shutil.copyfile(Path(__file__).with_name("decilm_model.py"), folder / MODEL_FILE)
        _copy_beside(source.path, folder)
        write_provenance(folder, removal, source, notation)


def _contents(removal: Removal, source: Source, notation: str) -> tuple[dict[str, Any], list[LocatedTensor]]:
    """The config.json and the tensors of an export."""
    raw, checkpoint = read_config(source.path).values, open_checkpoint(source.path, source.spec)
    plan = _PLANS[notation](raw, checkpoint.spec, removal)
    config = plan.config
    if checkpoint.spec.tied_embeddings != source.spec.tied_embeddings:
        config["tie_word_embeddings"] = checkpoint.spec.tied_embeddings
    if checkpoint.quantized:
        _check_quantized(raw, plan, notation, source)
    located = locate({**checkpoint.tensors, **checkpoint.extras})
    chosen = [each for tensor in located if (each := plan.choose(tensor)) is not None]
    tensors = [each for each in chosen if each.name not in plan.made]
    dtype = checkpoint.tensors[f"{source.spec.names.embed}.weight"].dtype
    rounded = removal.mending.way == "merge"  # as the others of the checkpoint
    tensors += made_tensors(plan.made, dtype, rounded=rounded) + zero_tensors(plan.zeros, dtype)
    return config, tensors


def _check_quantized(raw: Mapping[str, Any], plan: _Plan, notation: str, source: Source) -> None:
    """Raises ConfigError where a quantised checkpoint's bytes cannot be written as they are."""
    place = f"{shown_path(source.path)} holds quantised weights"
    if notation != "hf" or plan.made:
        what = "patches that are merged into matrices" if notation == "hf" else f"format {notation}"
        raise ConfigError(f"{place}, and {what} would change them: use --format hf and --patches drop")
    words = json.dumps({name: values for name, values in raw.items() if name.startswith("quantization")})
    if re.search(r"layers[.\\]+\d", words):
        raise ConfigError(
            f"{place}, and config.json says of some blocks by number how; kept blocks get other numbers: serve the map "
            "with the whole checkpoint"
        )


def _any_contents(
    removal: Removal, source: Source, notation: str
) -> tuple[dict[str, Any], list[LocatedTensor]]:
    """The same for an architecture that the engine does not know: whole blocks of it can be left out."""
    from sleb.formats.shortened import shortened  # transformers: for these alone

    if notation != "hf":
        source.spec  # noqa: B018  # refuses the architecture
    removal.whole_blocks(notation)
    stored = stored_tensors(source.path)
    raw = read_config(source.path).values
    config, names = shortened(source.path, raw, list(stored), removal.kept_blocks)
    located = locate({name: stored[name] for name in names})
    return config, [replace(tensor, name=names[tensor.name]) for tensor in located]


@dataclass(frozen=True)
class _Plan:
    """What a checkpoint holds.

    choose: a tensor of the source as it is written, or None. made: tensors of our own, which take the place of those of
    the same name. zeros: shapes of others that are zero.
    """

    config: dict[str, Any]
    choose: Callable[[LocatedTensor], LocatedTensor | None]
    made: Mapping[str, Array] = field(default_factory=dict)
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def _compact(raw: Mapping[str, Any], spec: DecoderSpec, removal: Removal) -> _Plan:
    """The kept blocks only, numbered anew."""
    removal.whole_blocks("hf")
    new_number = {block: index for index, block in enumerate(removal.kept_blocks)}

    def choose(tensor: LocatedTensor) -> LocatedTensor | None:
        place = _place(spec, tensor.name)
        if place is None:
            return tensor
        block, rest = place
        if block not in new_number:
            return None
        return replace(tensor, name=f"{spec.names.block.format(block=new_number[block])}.{rest}")

    config = compact_config(raw, spec, removal.kept_blocks)
    prefixes = {block: spec.names.block.format(block=number) for block, number in new_number.items()}
    made = {
        f"{prefixes[block]}.{name}": array
        for block, tensors in removal.mending.merged.items()
        for name, array in tensors.items()
    }
    if spec.mlp_bias or not made or not biases_field(spec):
        return _Plan(config, choose, made)
    zeros = {name: shape for prefix in prefixes.values() for name, shape in zero_biases(spec, prefix).items()}
    zeros = {name: shape for name, shape in zeros.items() if name not in made}
    return _Plan(config | biases_field(spec), choose, made, zeros)


def _zeroed(raw: Mapping[str, Any], spec: DecoderSpec, removal: Removal) -> _Plan:
    """Every tensor, but zeros for the output projections, and their biases, of what is removed."""
    if not spec.norm_first:
        raise ConfigError(
            f"{spec.architecture} has its norms after the residual add here, so a part that adds zero still changes "
            "its input: use --format hf with a depth of whole blocks"
        )
    zeroed = {
        f"{spec.names.block.format(block=block)}.{name}"
        for block, part in removal.sublayers
        for name in _outputs(spec, block, part)
    }

    def choose(tensor: LocatedTensor) -> LocatedTensor:
        return replace(tensor, zero=tensor.name in zeroed)

    if not removal.mending.kept:
        return _Plan(full_config(raw, spec.architecture), choose)
    check_exact(spec, removal.mending.kept, "zeroed")
    made: dict[str, Array] = {}
    for patch in removal.mending.kept:
        block = patch.first[0]  # its MLP is in the run, unless that is one attention alone
        down, up = factors(patch)
        if patch.last == (block, "attention") or 2 * len(down) > spec.intermediate_size:
            raise ConfigError(
                f"{patch.where}, of rank {len(down)}, has no room in format zeroed, which keeps it in a removed MLP of "
                f"at least {2 * len(down)} features: use --format decilm or --patches drop"
            )
        prefix = spec.names.block.format(block=block)
        tensors = as_mlp(spec, down, up, patch.tensors["bias"], spec.intermediate_size)
        made |= {f"{prefix}.{name}": array for name, array in tensors.items()}
    prefixes = [spec.names.block.format(block=block) for block in range(spec.num_blocks)]
    zeros = (
        {}
        if spec.mlp_bias
        else {
            name: shape
            for prefix in prefixes
            for name, shape in zero_biases(spec, prefix).items()
            if name not in made
        }
    )
    return _Plan(full_config(raw, spec.architecture) | biases_field(spec), choose, made, zeros)


def _outputs(spec: DecoderSpec, block: int, part: Part) -> Iterator[str]:
    """The tensors, by their names in the block, through which alone a sublayer adds to the residual."""
    module = spec.names.attention_out if part == "attention" else spec.names.down
    if part == "mlp" and spec.experts is not None and spec.experts.blocks[block]:
        names = spec.experts.names
        yield from {names.down.format(expert=expert) for expert in range(spec.experts.number)}
        yield str(names.down_bias)
        module = f"{names.shared}.{module.rpartition('.')[2]}"
    yield from (f"{module}.{kind}" for kind in ("weight", "bias"))


def _decilm(raw: Mapping[str, Any], spec: DecoderSpec, removal: Removal) -> _Plan:
    """The tensors of what is kept, and of patches; blocks keep their numbers unless a patch needs one of its own."""
    check_exact(spec, removal.mending.kept, "decilm")
    blocks = decilm_blocks(spec, removal, removal.mending.kept)
    prefixes = [spec.names.block.format(block=number) for number in range(len(blocks))]
    written = {block.source: prefix for block, prefix in zip(blocks, prefixes, strict=True)}
    removed = set(removal.sublayers)

    def choose(tensor: LocatedTensor) -> LocatedTensor | None:
        place = _place(spec, tensor.name)
        if place is None:
            return tensor
        sublayer = _sublayer(spec, *place)
        if sublayer is None or sublayer in removed:
            return None
        return replace(tensor, name=f"{written[place[0]]}.{place[1]}")

    made: dict[str, Array] = {}
    zeros: dict[str, tuple[int, ...]] = {}
    for block, prefix in zip(blocks, prefixes, strict=True):
        made |= {f"{prefix}.{name}": array for name, array in block.tensors.items()}
        if removal.mending.kept and block.mlp and not spec.mlp_bias:
            zeros |= zero_biases(spec, prefix)
    return _Plan(decilm_config(raw, spec, blocks), choose, made, zeros)


_PLANS: dict[str, Callable[[Mapping[str, Any], DecoderSpec, Removal], _Plan]] = {
    "hf": _compact,
    "zeroed": _zeroed,
    "decilm": _decilm,
}


def _place(spec: DecoderSpec, name: str) -> tuple[int, str] | None:
    """The block that a tensor belongs to and its name there, or None."""
    before, after = spec.names.block.split("{block}")
    found = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after) + r"\.(.+)", name)
    return (int(found[1]), found[2]) if found else None


def _sublayer(spec: DecoderSpec, block: int, name: str) -> Sublayer | None:
    """The sublayer of a block's tensor; None for the buffers that old checkpoints carry."""
    names = spec.names
    module = name.rpartition(".")[0]
    if module in (names.attention_norm, *names.qkv, names.attention_out, names.query_norm, names.key_norm):
        return block, "attention"
    return (block, "mlp") if module in (names.mlp_norm, *names.up, names.down) else None


def _copy_beside(source: Path, folder: Path) -> None:
    for file in _files_beside(source):
        place = folder / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)  # follows the links of the hub's cache


def _files_beside(source: Path) -> Iterator[Path]:
    for pattern in _COPIED:
        yield from (file for file in sorted(source.glob(pattern)) if file.is_file())
