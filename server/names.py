"""The names by which requests call a served depth: the tiers' ids, and those that an operator gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleb.engine.requests.tier import Tier, choose_default, make_tiers
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import model_name, shipped_map

if TYPE_CHECKING:
    from sleb.engine.config import EngineConfig
    from sleb.engine.depth_policy import DepthPolicy

_MAX_NAME = 200  # characters


@dataclass(frozen=True)
class ServedName:
    """One --served-model-name: NAME=DEPTH calls that depth; NAME alone the full model, and NAME:sleb-k depth k."""

    name: str
    depth: int | None = None

    @classmethod
    def parse(cls, text: str) -> ServedName:
        """Raises ConfigError for a name that a request could not give, or a depth that is no number."""
        name, equals, depth = text.rpartition("=")
        if not equals:
            name = text
        elif not (depth.isascii() and depth.isdecimal() and len(depth) <= 6):
            raise ConfigError(
                f"--served-model-name {text[:80]!r} gives no depth behind '='; write NAME=3 for depth 3, or NAME alone"
            )
        if not 0 < len(name) <= _MAX_NAME or not name.isprintable() or any(map(str.isspace, name)):
            raise ConfigError(
                f"--served-model-name {text[:80]!r} is no name; use up to {_MAX_NAME} characters without spaces"
            )
        return cls(name, int(depth) if equals else None)


def name_tiers(tiers: Sequence[Tier], default: Tier, names: Sequence[ServedName]) -> dict[str, Tier]:
    """Tiers by every name, in the order in which they are listed: ids first, and of those the default tier's.

    Whoever takes the first of the list (the chat page, `sleb chat`, many clients) so gets what a request without a
    model gets. A name without a depth is the full model, or where that is not served the default tier.

    Raises ConfigError for a depth that is not served, and for a name by which another tier is known.
    """
    by_depth = {tier.depth: tier for tier in tiers}
    for each in names:
        if each.depth is not None and each.depth not in by_depth:
            served = ", ".join(map(str, by_depth))
            raise ConfigError(
                f"--served-model-name {each.name}={each.depth} names a depth that is not served; served depths: "
                f"{served}; choose one of them, or add it to --tiers"
            )
    found = {tier.id: tier for tier in sorted(tiers, key=lambda tier: tier != default)}
    for each in names:
        if each.depth is not None:
            called = {each.name: by_depth[each.depth]}
        else:
            called = {each.name: by_depth.get(0, default)}
            called |= {f"{each.name}:sleb-{tier.depth}": tier for tier in tiers if tier.depth}
        for name, tier in called.items():  # requests may give it in any case
            known = next((tier for other, tier in found.items() if other.lower() == name.lower()), None)
            if known is None:
                found[name] = tier
            elif known != tier:
                raise ConfigError(
                    f"--served-model-name '{each.name}' would name depth {tier.depth} {name}, which is depth "
                    f"{known.depth} already; choose another name"
                )
    return found


_AUTO = ":auto"


@dataclass(frozen=True)
class AutoModel:
    """The model whose depth the server chooses, of `depths`, which the policy allows."""

    name: str
    policy: DepthPolicy
    depths: tuple[int, ...]


def auto_name(policy: DepthPolicy, model_name: str, names: Mapping[str, Tier]) -> str:
    """The name of a model whose depth the server chooses.

    names: of the served depths. Raises ConfigError for a depth of the policy that is not served, and for a name that
    another has.
    """
    served = sorted({tier.depth for tier in names.values()})
    for depth in policy.depths:
        if depth not in served:
            raise ConfigError(
                f"--auto names depth {depth}, which is not served; served depths: {', '.join(map(str, served))}; "
                "choose of them, or add it to --tiers"
            )
    name = f"{model_name}{_AUTO}"
    if any(known.lower() == name.lower() for known in names):
        raise ConfigError(
            f"--served-model-name gives {name}, which is the name that --auto gives; choose another"
        )
    return name


def planned_names(
    config: EngineConfig, names: Sequence[ServedName], policy: DepthPolicy | None = None
) -> dict[str, Tier]:
    """What `name_tiers` will say of the engine of `config`, before it is loaded; `auto_name` is checked, too.

    A bad map, a depth that it lacks and a name that cannot be given are so told before torch, which takes seconds to
    import, and the model, which may take minutes to fetch. Raises as the engine and `name_tiers` do.
    """
    model = str(config.model)
    chosen = shipped_map(model) if config.layer_map is None else config.layer_map
    if chosen is None or chosen == "none":
        layer_map = LayerMap.dense("", 1, None)
    else:
        layer_map = chosen if isinstance(chosen, LayerMap) else LayerMap.find(chosen)
    shipped = config.layer_map is None and chosen is not None
    tiers = make_tiers(layer_map, model_name(model).lower(), config.tiers, shipped)
    found = name_tiers(tiers, choose_default(tiers, layer_map), names)
    if policy is not None:
        auto_name(policy, model_name(model).lower(), found)
    return found
