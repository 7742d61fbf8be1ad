"""Where an exported checkpoint comes from: sleb.json for programs, a model card for people."""

from __future__ import annotations

import json
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
        "source_fingerprint": source.spec.fingerprint,
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
    }


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
