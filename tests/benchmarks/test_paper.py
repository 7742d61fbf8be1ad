"""`sleb bench throughput --paper`: the paper's settings, and its rows beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sleb.benchmarks import ceilings as ceilings_module
from sleb.benchmarks.workloads import (
    PAPER_ROWS,
    ThroughputOptions,
    Workload,
    paper_depths,
    paper_measurements,
    plan_workloads,
    stand_in_map,
)
from sleb.cli.bench import app
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap, Unit


def test_the_papers_speedups_are_ratios_of_its_own_numbers() -> None:
    _, _, latency, _, rate, _ = PAPER_ROWS[0]
    for _, _, row_latency, latency_speedup, row_rate, speedup in PAPER_ROWS:
        assert latency / row_latency == pytest.approx(latency_speedup, abs=0.0051)
        assert row_rate / rate == pytest.approx(speedup, abs=0.0051)


def test_the_papers_rows_are_marked_as_such() -> None:
    found = {(each.facts["test"], each.subject): each for each in paper_measurements()}
    assert len(found) == 2 * len(PAPER_ROWS)
    assert all(each.case.startswith("paper: ") for each in found.values())
    pruned = found["prompt", "SLEB 20%"]
    assert pruned.value == pytest.approx(2048 / 1.3641) and pruned.ratio is not None
    assert pruned.ratio.estimate == 1.26 and found["generate", "dense 0%"].ratio is None


def test_the_workloads_are_the_papers() -> None:
    for on_gpu in (False, True):
        assert plan_workloads(ThroughputOptions(model="model", paper=True), 4096, on_gpu) == [
            Workload("prompt", 1, 2048, 1),
            Workload("generate", 64, 64, 128),
        ]


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"depths": (0, 6)}, "--depths"),
        ({"batches": (8,)}, "--batches"),
        ({"tests": ("decode",)}, "--tests"),
        ({"prompt_tokens": (128,)}, "--prompt-tokens"),
        ({"output_tokens": (32,)}, "--output-tokens"),
    ],
)
def test_what_the_paper_sets_cannot_be_set(changes: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=f"--paper sets {option} itself"):
        ThroughputOptions(model="model", paper=True, **changes).check()


def test_depths_are_shares_of_the_blocks() -> None:
    assert paper_depths(stand_in_map("llama-2-70b", 80))[0] == (0, 8, 16)
    assert paper_depths(stand_in_map("smollm2", 30))[0] == (0, 3, 6)
    short = LayerMap("x", None, 30, tuple(Unit(block) for block in (5, 7, 9, 11)))
    assert paper_depths(short)[0] == (0, 3)
    assert paper_depths(LayerMap("x", None, 30))[0] == (0,)
    # Two parts are a block.
    parts = [Unit(block, part) for block in (3, 4, 5) for part in ("attention", "mlp")]
    assert paper_depths(LayerMap("x", None, 10, tuple(parts)))[0] == (0, 2, 4)
    assert paper_depths(stand_in_map("x", 4))[0] == (0, 1)  # a fifth; a tenth is no block
    assert paper_depths(stand_in_map("x", 2))[0] == (0,)


def test_shares_that_a_map_does_not_reach_are_told() -> None:
    short = LayerMap("x", None, 30, tuple(Unit(block) for block in (5, 7, 9, 11)))
    assert paper_depths(stand_in_map("x", 30))[1] == []
    twenty = (
        "The paper's 20% of the blocks is not measured: it is 6 of 30, and the layer map removes 4 units."
    )
    assert paper_depths(short)[1] == [twenty]
    assert len(paper_depths(LayerMap("x", None, 30))[1]) == 2


def test_the_command_measures_and_prints_both(
    tiny_model_dir: Path, tiny_chain: LayerMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("_COPY_BYTES", {"cpu": 1 << 16}),
        ("_READ_BYTES", 1 << 16),
        ("_MATRIX_SIZE", {"cpu": 16}),
    ):
        monkeypatch.setattr(ceilings_module, name, value)
    tiny_chain.save(tmp_path / "map.json")
    words = [tiny_model_dir, "--layer-map", tmp_path / "map.json", "--paper", "--json", tmp_path / "out.json"]
    words += ["--repetitions", "1", "--max-repetitions", "1", "--no-control", "--threads", "1"]
    done = CliRunner().invoke(app, ["throughput", *map(str, words)])
    assert done.exit_code == 0, done.output
    assert "prompt 1 × 511" in done.stdout  # what the model holds
    assert "SliceGPT 25%" in done.stdout and "LLaMA-2-70B on two A100" in done.stdout
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    # A tenth and a fifth of six blocks are one.
    names = [row["variant"] for row in rows if row["variant"] != "paper"]
    assert names == ["depth 0", "depth 1", "depth 0", "depth 1", "mixed"]
    words[1:3] = ["--layer-map", "none"]
    done = CliRunner().invoke(app, ["throughput", *map(str, words)])
    assert "The paper's 10% of the blocks is not measured" in done.stdout
