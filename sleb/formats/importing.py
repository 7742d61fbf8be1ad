"""`import`: a foreign file as a layer map."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sleb.errors import ConfigError, LayerMapError
from sleb.fields import read_json
from sleb.formats import IMPORT_FORMATS, check_format
from sleb.formats.blockpruner import is_blockpruner, read_blockpruner
from sleb.formats.decilm import is_decilm, read_decilm
from sleb.formats.llm_drop import is_llm_drop, read_llm_drop
from sleb.formats.mergekit import is_mergekit, parse_yaml, read_mergekit
from sleb.formats.output import PROVENANCE
from sleb.formats.removal import Imported
from sleb.formats.removal_list import is_order, read_removal_list, read_sleb_result
from sleb.layer_map.layer_map import LayerMap, Patches, Unit
from sleb.layer_map.units import is_int
from sleb.models.config import model_fingerprint, read_config
from sleb.pruning.options import DEFAULT_REMOVE, parse_remove

Note = Callable[[str], None]

_READERS: dict[str, Callable[[str], Imported]] = {
    "removal-list": read_removal_list,
    "sleb-result": read_sleb_result,
    "llm-drop": lambda text: read_llm_drop(_json(text)),
    "blockpruner": lambda text: read_blockpruner(_json(text)),
    "mergekit": read_mergekit,
    "decilm": lambda text: read_decilm(_json(text)),
}
_MAX_BYTES = 1 << 26


def import_map(
    file: str | os.PathLike[str],
    notation: str = "auto",
    *,
    model: str | None = None,
    num_blocks: int | None = None,
    note: Note = lambda message: None,
) -> LayerMap:
    """The layer map that a foreign file, or a folder with a config.json, stands for.

    `model` (a MODEL, of which only the configuration is read) or `num_blocks` says how many blocks there are where the
    file does not; `note` gets remarks for people. Raises ConfigError, LayerMapError or ModelError.
    """
    check_format(notation, IMPORT_FORMATS)
    path = Path(file)
    path = path / "config.json" if path.is_dir() else path
    binary = path.suffix == ".safetensors" if notation == "auto" else notation == "linearpatch"
    text = "" if binary and not _is_pickle(path) else _read(path)
    if path.name == "config.json" and _holds_patches(path.with_name(PROVENANCE)):
        raise LayerMapError(
            f"{path.parent} was exported with patches, which stand in its blocks where others were removed, so its "
            f"configuration does not tell what is: use the layer map that it was made from, as {PROVENANCE} there "
            "describes it"
        )
    try:
        if binary:
            found = _read_linear_patch(path)
        else:
            found = _READERS[_detect(text, path) if notation == "auto" else notation](text)
        layer_map = _layer_map(found, _shape(found, model, num_blocks))
    except LayerMapError as error:
        raise LayerMapError(f"{path}: {error}") from None
    for remark in found.notes:
        note(remark)
    if is_order(text) and layer_map.max_depth == layer_map.num_blocks:
        share = parse_remove(DEFAULT_REMOVE, layer_map.num_blocks)
        note(
            f"the list orders all blocks: the last stays, and the map recommends {DEFAULT_REMOVE}, depth {share}"
        )
        layer_map = layer_map.at(layer_map.max_depth - 1).recommend(min(share, layer_map.max_depth - 1))
    return layer_map


def _holds_patches(file: Path) -> bool:
    """Whether an export of sleb, by its provenance, has patches among its blocks."""
    if not file.is_file():
        return False
    patches = read_json(file, LayerMapError).object("patches", None)
    return patches is not None and patches.string("written", None, None) == "keep"


def _read_linear_patch(path: Path) -> Imported:
    from sleb.formats.linear_patch import read_linear_patch  # torch: not for lists

    return read_linear_patch(path)


def _is_pickle(path: Path) -> bool:
    """Whether torch.save, or pickle, wrote a file: a zip archive, or the mark of a protocol."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return False
    return start == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _read(path: Path) -> str:
    if _is_pickle(path):
        from sleb.formats.linear_patch import CONVERT

        raise LayerMapError(
            f"{path} is a pickle, which is never opened here, since opening one can run code. LinearPatch's scales.pt, "
            f"if you trust it, becomes a safetensors file by: {CONVERT}. ReplaceMe's transforms are of an MLP's "
            "output, which no patch is; the checkpoint that it writes has them merged, and is a MODEL as it is"
        )
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise LayerMapError(f"{path} has more than {_MAX_BYTES >> 20} MiB: it is no map in any notation")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise LayerMapError(f"there is no file {path}: check the path") from None
    except OSError as error:
        raise LayerMapError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LayerMapError(
            f"{path} is no text (UTF-8); the formats are {', '.join(IMPORT_FORMATS[1:])}"
        ) from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LayerMapError(f"it is not JSON, or is cut short: {error}") from None


def _detect(text: str, path: Path) -> str:
    """The notation of a text. Raises LayerMapError for what it cannot be told for sure."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and "schema_version" in document:
        raise LayerMapError("it is a layer map of sleb already: use it as it is")
    if path.name == "reserved_layers.json":
        raise LayerMapError(
            "it lists the blocks that LLM-Drop keeps: import the config.json that LLM-Drop writes with it, or name "
            "a --format"
        )
    checks: tuple[tuple[str, bool], ...] = (
        (
            "removal-list",
            isinstance(document, list) or (isinstance(document, dict) and "removal_list" in document),
        ),
        ("decilm", is_decilm(document)),
        ("llm-drop", is_llm_drop(document)),
        ("blockpruner", is_blockpruner(document)),
        ("sleb-result", "Block Removal Order:" in text),
        ("mergekit", document is None and "merge_method" in text and is_mergekit(parse_yaml(text))),
        ("removal-list", document is None and (text.count("[") == 1 or is_order(text))),
    )
    for notation, fits in checks:
        if fits:
            return notation
    if isinstance(document, dict) and "model_type" in document and "num_hidden_layers" in document:
        raise LayerMapError(
            "it is the configuration of a model, and names nothing that is removed. A checkpoint of fewer blocks with "
            "what mends them merged into the others, such as ReplaceMe's, is a MODEL as it is: serve it"
        )
    raise LayerMapError(f"it is in no notation that sleb knows: {', '.join(IMPORT_FORMATS[1:])}")


def _shape(found: Imported, model: str | None, num_blocks: int | None) -> tuple[str, int, str | None]:
    """Name, number of blocks and fingerprint of the model that the file is about."""
    if num_blocks is not None and (not is_int(num_blocks) or num_blocks < 1):
        raise ConfigError(f"num-blocks {num_blocks} must be 1 or more")
    name, config = _name(found.model), found.config
    if model is not None:
        name, config = _configuration(model)
    elif config is None and found.model is not None and (Path(found.model) / "config.json").is_file():
        name, config = _configuration(found.model)
    known = {
        "the file": found.num_blocks,
        "--num-blocks": num_blocks,
        "the model": None if config is None else config.get("num_hidden_layers"),
    }
    counts = {who: count for who, count in known.items() if count is not None}
    if not counts:
        raise ConfigError(
            f"{name or 'the file'} does not say how many blocks the model has: add --model or --num-blocks"
        )
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{who} says {count}" for who, count in counts.items())
        raise LayerMapError(f"the number of blocks is not clear: {said}")
    fingerprint = None if config is None else model_fingerprint(config)
    return name or "unknown", next(iter(counts.values())), fingerprint


def _name(model: str | None) -> str | None:
    return None if model is None else Path(model).name or model


def _configuration(model: str) -> tuple[str, Mapping[str, Any]]:
    from sleb.models.resolve import resolve_config

    resolved = resolve_config(model)
    return resolved.name, read_config(resolved.path).values


def _layer_map(found: Imported, shape: tuple[str, int, str | None]) -> LayerMap:
    name, num_blocks, fingerprint = shape
    units = found.units
    if found.rest_from is not None:
        if found.rest_from > num_blocks:
            raise LayerMapError(f"it keeps block {found.rest_from - 1}, but {name} has {num_blocks} blocks")
        units += tuple(Unit(block) for block in range(found.rest_from, num_blocks))
    if not units:
        raise LayerMapError("it removes nothing")
    return LayerMap(
        model=name,
        fingerprint=fingerprint,
        num_blocks=num_blocks,
        removed=units,
        calibration=found.calibration,
        source=found.source,
        patches=Patches.of(found.patches) if found.patches else None,
    )
