"""`export`: a model at one depth of a layer map, in any notation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sleb.errors import ConfigError
from sleb.formats import EXPORT_FORMATS, FOLDER_FORMATS, check_format
from sleb.formats.blockpruner import write_blockpruner
from sleb.formats.checkpoint import export_folder
from sleb.formats.gguf_file import export_gguf
from sleb.formats.llm_drop import write_llm_drop
from sleb.formats.mergekit import write_mergekit
from sleb.formats.output import check_file, check_folder, write_file
from sleb.formats.removal import Mending, Removal, check_way
from sleb.formats.removal_list import write_llama_cpp, write_removal_list
from sleb.formats.safetensors_copy import SHARD_BYTES, Progress
from sleb.formats.source import Source, choose_removal, open_source
from sleb.layer_map.layer_map import LayerMap

_TEXTS: dict[str, Callable[[Removal, Source], str]] = {
    "mergekit": lambda removal, source: write_mergekit(removal, source.spec, source.reference),
    "removal-list": lambda removal, source: write_removal_list(removal),
    "llm-drop": lambda removal, source: write_llm_drop(removal),
    "blockpruner": lambda removal, source: write_blockpruner(removal),
    "llama.cpp": lambda removal, source: write_llama_cpp(removal, source.spec, source.gguf),
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def export_model(
    model: str,
    notation: str,
    output: str | os.PathLike[str] | None = None,
    *,
    layer_map: LayerMap | str | os.PathLike[str] | None = None,
    depth: int | None = None,
    patches: str = "keep",
    merge: Callable[[Removal], Mending] | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    gguf_type: str = "auto",
    progress: Progress | None = None,
) -> tuple[Removal, str | None]:
    """Writes `model` at a depth of its map to `output`: a folder for FOLDER_FORMATS, a GGUF file, else a text file.

    Without `output` a text is only returned, as the second value. The first says what was removed, and what became of
    patches. patches: one of PATCH_WAYS; "merge" needs `merge`, which fits them. gguf_type: one of GGUF_TYPES.
    `progress` counts bytes of weights. Raises ConfigError, ModelError or LayerMapError.
    """
    check_format(notation, EXPORT_FORMATS)
    target = None if output is None else Path(output)
    _check_place(notation, target, force)
    source = open_source(model, weights=notation not in _TEXTS, progress=progress is not None)
    removal = choose_removal(source, layer_map, depth)
    check_way(removal, notation, patches)
    if removal.layer_map.patches is not None:
        found = removal.layer_map.patches_at(removal.depth, source.spec.hidden_size)
        removal = replace(removal, mending=Mending(patches, found))
    if notation in _TEXTS:
        text = _TEXTS[notation](removal, source)
        if target is not None:
            write_file(target, text, force=force)
        return removal, text
    if patches == "merge":
        if merge is None:
            raise ConfigError("patches are merged on a text: name one with --calibration")
        removal = replace(removal, mending=merge(removal))
    assert target is not None
    if notation == "gguf":
        export_gguf(removal, source, target, kind=gguf_type, force=force, progress=progress)
    else:
        export_folder(
            removal, source, target, notation, force=force, shard_bytes=shard_bytes, progress=progress
        )
    return removal, None


def parse_size(text: str) -> int:
    """Bytes from a size like 5GB, 500MB or 1000000. Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?([KMG]?)B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ConfigError(f"size {text!r} must be like 5GB, 500MB or a number of bytes, and more than zero")
    return size


def _check_place(notation: str, target: Path | None, force: bool) -> None:
    """What can be refused before a model is fetched."""
    if target is None:
        if notation not in _TEXTS:
            what = "a folder" if notation in FOLDER_FORMATS else "a file that is no text"
            raise ConfigError(f"format {notation} writes {what}: name one with --output")
    elif notation in FOLDER_FORMATS:
        check_folder(target, force=force)
    else:
        check_file(target, force=force)
