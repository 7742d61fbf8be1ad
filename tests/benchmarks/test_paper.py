"""`sleb bench throughput --paper`: the paper's settings, and its rows beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sleb.benchmarks import ceilings as ceilings_module
from sleb.benchmarks.paper import ROWS, missing_shares, paper_depths, print_paper, with_paper_settings
from sleb.benchmarks.results import make_row
from sleb.benchmarks.workloads import ThroughputOptions, Workload, plan_workloads, stand_in_map
from sleb.cli.bench import app
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap, Unit


def test_the_papers_speedups_are_ratios_of_its_own_numbers() -> None:
    dense = ROWS[0]
    for row in ROWS:
        assert dense.latency_ms / row.latency_ms == pytest.approx(row.latency_speedup, abs=0.0051)
        assert row.tokens_per_second / dense.tokens_per_second == pytest.approx(
            row.throughput_speedup, abs=0.0051
        )


def test_the_workloads_are_the_papers() -> None:
    options = with_paper_settings(ThroughputOptions("model", paper=True))
    assert plan_workloads(options, 4096) == [
        Workload("prompt", 1, 2048, 1),
        Workload("generate", 64, 64, 128),
    ]
    assert with_paper_settings(ThroughputOptions("model", batches=(7,))).batches == (7,)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"depths": (0, 6)}, "--depths"),
        ({"batches": [8]}, "--batches"),
        ({"tests": ["decode"]}, "--tests"),
        ({"prompt_tokens": [128]}, "--prompt-tokens"),
        ({"output_tokens": [32]}, "--output-tokens"),
        ({"contexts": [0]}, "--context"),
    ],
)
def test_what_the_paper_sets_cannot_be_set(changes: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=f"--paper sets {option} itself"):
        with_paper_settings(ThroughputOptions("model", paper=True, **changes))


def test_defaults_that_are_written_out_are_no_contradiction() -> None:
    options = ThroughputOptions(
        "model", paper=True, tests=["prompt", "generate"], batches=[64, 1], output_tokens=[128]
    )
    assert with_paper_settings(options).batches == (64,)


def test_depths_are_shares_of_the_blocks() -> None:
    assert paper_depths(stand_in_map("llama-2-70b", 80)) == (0, 8, 16)
    assert paper_depths(stand_in_map("smollm2", 30)) == (0, 3, 6)
    short = LayerMap("x", None, 30, tuple(Unit(block) for block in (5, 7, 9, 11)))
    assert paper_depths(short) == (0, 3)
    assert paper_depths(LayerMap("x", None, 30)) == (0,)
    # Two parts are a block.
    parts = [Unit(block, part) for block in (3, 4, 5) for part in ("attention", "mlp")]
    assert paper_depths(LayerMap("x", None, 10, tuple(parts))) == (0, 2, 4)


def test_a_share_that_is_no_block_has_no_depth() -> None:
    assert paper_depths(stand_in_map("x", 4)) == (0, 1)  # a fifth
    assert missing_shares(stand_in_map("x", 4)) == [
        "The paper's 10% of the blocks is not measured: of 4 blocks it is none."
    ]
    assert paper_depths(stand_in_map("x", 2)) == (0,)


def test_shares_that_a_map_does_not_reach_are_told() -> None:
    short = LayerMap("x", None, 30, tuple(Unit(block) for block in (5, 7, 9, 11)))
    assert missing_shares(stand_in_map("x", 30)) == []
    twenty = "The paper's 20% of the blocks is not measured: the layer map removes fewer than 6 of 30; give a longer"
    assert missing_shares(short) == [f"{twenty} --layer-map."]
    assert len(missing_shares(LayerMap("x", None, 30))) == 2


def test_it_is_plain_which_rows_are_the_papers() -> None:
    names = ("baseline_depth", "weight_bytes", "kv_bytes_per_token", "kv_bytes", "batch", "output_tokens")
    facts: dict[str, Any] = dict.fromkeys(names, 0) | {"prompt_tokens": 2048, "test": "prompt"}

    def row(depth: int, seconds: float) -> Any:
        return make_row(
            [seconds], [2.0 / seconds], counted_tokens=2048, ideal_speedup=1.0, depth=depth,
            variant=f"depth {depth}", num_blocks_kept=30 - depth, **facts,
        )  # fmt: skip

    console = Console(record=True, width=120)
    rows = [row(0, 2.0), row(6, 1.6)]
    model = {"name": "smollm2", "num_blocks": 30, "removed": [str(block) for block in range(6)]}
    print_paper(rows, model, "a processor", console)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "here SLEB, depth 6 20% 1,600.0 1.25" in lines
    assert "paper SLEB 20% 1,364.1 1.26" in lines
    assert sum(line.startswith("here ") for line in lines) == 2
    assert sum(line.startswith("paper ") for line in lines) == len(ROWS)
    text = " ".join(lines)
    assert "smollm2 on a processor, measured in this run" in text
    assert "LLaMA-2-70B on two A100" in text and "arXiv 2402.09025" in text


def test_what_an_attention_only_map_removes_is_counted_in_halves_of_blocks() -> None:
    """Every block is still there in part: six attentions of ten blocks are 30 % of their twenty parts."""
    names = ("baseline_depth", "weight_bytes", "kv_bytes_per_token", "kv_bytes", "batch", "output_tokens")
    facts: dict[str, Any] = dict.fromkeys(names, 0) | {"prompt_tokens": 2048, "test": "prompt"}
    row = make_row(
        [1.0],
        [1.25],
        counted_tokens=2048,
        ideal_speedup=1.3,
        depth=6,
        variant="depth 6",
        num_blocks_kept=10,
        **facts,
    )
    console = Console(record=True, width=120)
    model = {"name": "x", "num_blocks": 10, "removed": [f"{block}.attention" for block in range(8)]}
    print_paper([row], model, "a processor", console)
    assert "here SLEB, depth 6 30% 1,000.0 1.25" in " ".join(console.export_text().split())


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured beside the run takes no time."""
    for name, value in (
        ("_COPY_BYTES", {"cpu": 1 << 16}),
        ("_READ_BYTES", 1 << 16),
        ("_MATRIX_SIZE", {"cpu": 16}),
    ):
        monkeypatch.setattr(ceilings_module, name, value)


@pytest.mark.usefixtures("small_ceilings")
def test_a_map_without_the_papers_depths_is_told(tiny_model_dir: Path) -> None:
    words = [tiny_model_dir, *["--layer-map", "none", "--paper", "--no-control", "--threads", "1"]]
    words += ["--repetitions", "1", "--max-repetitions", "1"]
    done = CliRunner().invoke(app, ["throughput", *map(str, words), "--fail-below", "1.1"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).endswith("depth 0 alone is measured; give a longer --layer-map")
    done = CliRunner().invoke(app, ["throughput", *map(str, words)])
    assert done.exit_code == 0, done.output
    for share in ("10%", "20%"):
        assert (
            f"The paper's {share} of the blocks is not measured: the layer map removes fewer than 1 of 6"
            in done.stdout
        )


@pytest.mark.usefixtures("small_ceilings")
def test_the_command_measures_and_prints_both(
    tiny_model_dir: Path, tiny_chain: LayerMap, tmp_path: Path
) -> None:
    tiny_chain.save(tmp_path / "map.json")
    words = [tiny_model_dir, "--layer-map", tmp_path / "map.json", "--paper", "--json", tmp_path / "out.json"]
    words += ["--repetitions", "1", "--max-repetitions", "1", "--no-control", "--threads", "1"]
    done = CliRunner().invoke(app, ["throughput", *map(str, words)])
    assert done.exit_code == 0, done.output
    assert "Latency of a prompt, 511 tokens here and 2,048 in the paper:" in done.stdout
    assert "SliceGPT" in done.stdout and "here: tiny-llama" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    # A tenth and a fifth of six blocks are one.
    names = [row["variant"] for row in result["rows"]]
    assert names == ["depth 0", "depth 1", "depth 0", "depth 1", "mixed"]
    assert result["paper"]["model"] == "LLaMA-2-70B"
    assert all("method" in row for row in result["paper"]["rows"])
