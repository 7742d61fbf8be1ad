"""`sleb bench throughput` from options to table and JSON, on a tiny model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sleb.benchmarks.throughput import ThroughputBench, plain_token_ids, run_throughput
from sleb.benchmarks.workloads import ThroughputOptions, Workload, plan_workloads
from sleb.cli.bench import app
from sleb.engine.llm import LLM
from sleb.errors import ConfigError, LayerMapError, ModelError, SlebError
from sleb.layer_map import LayerMap


@pytest.fixture
def options(tiny_model_dir: Path, tiny_chain: LayerMap) -> ThroughputOptions:
    """Both tests, depths 0 and 3, small enough to be quick."""
    return ThroughputOptions(
        model=str(tiny_model_dir),
        layer_map=tiny_chain,
        depths=(0, 3),
        batches=(3, 1),
        prompt_tokens=20,
        output_tokens=5,
        repetitions=2,
    )


@pytest.fixture
def map_file(tmp_path: Path, tiny_chain: LayerMap) -> Path:
    path = tmp_path / "map.json"
    tiny_chain.save(path)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[list[int]], Any, int]]:
    """Every call of LLM.generate: prompts, sampling parameters, depth."""
    made: list[tuple[list[list[int]], Any, int]] = []
    generate = LLM.generate

    def recorded(self: LLM, prompts: Any, params: Any, depth: Any) -> Any:
        made.append((prompts, params, depth))
        return generate(self, prompts, params, depth)

    monkeypatch.setattr(LLM, "generate", recorded)
    return made


def test_every_repetition_compares_the_depths_on_prompts_of_its_own(
    options: ThroughputOptions, calls: list[tuple[list[list[int]], Any, int]]
) -> None:
    report = run_throughput(options)
    assert report.complete
    assert len(calls) == 3 * 3 * 2  # workloads × (warm-up and two repetitions) × depths
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        assert {first[2], second[2]} == {0, 3}
        assert first[0] == second[0]
    assert len({json.dumps(prompts) for prompts, _, _ in calls}) == 3 * 3
    measured = [depth for _, _, depth in calls]
    assert measured[2:4] == measured[4:6][::-1]  # the second repetition goes backwards
    shapes = [
        (len(prompts), {len(prompt) for prompt in prompts}, params.max_tokens) for prompts, params, _ in calls
    ]
    assert shapes == [(1, {20}, 1)] * 6 + [(3, {20}, 5)] * 6 + [(1, {20}, 5)] * 6
    assert all(params.ignore_eos and params.temperature == 0 for _, params, _ in calls)


def test_the_same_seed_gives_the_same_prompts_and_order(
    options: ThroughputOptions, calls: list[tuple[list[list[int]], Any, int]]
) -> None:
    small = replace(options, tests=("generate",), batches=(1,), repetitions=1)
    for seed in (7, 7, 8):
        run_throughput(replace(small, seed=seed))
    first, second, third = (calls[start : start + 4] for start in (0, 4, 8))
    assert first == second
    assert [prompts for prompts, _, _ in first] != [prompts for prompts, _, _ in third]


def test_prompts_hold_only_ordinary_tokens(options: ThroughputOptions) -> None:
    """The tokenizer knows 256 bytes and four special tokens; the model's vocabulary goes on to 263."""
    bench = ThroughputBench(options)
    assert plain_token_ids(bench.llm.engine) == list(range(256))


def test_ids_of_a_model_without_tokenizer(tiny_model: Callable[[str], Any]) -> None:
    """bos and eos (2) and pad (1) come from the config."""
    engine = LLM(tiny_model("opt").path, kv_cache_memory=0.01).engine
    assert plain_token_ids(engine) == [0, *range(3, 96)]


def test_the_engine_has_room_for_the_largest_batch_at_once(options: ThroughputOptions) -> None:
    """No prefix cache, no preemption, and a batch's prompts in one step."""
    bench = ThroughputBench(options)
    engine = bench.llm.engine
    assert not engine.config.enable_prefix_caching
    assert engine.config.max_num_batched_tokens == 3 * 20
    assert engine.max_model_len == 25
    assert engine.runner.num_pages == 3 * 2
    for _ in range(2):
        bench.prepare(Workload("generate", 3, 20, 5), 0)(3)
    stats = engine.stats()
    assert (stats.num_preemptions, stats.num_cached_tokens, stats.num_output_tokens) == (0, 0, 2 * 3 * 5)


def test_rows(options: ThroughputOptions) -> None:
    report = run_throughput(replace(options, depths=(5, 0, 3)))
    shapes = [(row.test, row.batch, row.depth) for row in report.rows]
    workloads = [("prompt", 1), ("generate", 3), ("generate", 1)]
    assert shapes == [(*workload, depth) for workload in workloads for depth in (5, 0, 3)]
    for row in report.rows:
        assert row.baseline_depth == 0
        assert len(row.seconds_samples) == len(row.speedup_samples) == row.repetitions == 2
        counted = 20 if row.test == "prompt" else row.batch * 5
        assert row.tokens_per_second_samples == pytest.approx(
            [counted / each for each in row.seconds_samples]
        )
        assert row.tokens_per_second_low <= row.tokens_per_second <= row.tokens_per_second_high
        last_token = 1  # is never fed back
        new = 1 if row.test == "prompt" else 5
        assert row.kv_bytes == row.batch * (20 + new - last_token) * row.kv_bytes_per_token
    deepest, dense, middle = report.rows[3:6]
    assert deepest.ideal_speedup > middle.ideal_speedup > dense.ideal_speedup == 1.0
    assert deepest.weight_bytes < middle.weight_bytes < dense.weight_bytes
    assert (deepest.num_blocks_kept, middle.num_blocks_kept, dense.num_blocks_kept) == (2, 4, 6)
    assert dense.speedup_samples == [1.0, 1.0]


def test_the_first_depth_is_the_baseline_where_the_full_model_is_not_asked_for(
    options: ThroughputOptions,
) -> None:
    report = run_throughput(replace(options, depths=(3, 5), tests=("prompt",), repetitions=1))
    assert [(row.depth, row.baseline_depth) for row in report.rows] == [(3, 3), (5, 3)]


def test_quantised_weights_are_reported_and_loading_is_told(options: ThroughputOptions) -> None:
    small = replace(options, tests=("prompt",), repetitions=1, depths=(0,))
    seen: list[tuple[int, int]] = []
    report = run_throughput(replace(small, weights="int4"), on_load=lambda *now: seen.append(now))
    assert report.settings["weights"] == "int4"
    assert seen[-1][0] == seen[-1][1] > seen[0][0] == 0
    assert report.rows[0].weight_bytes < run_throughput(small).rows[0].weight_bytes / 2


def test_an_interrupted_run_reports_what_is_complete(
    options: ThroughputOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, num_calls = LLM.generate, 0

    def interrupted(self: LLM, prompts: Any, params: Any, depth: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 6 + 4:  # in the second repetition of the second workload
            raise KeyboardInterrupt
        return generate(self, prompts, params, depth)

    monkeypatch.setattr(LLM, "generate", interrupted)
    report = run_throughput(options)
    assert not report.complete
    found = [(row.test, row.batch, row.depth, row.repetitions) for row in report.rows]
    assert found == [("prompt", 1, 0, 2), ("prompt", 1, 3, 2), ("generate", 3, 0, 1), ("generate", 3, 3, 1)]


def test_defaults_are_the_papers_settings() -> None:
    options = ThroughputOptions("model")
    assert plan_workloads(options, 8192) == [
        Workload("prompt", 1, 2048, 1),
        Workload("generate", 64, 64, 128),
        Workload("generate", 1, 64, 128),
    ]
    # A model of 2,048 positions must keep one for the token that the prompt test samples.
    assert plan_workloads(options, 2048)[0].prompt_tokens == 2047


def test_depths_default_to_the_full_model_and_the_recommended_depth(
    options: ThroughputOptions, tiny_chain: LayerMap
) -> None:
    assert ThroughputBench(replace(options, depths=None)).depths == (0, 3)
    assert ThroughputBench(replace(options, depths=None, layer_map="none")).depths == (0,)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"depths": (0, 6)}, ConfigError, "depth 6 is not there: the layer map has depths 0 to 5"),
        (
            {"depths": (0, 1), "layer_map": None},
            ConfigError,
            "without a layer map tiny-llama has depth 0 alone",
        ),
        ({"depths": (0, 0)}, ConfigError, "depth 0 is named twice"),
        ({"depths": ()}, ConfigError, "no depth is named"),
        ({"depths": (-1,)}, ConfigError, "depth is -1; it must be an integer of at least 0"),
        ({"layer_map": "absent.json"}, LayerMapError, "absent.json does not exist"),
        ({"model": "./absent"}, ModelError, "absent"),
        (
            {"tests": ("prompt", "decode")},
            ConfigError,
            "test 'decode' is not known; choose from: prompt, generate",
        ),
        ({"tests": ()}, ConfigError, "no test is named"),
        ({"batches": ()}, ConfigError, "no batch is named"),
        ({"batches": (4, 0)}, ConfigError, "batch is 0; it must be an integer of at least 1"),
        ({"batches": (4, 4)}, ConfigError, "batch 4 is named twice"),
        ({"repetitions": 0}, ConfigError, "--repetitions is 0"),
        ({"prompt_tokens": 0}, ConfigError, "--prompt-tokens is 0"),
        ({"output_tokens": 1}, ConfigError, "--output-tokens is 1; it must be an integer of at least 2"),
        (
            {"prompt_tokens": 512},
            ConfigError,
            "512 prompt tokens and 1 new ones do not fit the model's 512 positions",
        ),
        ({"output_tokens": 500}, ConfigError, "lower --prompt-tokens or --output-tokens"),
        ({"dtype": "float8"}, ConfigError, "float8"),
        ({"weights": "int3"}, ConfigError, "int3"),
        ({"device": "abacus"}, ConfigError, "abacus"),
        ({"load_format": "pickle"}, ConfigError, "pickle"),
        ({"threads": 0}, ConfigError, "num_threads is 0"),
    ],
)
def test_what_cannot_be_measured_is_an_error_with_a_remedy(
    options: ThroughputOptions, changes: dict[str, Any], error: type[SlebError], complaint: str
) -> None:
    with pytest.raises(error) as caught:
        run_throughput(replace(options, **changes))
    assert complaint in str(caught.value)


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["throughput", *map(str, arguments)])


def quick(model: Path, map_file: Path) -> Sequence[object]:
    options = "--depths 0,3 --batches 2 --prompt-tokens 8 --output-tokens 3 --repetitions 2 --threads 1"
    return [model, "--layer-map", map_file, *options.split()]


def test_the_command_prints_a_table_and_writes_json(
    tiny_model_dir: Path, map_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    done = bench(*quick(tiny_model_dir, map_file), "--json", output)
    assert done.exit_code == 0, done.output
    for text in (
        "tiny-llama, float32",
        "prompt 1 × 8",
        "generate 2 × 3 after 8",
        "speedup",
        "ideal",
        "over depth 0",
    ):
        assert text in done.stdout
    result = json.loads(output.read_text())
    assert list(result) == ["environment", "model", "settings", "rows", "complete"]
    assert result["complete"] is True
    assert result["model"]["name"] == "tiny-llama"
    assert result["model"]["removed"] == ["3", "1", "4.attention"]
    required = {
        "test",
        "depth",
        "batch",
        "prompt_tokens",
        "output_tokens",
        "tokens_per_second",
        "speedup",
    } | {
        *("tokens_per_second_samples", "seconds_samples", "speedup_low", "speedup_high", "ideal_speedup"),
        *("weight_bytes", "kv_bytes"),
    }
    assert len(result["rows"]) == 4
    assert all(required <= set(row) for row in result["rows"])
    assert set(os.listdir(tmp_path)) == {"map.json", "result.json"}


def test_an_interrupted_command_saves_what_is_complete_and_exits_130(
    tiny_model_dir: Path, map_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, num_calls, limit = LLM.generate, 0, 4

    def interrupted(self: LLM, prompts: Any, params: Any, depth: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > limit:
            raise KeyboardInterrupt
        return generate(self, prompts, params, depth)

    monkeypatch.setattr(LLM, "generate", interrupted)
    output = tmp_path / "result.json"
    done = bench(*quick(tiny_model_dir, map_file), "--json", output)
    assert done.exit_code == 130
    assert "Interrupted" in done.stdout
    result = json.loads(output.read_text())
    assert result["complete"] is False
    assert [(row["depth"], row["repetitions"]) for row in result["rows"]] == [(0, 1), (3, 1)]

    # Interrupted before anything is complete: an older result stays.
    older, num_calls, limit = output.read_text(), 0, 1
    done = bench(*quick(tiny_model_dir, map_file), "--json", output)
    assert done.exit_code == 130
    assert output.read_text() == older


@pytest.mark.parametrize("name", ["absent/result.json", ".", "map.json/result.json"])
def test_a_json_path_that_cannot_be_written_is_told_before_the_run(
    map_file: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("loaded before the check")

    monkeypatch.setattr("sleb.benchmarks.throughput.ThroughputBench", never)
    done = bench("model", "--json", tmp_path / name)
    assert isinstance(done.exception, ConfigError)
    assert "name a file in" in str(done.exception)
    assert os.listdir(tmp_path) == ["map.json"]


@pytest.mark.parametrize(
    ("option", "value"), [("--depths", "0,six"), ("--batches", "1;2"), ("--depths", "0.5")]
)
def test_lists_of_numbers(option: str, value: str) -> None:
    done = bench("model", option, value)
    assert isinstance(done.exception, ConfigError)
    assert option in str(done.exception) and value in str(done.exception)
