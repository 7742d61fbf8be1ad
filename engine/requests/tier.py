"""Model ids that are served, each bound to a depth of the chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleb.errors import ConfigError, RequestError
from sleb.layer_map.layer_map import LayerMap, Unit

# What a model with a shipped map serves unless told otherwise: the full model and two depths of the map.
_DEMO_DEPTHS = (0, 3, 6)


@dataclass(frozen=True)
class Tier:
    """A served model id bound to one depth of the chain.

    num_blocks_kept counts blocks of which at least one sublayer runs; `digest` seeds the prefix cache.
    """

    id: str
    depth: int
    digest: str
    num_blocks_kept: int
    removed: tuple[Unit, ...]


def make_tiers(
    layer_map: LayerMap, model_name: str, depths: Sequence[int] | None, shipped: bool
) -> tuple[Tier, ...]:
    """One Tier a depth, in the order asked; by default the recommended depth, for the shipped map 0, 3 and 6.

    Raises ConfigError for a depth that the map does not have.
    """
    if depths is None:
        depths = _DEMO_DEPTHS if shipped else (layer_map.depth,)
    for depth in depths:
        if depth and not layer_map.max_depth:
            raise ConfigError(
                f"tier {depth} takes a layer map that removes blocks: name its file (--layer-map), or make one with "
                "`sleb prune`"
            )
        if depth > layer_map.max_depth:
            raise ConfigError(
                f"tier {depth} is deeper than the layer map, which has depths 0 to {layer_map.max_depth}; "
                "choose one of those, or find a longer map with `sleb prune --remove`"
            )
    return tuple(_make_tier(layer_map, model_name, depth) for depth in depths)


def choose_default(tiers: Sequence[Tier], layer_map: LayerMap) -> Tier:
    """The tier of requests that name none: the recommended depth, or where that is not served the first."""
    return next((tier for tier in tiers if tier.depth == layer_map.depth), tiers[0])


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
