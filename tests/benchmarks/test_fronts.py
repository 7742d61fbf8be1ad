"""Fronts of several maps: shares against counting a checkpoint's tensors, predictions against the cost model."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from sleb.benchmarks import fronts
from sleb.benchmarks.fronts import FrontsOptions, front_rows, measured_depths, run_fronts, sublayer_parameters
from sleb.cli.bench import app
from sleb.engine.model.architecture import resolve_spec
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import CalibrationRecord, LayerMap
from sleb.layer_map.units import Unit
from sleb.pruning.cost_model import CostModel

COST = CostModel(base=2.0, attention=1.0, mlp=3.0, num_blocks=6, batch=1)


def found(removed, token_hash="sha256:1", **fields):
    """A map of the tiny model as a search would leave it; losses of one nat a token and a tenth more a removal."""
    record = CalibrationRecord(source="text", seqlen=10, windows=2, token_hash=token_hash)
    losses = tuple(20.0 * (1 + number / 10) for number in range(len(removed) + 1))
    return LayerMap(
        model="tiny", fingerprint=None, num_blocks=6, removed=tuple(removed), losses=losses,
        calibration=record, **fields,
    )  # fmt: skip


BLOCKS = found([Unit(2), Unit(3)])
ATTENTION = found([Unit(block, "attention") for block in (1, 4, 2)])


def test_shares_are_those_of_the_checkpoint(tiny_model_dir):
    spec = resolve_spec(tiny_model_dir)
    tensors = {}
    for path in tiny_model_dir.glob("*.safetensors"):
        tensors |= {name: tensor for name, tensor in load_file(path).items() if ".layers." in name}
    counts = {
        part: sum(tensor.numel() for name, tensor in tensors.items() if key in name and tensor.dim() == 2)
        for part, key in (("attention", ".layers.0.self_attn."), ("mlp", ".layers.0.mlp."))
    }
    assert sublayer_parameters(spec) == counts
    rows = front_rows("a", ATTENTION, spec, COST)
    whole = 6 * sum(counts.values())
    assert [row.parameters_removed for row in rows] == pytest.approx(
        [depth * counts["attention"] / whole for depth in range(4)]
    )
    assert [row.kv_removed for row in rows] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert [row.predicted_speedup for row in rows] == pytest.approx([26 / (26 - depth) for depth in range(4)])
    assert [row.removed for row in rows] == [None, "1.attention", "4.attention", "2.attention"]
    assert rows[2].perplexity == pytest.approx(2.718281828**1.2)
    assert rows[2].held_out_perplexity is None
    blocks = front_rows("b", BLOCKS, spec, COST)
    assert blocks[2].parameters_removed == pytest.approx(2 / 6)
    assert blocks[2].predicted_speedup == pytest.approx(26 / 18)


def test_measured_depths_end_at_the_deepest():
    assert measured_depths(ATTENTION, 0) == (0,)
    assert measured_depths(ATTENTION, 1) == (0, 3)
    assert measured_depths(ATTENTION, 3) == (0, 1, 2, 3)
    assert measured_depths(BLOCKS, 3) == (0, 1, 2)


def test_maps_that_do_not_compare_are_refused(tiny_model_dir):
    other = found([Unit(1)], token_hash="sha256:2")
    with pytest.raises(ConfigError, match="different tokens"):
        FrontsOptions("m", {"one": BLOCKS, "two": other}).check()
    with pytest.raises(ConfigError, match="two has no losses"):
        FrontsOptions("m", {"two": LayerMap("m", None, 6, (Unit(1),))}).check()
    with pytest.raises(ConfigError, match="--repetitions is 0"):
        FrontsOptions("m", {"one": BLOCKS}, repetitions=0).check()
    with pytest.raises(ConfigError, match="--repetitions is 10001; it must be at most 10,000"):
        FrontsOptions("m", {"one": BLOCKS}, repetitions=10_001).check()


def test_measures_the_depths_and_keeps_whole_maps_when_interrupted(tiny_model_dir, monkeypatch):
    times = {0: 3.0, 1: 2.0, 2: 1.5, 3: 1.0}
    monkeypatch.setattr(fronts, "fit_cost_model", lambda *arguments, **options: COST)
    monkeypatch.setattr(fronts, "decode_seconds", lambda engine, prompts, params, depth: times[depth])
    options = FrontsOptions(str(tiny_model_dir), {"blocks": BLOCKS, "attention": ATTENTION}, repetitions=2)
    result = run_fronts(options)
    measured = {(row["map"], row["depth"]): row["measured_speedup"] for row in result["rows"]}
    assert measured["blocks", 0] is None
    assert measured["blocks", 2] == measured["attention", 2] == 2.0
    assert measured["attention", 3] == 3.0
    assert result["complete"]

    def interrupt(engine, prompts, params, depth):
        if depth == 3:
            raise KeyboardInterrupt
        return times[depth]

    monkeypatch.setattr(fronts, "decode_seconds", interrupt)
    result = run_fronts(options)
    assert {row["map"] for row in result["rows"]} == {"blocks"}
    assert not result["complete"]


def test_command_writes_table_result_and_plot(tiny_model_dir, tmp_path):
    for name, layer_map in (("blocks", BLOCKS), ("attention", ATTENTION)):
        layer_map.save(tmp_path / f"{name}.json")
    arguments = [
        "fronts", str(tiny_model_dir), str(tmp_path / "blocks.json"), str(tmp_path / "attention.json"),
        "--measure", "1", "--repetitions", "1", "--device", "cpu",
        "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plot"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["kind"] == "fronts"
    assert [row["depth"] for row in result["rows"]] == [0, 1, 2, 0, 1, 2, 3]
    assert result["rows"][2]["measured_speedup"] > 0
    assert (tmp_path / "plot.png").stat().st_size and (tmp_path / "plot.svg").stat().st_size
    assert "attention" in done.output and "−33.3%" in done.output
