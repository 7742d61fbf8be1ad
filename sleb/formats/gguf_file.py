"""`export --format gguf`: a pruned model as one file, which llama.cpp and what is built on it run.

A model that came as a GGUF file keeps its own metadata and, unless another type is asked for, every bit of the kept
blocks' tensors. Whole blocks are left out and the others numbered anew. What llama.cpp derives from a block's number
(which blocks slide a window, which ones rotate, a factor on the scores) is stated, or refused where it cannot be.

What a Llama lacks of a block, and patches, take another architecture of llama.cpp's (`sleb.formats.gguf_deci`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sleb.errors import ConfigError
from sleb.formats import GGUF_TYPES
from sleb.formats.gguf_deci import deci_model
from sleb.formats.gguf_source import FILE_TYPES, FileModel, GgufSource
from sleb.formats.output import new_file
from sleb.formats.patched import biases_field
from sleb.formats.provenance import provenance
from sleb.formats.removal import Removal
from sleb.formats.safetensors_copy import Progress
from sleb.formats.source import Source
from sleb.models.gguf.reader import parsed_keys
from sleb.models.gguf.tensors import place_of
from sleb.models.gguf.values import Values, as_piece, made_values
from sleb.models.gguf.writer import as_key, write_gguf


def export_gguf(
    removal: Removal,
    source: Source,
    target: Path,
    *,
    kind: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes `target`. kind: one of GGUF_TYPES, of the matrices; "auto": as they are stored.

    Raises ConfigError for what GGUF or llama.cpp cannot say, or a place that cannot be written.
    """
    if kind not in GGUF_TYPES:
        raise ConfigError(f"GGUF type {kind!r} is unknown: choose {', '.join(GGUF_TYPES)}")
    if source.gguf is not None and target.exists() and target.samefile(source.gguf):
        raise ConfigError(f"output {target} is the model that is exported: name another file")
    config = GgufSource(source)
    as_deci = bool(removal.parts or removal.mending.kept)
    model = config.from_file(source.gguf) if source.gguf else config.from_checkpoint()
    if as_deci:
        model = deci_model(config, removal, model)
    else:
        _check_kept(config, removal.kept_blocks)
        model = _pruned(config, removal, model)
    pieces = [as_piece(name, values, kind) for name, values in model.tensors.items()]
    keys = {**model.keys, **_own_keys(removal, source)}
    if kind != "auto":
        keys["general.file_type"] = as_key("general.file_type", FILE_TYPES[kind.upper()])
    with new_file(target, force=force) as temporary, temporary.open("wb") as file:
        write_gguf(file, keys, pieces, progress)


def _check_kept(source: GgufSource, kept: tuple[int, ...]) -> None:
    """Raises ConfigError where llama.cpp would compute another model of the blocks `kept`."""
    gguf, spec, count = source.family.gguf, source.spec, len(kept)
    assert gguf is not None
    remedy = "use another depth, or --format hf with a tool that reads config.json"
    for name, (key, absent) in gguf.keys.items():
        fewer = source.values | {"num_hidden_layers": count}
        if key is None and callable(absent) and absent(fewer) != source.values[name]:
            raise ConfigError(
                f"a GGUF file does not say {name}, and llama.cpp would take {absent(fewer)} instead of "
                f"{source.values[name]} with {count} blocks: {remedy}"
            )
    if spec.experts is not None and not all(spec.has_experts(block) for block in kept):
        raise ConfigError(
            f"llama.cpp takes each block of {spec.architecture} for a mixture of experts: {remedy}"
        )
    rotates = [spec.block_rotary[block] is not None for block in kept]
    slides = any(spec.windows[block] for block in kept)
    every = gguf.unrotated_every
    expected = [(block + 1) % every != 0 for block in range(count)] if every else rotates
    if rotates != expected or (gguf.windows_if and slides and count != gguf.windows_if):
        raise ConfigError(
            "llama.cpp tells by a block's number, or by how many there are, whether it rotates positions or slides a "
            f"window, and would compute another model of these {count} blocks: {remedy}"
        )


def _own_keys(removal: Removal, source: Source) -> dict[str, bytes]:
    """What was removed, for people and programs; llama.cpp shows keys that it does not know."""
    record = provenance(removal, source, "gguf")
    facts = {
        "version": record["sleb_version"],
        "source_model": record["source_model"],
        "depth": record["depth"],
        "num_blocks": record["num_blocks"],
        "removed": record["removed"],
        "layer_map": record["layer_map"]["digest"],
        "patches": record["patches"]["written"] if record["patches"] else "none",
    }
    return {f"sleb.{name}": as_key(f"sleb.{name}", value) for name, value in facts.items()}


def _pruned(config: GgufSource, removal: Removal, model: FileModel) -> FileModel:
    """The kept blocks alone, numbered anew, with what patches have been merged into."""
    kept, a = removal.kept_blocks, config.architecture
    number = {block: index for index, block in enumerate(kept)}
    tensors: dict[str, Values] = {}
    for name, values in model.tensors.items():
        block, rest = place_of(name)
        if block is None:
            tensors[name] = values
        elif block in number:
            tensors[f"blk.{number[block]}.{rest}"] = values
    if removal.mending.merged:
        tensors = _with_merged(config, removal, number, tensors)
    keys = dict(model.keys) | {f"{a}.block_count": as_key(f"{a}.block_count", len(kept))}
    for name, raw in _lists(model.keys, a, removal.layer_map.num_blocks).items():
        keys[name] = as_key(name, [raw[block] for block in kept])
    return FileModel({**keys, **config.window_keys(kept)}, tensors)


def _lists(keys: Mapping[str, bytes], architecture: str, num_blocks: int) -> dict[str, list[Any]]:
    """The architecture's keys with a value for each block."""
    return {
        name: value
        for name, value in parsed_keys(keys, f"{architecture}.").items()
        if isinstance(value, list) and len(value) == num_blocks
    }


def _with_merged(
    config: GgufSource, removal: Removal, number: Mapping[int, int], tensors: Mapping[str, Values]
) -> dict[str, Values]:
    """With the output projections into which patches went. Where those have biases now, all of that MLP's have."""
    family, merged = config.family, removal.mending.merged
    biased = any(name.endswith(".bias") for each in merged.values() for name in each)
    placed = config.placed(**(biases_field(config.spec) if biased else {}))
    made = {
        f"{family.names.block.format(block=block)}.{name}": array
        for block, each in merged.items()
        for name, array in each.items()
    }
    found = dict(tensors)
    for name, each in placed.items():
        block, rest = place_of(name)
        if block is None or block not in number or "#" in name:
            continue
        name = f"blk.{number[block]}.{rest}"
        if each.name in made:
            stored = tensors[f"blk.{number[block]}.{each.part}.weight"].kind
            found[name] = made_values(made[each.name], stored if stored in FILE_TYPES else "Q8_0")
        elif name not in tensors:
            found[name] = made_values(np.zeros(each.shape, np.float32))
    return found
