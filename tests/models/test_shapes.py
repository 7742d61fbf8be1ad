"""The shapes that come with the package: names, and that each is the model that it is named for."""

from __future__ import annotations

import math

import pytest
import torch

from sleb.engine.model.allocation import all_sublayers, allocate
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.rotary import RotaryTables
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap, shipped_maps
from sleb.models.shapes import shape_folder, shape_names

# Billions of parameters, as the makers state them; blocks; positions.
PUBLISHED = {
    "llama-2-7b": (6.74, 32, 4096),
    "llama-2-13b": (13.0, 40, 4096),
    "llama-2-70b": (69.0, 80, 4096),
    "llama-3.1-8b": (8.03, 32, 131072),
    "qwen3-8b": (8.19, 36, 40960),
    "opt-6.7b": (6.66, 32, 2048),
    "opt-13b": (12.9, 40, 2048),
    "opt-30b": (30.0, 48, 2048),
}


def test_names() -> None:
    assert set(shape_names()) == set(PUBLISHED)
    assert list(shape_names()) == sorted(PUBLISHED)


def test_an_unknown_shape_lists_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"shape '\.\./maps' does not come with sleb; .*llama-2-7b.*qwen3-8b"
    ):
        shape_folder("../maps")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    billions, num_blocks, max_positions = PUBLISHED[name]
    spec = resolve_spec(shape_folder(name))
    _, targets = allocate(spec, all_sublayers(spec), torch.bfloat16, torch.device("meta"))
    num_parameters = sum(math.prod(target.weight.shape) for target in targets.values())
    assert num_parameters == pytest.approx(billions * 1e9, rel=0.02)
    assert (spec.num_blocks, spec.max_positions) == (num_blocks, max_positions)
    assert spec.checkpoint_dtype in ("float16", "bfloat16")


def test_rotary_angles_follow_the_config() -> None:
    """The second feature pair turns by theta^(−2/128) a position; Llama 3.1 slows low frequencies eightfold."""
    for name, theta in (("llama-2-7b", 1e4), ("qwen3-8b", 1e6), ("llama-3.1-8b", 5e5)):
        cos = RotaryTables(resolve_spec(shape_folder(name)).rotaries[0], 2, torch.device("cpu")).cos
        assert float(cos[1, 1]) == pytest.approx(math.cos(theta ** (-2 / 128)))
    sin = RotaryTables(resolve_spec(shape_folder("llama-3.1-8b")).rotaries[0], 2, torch.device("cpu")).sin
    assert float(sin[1, 63]) == pytest.approx(5e5 ** (-126 / 128) / 8, rel=1e-4)


@pytest.mark.parametrize("name", sorted(set(shipped_maps()) & set(PUBLISHED)))
def test_the_shipped_maps_fit_the_shapes_of_their_names(name: str) -> None:
    spec = resolve_spec(shape_folder(name))
    layer_map = LayerMap.load(shipped_maps()[name])
    layer_map.check_model(num_blocks=spec.num_blocks, fingerprint=spec.fingerprint, model=name)
