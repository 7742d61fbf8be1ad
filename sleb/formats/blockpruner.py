"""BlockPruner's order (github.com/MrGGLS/BlockPruner, block_search.py): `…_del_order_list.json`.

    {"1": [["mha", 25]], "2": [["mha", 25], ["mha", 27]], "3": [["mha", 24], ["mha", 25], ["mha", 27]]}

Entry k is the *set* of the attentions ("mha") and MLPs removed after k rounds, sorted by block; what one entry has
beyond the one before is what that round removed. `eval.py --del-block-num k` applies entry k.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from sleb.errors import LayerMapError
from sleb.formats.removal import Imported, Removal
from sleb.layer_map.units import Part, Unit, is_int

_THEIRS = {"attention": "mha", "mlp": "mlp"}
_OURS = {theirs: ours for ours, theirs in _THEIRS.items()}


def write_blockpruner(removal: Removal) -> str:
    """A whole block takes two rounds there, its attention first."""
    document = {}
    for number in range(1, len(removal.sublayers) + 1):
        gone = sorted(removal.sublayers[:number], key=lambda sublayer: sublayer[0])
        document[str(number)] = [[_THEIRS[part], block] for block, part in gone]
    return json.dumps(document) + "\n"


def is_blockpruner(document: Any) -> bool:
    return isinstance(document, dict) and bool(document) and all(key.isdecimal() for key in document)


def read_blockpruner(document: Any) -> Imported:
    """Depth k of the result is entry k. Raises LayerMapError where an entry does not extend the one before."""
    if not is_blockpruner(document):
        raise LayerMapError('it is no BlockPruner order, which is written like {"1": [["mha", 25]], "2": …}')
    units: list[Unit] = []
    for number in range(1, len(document) + 1):
        entry = _entry(document, str(number))
        new = [unit for unit in entry if unit not in units]
        if len(entry) != number or len(new) != 1:
            raise LayerMapError(
                f'entry "{number}" must hold the {number - 1} removals of the entry before and one more; it holds '
                f"{len(entry)}, {len(new)} of them new"
            )
        units += new
    return Imported(tuple(units), source="BlockPruner's block_search.py")


def _entry(document: Mapping[str, Any], key: str) -> list[Unit]:
    if not isinstance(document.get(key), list):
        raise LayerMapError(
            f'entry "{key}" is missing, or no list; entries "1" to "{len(document)}" are needed'
        )
    units = []
    for pair in document[key]:
        valid = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and pair[0] in _OURS
        if not valid or not is_int(pair[1]) or pair[1] < 0:
            raise LayerMapError(f'entry "{key}" holds {str(pair)[:40]}; its items must be like ["mha", 25]')
        units.append(Unit(pair[1], cast(Part, _OURS[pair[0]])))
    return units
