"""Which layer map an engine serves."""

from __future__ import annotations

from pathlib import Path

from sleb.engine.model.architecture import DecoderSpec
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import ResolvedModel


def load_layer_map(
    layer_map: LayerMap | str | Path | None, resolved: ResolvedModel, spec: DecoderSpec
) -> tuple[LayerMap, bool]:
    """The map to serve, and whether it is the one shipped with an alias.

    None is the alias's map, or no removal at all; "none" is no removal. Raises LayerMapError for a map that
    cannot be read or was found on a model of another shape.
    """
    shipped = layer_map is None and resolved.layer_map is not None
    chosen = resolved.layer_map if shipped else layer_map
    if chosen is None or chosen == "none":
        return LayerMap.dense(resolved.name, spec.num_blocks, spec.fingerprint), False
    loaded = chosen if isinstance(chosen, LayerMap) else LayerMap.find(chosen)
    loaded.check_model(
        num_blocks=spec.num_blocks,
        fingerprint=spec.fingerprint,
        model=resolved.name,
        parallel=spec.parallel,
    )
    return loaded, shipped
