"""Depths that can be served."""

from __future__ import annotations

import pytest

from sleb.engine.requests.tier import make_tiers
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.units import Unit


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        (LayerMap.dense("m", 4), "tier 3 takes a layer map that removes blocks"),
        (LayerMap("m", None, 4, (Unit(2), Unit(1))), "depths 0 to 2"),
    ],
)
def test_a_depth_that_is_not_there_says_what_would_have_it(layer_map: LayerMap, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tiers(layer_map, "m", [0, 3], False)
