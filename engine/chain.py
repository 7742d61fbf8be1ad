"""Which depths of which layer map an engine serves, and under which ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.requests.request import Tier
from sleb.errors import ConfigError, RequestError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import ResolvedModel

# What the demo model serves unless told otherwise: the full model and two depths of its shipped map.
_DEMO_DEPTHS = (0, 3, 6)


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
    loaded = chosen if isinstance(chosen, LayerMap) else LayerMap.load(chosen)
    loaded.check_model(num_blocks=spec.num_blocks, fingerprint=spec.fingerprint, model=resolved.name)
    return loaded, shipped


def make_tiers(
    layer_map: LayerMap, model_name: str, depths: Sequence[int] | None, shipped: bool
) -> tuple[Tier, ...]:
    """One Tier a depth, in the order asked; by default the recommended depth, for the shipped map 0, 3 and 6.

    Raises ConfigError for a depth that the map does not have.
    """
    if depths is None:
        depths = _DEMO_DEPTHS if shipped else (layer_map.depth,)
    for depth in depths:
        if depth > layer_map.max_depth:
            raise ConfigError(
                f"tier {depth} is deeper than the layer map, which has depths 0 to {layer_map.max_depth}; "
                "choose one of those, or find a longer map with `sleb prune --remove`"
            )
    return tuple(_make_tier(layer_map, model_name, depth) for depth in depths)


def _make_tier(layer_map: LayerMap, model_name: str, depth: int) -> Tier:
    return Tier(
        id=model_name if depth == 0 else f"{model_name}:sleb-{depth}",
        depth=depth,
        digest=layer_map.digest(depth),
        num_blocks_kept=sum(
            layer_map.active((block, "attention"), depth) or layer_map.active((block, "mlp"), depth)
            for block in range(layer_map.num_blocks)
        ),
        removed=layer_map.removed[:depth],
    )


def find_tier(tiers: Sequence[Tier], name: str | int) -> Tier:
    """The tier with that id or depth. Raises RequestError (model_not_found) listing those served."""
    for tier in tiers:
        if name in (tier.id, tier.depth) and not isinstance(name, bool):
            return tier
    if isinstance(name, int):
        served = ", ".join(str(tier.depth) for tier in tiers)
        raise RequestError(
            f"depth {name} is not served; served depths: {served}", param="depth", code="model_not_found"
        )
    shown = name if len(name) <= 200 else name[:200] + "..."
    served = ", ".join(tier.id for tier in tiers)
    raise RequestError(
        f"the model '{shown}' does not exist; served models: {served}", param="model", code="model_not_found"
    )
