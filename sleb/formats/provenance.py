"""Where an exported checkpoint comes from: sleb.json for programs, a model card for people."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sleb.formats.output import PROVENANCE
from sleb.formats.removal import Removal
from sleb.formats.source import Source
from sleb.version import __version__

_WHAT = {
    "hf": "The removed blocks are left out and the others are numbered anew: nothing special is needed to load it.",
    "zeroed": (
        "It has the shape of the original. The output projections of what is removed are zero, so that it adds "
        "nothing; the checkpoint is no smaller and no faster, and serves to check other tools."
    ),
    "decilm": (
        "It is a DeciLM (Nemotron-NAS) checkpoint: what is removed has no weights, and `block_configs` in config.json "
        "says where. vLLM and transformers load it with `trust_remote_code`, for the class in modeling_decilm.py."
    ),
}


def provenance(removal: Removal, source: Source, notation: str) -> dict[str, Any]:
    """What went into an export. A path on this machine means nothing elsewhere, so a folder goes by its name."""
    layer_map, depth = removal.layer_map, removal.depth
    return {
        "sleb_version": __version__,
        "format": notation,
        "source_model": source.hub_id or source.name,
        "source_fingerprint": source.fingerprint,
        "layer_map": {
            "model": layer_map.model,
            "digest": layer_map.digest(depth),
            "source": layer_map.source,
            "calibration": None if layer_map.calibration is None else asdict(layer_map.calibration),
        },
        "depth": depth,
        "num_blocks": layer_map.num_blocks,
        "removed": [str(unit) for unit in removal.units],
        "kept_blocks": list(removal.kept_blocks),
        "patches": _patches(removal),
    }


def _patches(removal: Removal) -> dict[str, Any] | None:
    """The patches of the depth and what became of them; None where there are none."""
    mending, found = removal.mending, removal.layer_map.patches
    if not mending.patches or found is None:
        return None
    return {
        "written": mending.way,
        "number": len(mending.patches),
        "num_parameters": sum(patch.num_parameters for patch in mending.patches),
        "sha256": found.sha256,
        "record": asdict(found.record),
        "merged_on": None if mending.calibration is None else asdict(mending.calibration),
        "token_losses": None
        if mending.losses is None
        else dict(zip(("patched", "merged"), mending.losses, strict=True)),
    }


def lost(removal: Removal) -> str | None:
    """What an export has lost of the depth's patches, for people; None: nothing."""
    mending = removal.mending
    number = f"{len(mending.patches)} patches are" if len(mending.patches) > 1 else "1 patch is"
    if not mending.patches or mending.way == "keep":
        return None
    if mending.losses is not None:
        patched, merged = map(math.exp, mending.losses)
        return (
            f"the depth's {number} merged into the output projections before them, which is an approximation: "
            f"perplexity {merged:.4g} instead of {patched:.4g} on the text that it was fitted on"
        )
    return f"the depth's {number} left out: it is worse than this depth of the layer map served by sleb"


_KEPT = {
    "decilm": (
        "Where blocks stood are {number} linear maps of the residual stream, fitted in closed form, exactly as sleb "
        "computes them: as a linear layer in place of an attention, with a narrow MLP that only adds its bias, or, of "
        "low rank, as a narrow MLP. transformers (with the class here) and llama.cpp run both, vLLM the narrow MLPs "
        "alone."
    ),
    "zeroed": (
        "Where blocks stood are {number} linear maps of the residual stream, fitted in closed form and written as MLPs "
        "that compute exactly them."
    ),
}


def _patch_lines(record: dict[str, Any], removal: Removal) -> list[str]:
    if record["patches"] is None:
        return []
    text = lost(removal)
    kept = _KEPT.get(record["format"], "").format(number=record["patches"]["number"])
    return ["", f"{text[0].upper()}{text[1:]}." if text else kept]


def write_provenance(folder: Path, removal: Removal, source: Source, notation: str) -> None:
    """Writes sleb.json and README.md into `folder`."""
    record = provenance(removal, source, notation)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / PROVENANCE).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(model_card(record, removal, source), encoding="utf-8")


def model_card(record: dict[str, Any], removal: Removal, source: Source) -> str:
    """The README.md of an export, with the header that the hub reads."""
    base = [f"base_model: {source.hub_id}"] if source.hub_id else []
    header = [
        "---",
        *base,
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [sleb]",
        "---",
    ]
    units = "blocks" if all(unit.part == "block" for unit in removal.units) else "blocks or parts of blocks"
    body = [
        f"# {source.name} at depth {record['depth']}",
        "",
        f"{record['source_model']} without {len(record['removed'])} of its {units}, removed by "
        f"[SLEB](https://arxiv.org/abs/2402.09025) without any training afterwards. {_WHAT[record['format']]}",
        *_patch_lines(record, removal),
        "",
        "| | |",
        "|---|---|",
        f"| source model | {record['source_model']} ({record['num_blocks']} blocks) |",
        f"| removed, in order | {', '.join(record['removed'])} |",
        f"| digest of the layer map | {record['layer_map']['digest']} |",
        f"| written by | sleb {record['sleb_version']}, `--format {record['format']}` |",
        "",
        "The licence of the source model applies.",
        "",
    ]
    return "\n".join([*header, "", *body])
