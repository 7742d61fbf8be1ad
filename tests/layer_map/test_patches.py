"""Patches of a layer map: their file, and what is wrong with one."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sleb.errors import LayerMapError
from sleb.layer_map.layer_map import LayerMap, Patch, Patches, Unit
from sleb.layer_map.patches import PatchRecord
from sleb.layer_map.units import CalibrationRecord

WIDTH = 8
RNG = np.random.default_rng(0)


def full(first, last, first_depth, last_depth=None, width=WIDTH):
    tensors = {"weight": RNG.normal(size=(width, width)), "bias": RNG.normal(size=width)}
    return Patch(first, last, first_depth, last_depth, "full", True, tensors)


def layer_map(*patches, removed=(2, 1, 4), record=None):
    units = tuple(Unit(block) for block in removed)
    return LayerMap(
        "m", None, 6, units, patches=Patches.of(patches, record or PatchRecord()) if patches else None
    )


BLOCK_2 = ((2, "attention"), (2, "mlp"))
BLOCKS_1_2 = ((1, "attention"), (2, "mlp"))


def test_a_map_and_its_patches_come_back_from_disk(tmp_path):
    low = {"down": RNG.normal(size=(3, WIDTH)), "up": RNG.normal(size=(WIDTH, 3)), "bias": np.zeros(WIDTH)}
    huge = {"scale": np.full(WIDTH, 1e6), "bias": np.zeros(WIDTH)}
    made = (
        full(*BLOCKS_1_2, 2),
        full(*BLOCK_2, 1, 1),
        Patch((4, "attention"), (4, "mlp"), 3, 3, "low-rank", False, low),
        Patch((4, "attention"), (4, "mlp"), 4, None, "scale", False, huge),
    )
    record = PatchRecord("full", None, 0.3, CalibrationRecord(source="a.txt", windows=16, seqlen=1024))
    saved = layer_map(*made, removed=(2, 1, 4, 3), record=record)
    saved.save(tmp_path / "map.json")
    loaded = LayerMap.load(tmp_path / "map.json")
    assert loaded == saved and loaded.patches.record == record
    assert [patch.first_depth for patch in loaded.patches_at(3, WIDTH)] == [2, 3]
    assert [patch.form for patch in loaded.patches_at(4, WIDTH)] == ["full", "scale"]
    assert loaded.patches.num_parameters(1) == WIDTH * WIDTH + WIDTH
    for before in made:
        [after] = [each for each in loaded.patches.load() if each.first_depth == before.first_depth]
        assert (after.first, after.last, after.last_depth) == (before.first, before.last, before.last_depth)
        assert (after.form, after.normed) == (before.form, before.normed)
        for name, tensor in before.tensors.items():
            np.testing.assert_allclose(after.tensors[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_new_map_takes_its_patches_with_it(tmp_path):
    path = tmp_path / "map.json"
    layer_map(full(*BLOCK_2, 1)).save(path)
    [first] = tmp_path.glob("map.*.safetensors")
    second = layer_map(full(*BLOCK_2, 1))
    second.save(path)
    [file] = tmp_path.glob("map.*.safetensors")
    assert file != first and LayerMap.load(path).patches_at(1, WIDTH)
    LayerMap.load(path).recommend(1).save(path)
    assert file.exists() and LayerMap.load(path).depth == 1
    LayerMap.load(path).save(tmp_path / "copy.json")  # its patches go along, under its name
    backup = tmp_path / "backup.json"  # a plain copy, which names the file too
    backup.write_bytes(path.read_bytes())
    layer_map().save(path)
    assert file.exists() and LayerMap.load(backup).patches_at(1, WIDTH)
    backup.unlink()
    LayerMap.load(tmp_path / "copy.json").save(path)
    [file] = tmp_path.glob("map.*.safetensors")
    layer_map().save(path)
    assert not file.exists() and LayerMap.load(tmp_path / "copy.json").patches_at(1, WIDTH)


def test_depth_0_needs_no_file(tmp_path):
    layer_map(full(*BLOCK_2, 1)).save(tmp_path / "map.json")
    [file] = tmp_path.glob("map.*.safetensors")
    file.unlink()
    loaded = LayerMap.load(tmp_path / "map.json")
    assert loaded.patches_at(0, WIDTH) == () and loaded.at(0).patches is None
    assert loaded.digest(0) == layer_map().digest(0)
    with pytest.raises(LayerMapError, match=r"safetensors is missing: .*`sleb patch`"):
        loaded.patches_at(1, WIDTH)


def test_a_digest_knows_the_patches():
    one, other, none = layer_map(full(*BLOCK_2, 1)), layer_map(full(*BLOCK_2, 1)), layer_map()
    assert len({each.digest(1) for each in (one, other, none)}) == 3
    assert len({each.digest(0) for each in (one, other, none)}) == 1


def test_a_cut_map_has_the_patches_of_its_depths():
    whole = layer_map(full(*BLOCK_2, 1, 1), full(*BLOCKS_1_2, 2))
    assert [patch.first_depth for patch in whole.at(1).patches.load()] == [1]
    assert whole.at(2).patches is whole.patches


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        ([full(*BLOCKS_1_2, 1)], "patch 1.attention to 2.mlp stands for 1.attention, which runs at depth 1"),
        ([full((3, "mlp"), (3, "mlp"), 3)], "stands for 3.mlp, which runs at depth 3"),
        ([full(*BLOCK_2, 1), full(*BLOCKS_1_2, 2)], "two patches stand for 2.attention at one depth"),
        ([full(*BLOCK_2, 1, width=4)], "is 4 wide, but the model 8"),
    ],
)
def test_patches_of_another_map_or_model_are_refused(patches, message):
    with pytest.raises(LayerMapError, match=message):
        layer_map(*patches).patches_at(2, WIDTH)


def test_a_file_that_is_not_the_maps_is_refused(tmp_path):
    layer_map(full(*BLOCK_2, 1)).save(tmp_path / "map.json")
    [file] = tmp_path.glob("map.*.safetensors")
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(LayerMapError, match=r"has the SHA-256 \w+, but the layer map names"):
        LayerMap.load(tmp_path / "map.json").patches_at(1, WIDTH)


@pytest.mark.parametrize(
    ("entry", "tensors", "message"),
    [
        ({}, {"0.weight": (8, 8)}, "its tensors are"),
        ({}, {"0.weight": (8, 4), "0.bias": (8,)}, "its tensors are"),
        ({}, {"0.weight": (8, 8), "0.bias": (8,), "1.bias": (8,)}, "belongs to no patch"),
        ({"form": "round"}, {}, "form is \"round\"; it must be one of full, low-rank, scale"),
        ({"first": "2"}, {}, "first is \"2\"; it must be a part of a block"),
        ({"last": "1.mlp"}, {}, "ends before it begins"),
        ({"first_depth": 0}, {}, "first_depth is 0; it must be an integer from 1"),
        ({"last_depth": 1}, {}, "last_depth is 1; it must be an integer from 2"),
        ({"normed": 1}, {}, "normed is 1; it must be true or false"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file(tmp_path, entry, tensors, message):
    good = {"first": "2.attention", "last": "2.mlp", "form": "full", "normed": True, "first_depth": 2}
    shapes = tensors or {"0.weight": (8, 8), "0.bias": (8,)}
    arrays = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    file = tmp_path / "p.safetensors"
    save_file(arrays, file, {"patches": json.dumps([good | entry])})
    patches = Patches.in_file(file, hashlib.sha256(file.read_bytes()).hexdigest(), PatchRecord())
    with pytest.raises(LayerMapError, match=f"p.safetensors.*{message}"):
        patches.load()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"file": "../x.safetensors", "sha256": "0" * 64}, "file is .* the name of a .safetensors file beside"),
        ({"file": "x.pt", "sha256": "0" * 64}, "file is"),
        ({"file": "x.safetensors", "sha256": "00"}, "sha256 is \"00\"; it must be 64 hexadecimal digits"),
        ({"file": "x.safetensors"}, "sha256 is missing"),
        ([], "patches is \\[\\]; it must be an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_map(tmp_path, value, message):
    path = tmp_path / "map.json"
    path.write_text(json.dumps(json.loads(layer_map().to_json()) | {"patches": value}))
    with pytest.raises(LayerMapError, match=message):
        LayerMap.load(path)
