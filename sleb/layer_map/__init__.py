"""What a depth is: the layer map, its units and the fingerprint of the model that it fits."""

from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.units import Unit

__all__ = ["LayerMap", "Unit"]
