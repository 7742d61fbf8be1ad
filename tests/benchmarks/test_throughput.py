"""`sleb bench throughput` from options to table and JSON, on a tiny model."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sleb.benchmarks import ceilings as ceilings_module
from sleb.benchmarks.ceilings import Ceilings
from sleb.benchmarks.ideal import DepthCost, decode_bytes, decode_flops, prompt_bytes, prompt_flops
from sleb.benchmarks.throughput import (
    ThroughputBench,
    plain_token_ids,
    run_throughput,
)
from sleb.benchmarks.throughput_report import meanings, notes
from sleb.benchmarks.workloads import (
    ThroughputOptions,
    Workload,
    choose_map,
    plan_workloads,
    stand_in_map,
)
from sleb.cli.bench import app
from sleb.engine.llm import LLM
from sleb.errors import ConfigError, LayerMapError, ModelError, SlebError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.shapes import shape_folder


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings_module, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(ceilings_module, "_MATRIX_SIZE", {"cpu": 16})


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
        max_repetitions=2,
        control=False,
        mixed=False,
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
    small = replace(options, tests=("generate",), batches=(1,), repetitions=1, max_repetitions=1)
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
    assert not engine.config.prefix_caching
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
    report = run_throughput(
        replace(options, depths=(3, 5), tests=("prompt",), repetitions=1, max_repetitions=1)
    )
    assert [(row.depth, row.baseline_depth) for row in report.rows] == [(3, 3), (5, 3)]


def test_quantised_weights_are_reported_and_loading_is_told(options: ThroughputOptions) -> None:
    small = replace(options, tests=("prompt",), repetitions=1, max_repetitions=1, depths=(0,))
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


def test_lists_make_every_combination() -> None:
    options = ThroughputOptions(
        "model", tests=("prompt", "generate"), batches=(1, 8), prompt_tokens=(128, 512), output_tokens=(32, 64),
        contexts=(0, 1024),
    )  # fmt: skip
    assert [str(workload) for workload in plan_workloads(options, 2048)] == [
        *("prompt 1 × 128", "prompt 1 × 512"),
        *("generate 1 × 32 after 128", "generate 8 × 32 after 128"),
        *("generate 1 × 32 after 512", "generate 8 × 32 after 512"),
        *("generate 1 × 64 after 128", "generate 8 × 64 after 128"),
        *("generate 1 × 64 after 512", "generate 8 × 64 after 512"),
        # --context asks for decode by itself; a context of 0 is one of a token.
        *("decode 1 × 31 after 1", "decode 8 × 31 after 1"),
        *("decode 1 × 31 after 1024", "decode 8 × 31 after 1024"),
        *("decode 1 × 63 after 1", "decode 8 × 63 after 1"),
        *("decode 1 × 63 after 1024", "decode 8 × 63 after 1024"),
    ]


def test_the_prompts_of_a_sweep_differ_by_length(options: ThroughputOptions) -> None:
    report = run_throughput(
        replace(once(options), prompt_tokens=(5, 9), output_tokens=(2, 3), contexts=(0, 30))
    )
    assert {(row.test, row.batch, row.prompt_tokens, row.output_tokens) for row in report.rows} == {
        *(("prompt", 1, prompt, 1) for prompt in (5, 9)),
        *(("generate", batch, prompt, new) for batch in (3, 1) for prompt in (5, 9) for new in (2, 3)),
        *(("decode", batch, context, new) for batch in (3, 1) for context in (1, 30) for new in (2, 3)),
    }


def once(options: ThroughputOptions) -> ThroughputOptions:
    return replace(options, repetitions=1, max_repetitions=1)


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
            {"tests": ("prompt", "score")},
            ConfigError,
            "test 'score' is not known; choose from: prompt, generate, decode",
        ),
        ({"tests": ()}, ConfigError, "no test is named"),
        ({"batches": ()}, ConfigError, "no batch is named"),
        ({"batches": (4, 0)}, ConfigError, "batch is 0; it must be an integer of at least 1"),
        ({"batches": (4, 4)}, ConfigError, "batch 4 is named twice"),
        ({"repetitions": 0}, ConfigError, "--repetitions is 0; it must be an integer from 1 to 10,000"),
        ({"repetitions": 10_001}, ConfigError, "--repetitions is 10001"),
        (
            {"max_repetitions": 10_001},
            ConfigError,
            "--max-repetitions is 10001; it must be at least --repetitions, 2, and",
        ),
        ({"prompt_tokens": 0}, ConfigError, "--prompt-tokens is 0"),
        ({"output_tokens": 1}, ConfigError, "--output-tokens is 1; it must be an integer of at least 2"),
        ({"output_tokens": (4, 1)}, ConfigError, "--output-tokens is 1"),
        ({"prompt_tokens": ()}, ConfigError, "no prompt-tokens is named"),
        ({"prompt_tokens": (8, 16, 8)}, ConfigError, "--prompt-tokens 8 is named twice"),
        ({"contexts": (16, 16)}, ConfigError, "--context 16 is named twice"),
        ({"contexts": (-1,)}, ConfigError, "--context is -1"),
        ({"contexts": (0, 1)}, ConfigError, "0 stands for a context of 1 token"),
        ({"contexts": ()}, ConfigError, "no context is named"),
        ({"contexts": (509,)}, ConfigError, "positions; lower --context or --output-tokens"),
        (
            {"batches": range(1, 9), "prompt_tokens": range(1, 9)},
            ConfigError,
            "the lists make 72 workloads; 64 are the most: shorten --batches",
        ),
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
        ({"threads": 0}, ConfigError, "threads is 0"),
        ({"model": ""}, ConfigError, "give one of them: a model with its weights, or a shape"),
        ({"config": "llama-2-7b"}, ConfigError, "give one of them"),
        ({"model": "", "config": "llama-9"}, ConfigError, "shape 'llama-9' does not come with sleb"),
        (
            {"model": "", "config": "llama-2-7b", "load_format": "safetensors"},
            ConfigError,
            "--config has no weights to read",
        ),
        ({"tests": ("decode",), "output_tokens": 1}, ConfigError, "--output-tokens is 1"),
    ],
)
def test_what_cannot_be_measured_is_an_error_with_a_remedy(
    options: ThroughputOptions, changes: dict[str, Any], error: type[SlebError], complaint: str
) -> None:
    with pytest.raises(error) as caught:
        run_throughput(replace(options, **changes))
    assert complaint in str(caught.value)


def test_decode_times_what_follows_the_first_tokens(options: ThroughputOptions) -> None:
    report = run_throughput(
        replace(options, tests=("decode",), batches=(3,), repetitions=1, max_repetitions=1)
    )
    for row in report.rows:
        assert (row.test, row.batch, row.output_tokens) == ("decode", 3, 5)
        # The first token of each answer comes with its prompt.
        assert row.tokens_per_second_samples == pytest.approx([3 * 4 / each for each in row.seconds_samples])


def test_roofline_shares(options: ThroughputOptions) -> None:
    """The least time is that of the bytes at the memory's rate, or of the operations at the matrix product's."""
    bench = ThroughputBench(replace(options, tests=("prompt", "generate", "decode"), batches=(3,)))
    ceilings = Ceilings(5e5, 4e7, [5e5], [4e7], "float32", 1e6, [1e6])
    samples = {workload: [{0: 2.0, 3: 1.0}] for workload in bench.workloads}
    shares = {(row.test, row.depth): row.roofline_share for row in bench.rows(samples, ceilings)}
    for depth, seconds in ((0, 2.0), (3, 1.0)):
        cost = DepthCost.of(bench.llm.engine, depth)
        # Here a prompt's weights take longer than its operations, and three prompts' operations longer still.
        prompt = max(prompt_bytes(cost, 1) / 1e6, prompt_flops(cost, 1, 20) / 4e7)
        prompts = max(prompt_bytes(cost, 3) / 1e6, prompt_flops(cost, 3, 20) / 4e7)
        decode = max(decode_bytes(cost, 3, 20, 5) / 1e6, decode_flops(cost, 3, 20, 5) / 4e7)
        assert shares["prompt", depth] == pytest.approx(prompt / seconds)
        assert shares["decode", depth] == pytest.approx(decode / seconds)
        assert shares["generate", depth] == pytest.approx((prompts + decode) / seconds)
    assert all(row.roofline_share is None for row in bench.rows(samples))


def test_the_report_holds_the_ceilings(options: ThroughputOptions) -> None:
    report = run_throughput(replace(options, tests=("prompt",), repetitions=1, max_repetitions=1))
    assert report.environment["ceilings"]["copy_bytes_per_second"] > 0
    assert report.rows[0].roofline_share is not None and report.rows[0].roofline_share > 0
    assert any("roofline" in line for line in meanings(report))
    assert report.model["layer_map"] == "given"


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """shape(name): makes --config take a small copy of that shipped shape, of as many blocks."""
    folder = shape_folder

    def shrink(name: str) -> None:
        config = json.loads((folder(name) / "config.json").read_text())
        config |= {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr("sleb.benchmarks.workloads.shape_folder", lambda asked: tmp_path / asked)

    return shrink


def test_a_shipped_shape_runs_with_random_weights_and_its_shipped_map(shape: Callable[[str], None]) -> None:
    shape("llama-2-7b")
    report = run_throughput(
        ThroughputOptions(
            config="llama-2-7b",
            depths=(0, 7),
            batches=(2,),
            prompt_tokens=4,
            output_tokens=3,
            repetitions=1,
            max_repetitions=1,
            dtype="float32",
        )
    )
    assert (report.model["name"], report.model["layer_map"]) == ("llama-2-7b", "shipped")
    assert report.model["removed"] == ["14", "23", "11", "24", "10", "27", "15"]
    assert report.settings["load_format"] == "dummy"
    assert {row.num_blocks_kept for row in report.rows} == {32, 25}
    assert not any("stand-in" in note for note in notes(report.to_dict()))


def test_a_shape_without_a_shipped_map_has_a_stand_in(shape: Callable[[str], None], tmp_path: Path) -> None:
    shape("llama-2-70b")
    output = tmp_path / "result.json"
    words = "--depths 16 --tests decode --batches 2 --prompt-tokens 4 --output-tokens 3 --repetitions 1"
    words += " --max-repetitions 1 --no-control"
    done = bench("--config", "llama-2-70b", *words.split(), "--dtype", "float32", "--json", output)
    assert done.exit_code == 0, done.output
    assert "decode 2 × 2 after 4" in done.stdout and "stand-in" in done.stdout
    result = json.loads(output.read_text())
    assert result["model"]["layer_map"] == "stand-in"
    assert [(row["depth"], row["num_blocks_kept"]) for row in result["rows"]] == [(16, 64)]
    assert str(tmp_path) not in output.read_text()


def test_a_stand_in_is_spread_over_the_middle_half() -> None:
    layer_map = stand_in_map("x", 80)
    removed = [unit.block for unit in layer_map.removed]
    assert sorted(removed) == list(range(20, 60)) and len(set(removed)) == 40
    assert layer_map.depth == 16
    for depth in (4, 8, 16):
        places = sorted(removed[:depth])
        gaps = [after - before for before, after in itertools.pairwise(places)]
        assert max(gaps) <= 4 * min(gaps), (depth, places)
    assert stand_in_map("x", 1).removed == ()
    assert [unit.block for unit in stand_in_map("x", 4).removed] == [1, 2]


def test_where_a_map_is_from() -> None:
    asked = ThroughputOptions(config="opt-13b")
    assert choose_map(asked, 40, "sha256:x")[1] == "shipped"
    assert choose_map(asked, 41, "sha256:x")[1] == "stand-in"  # the shipped one does not fit
    assert choose_map(replace(asked, layer_map="none"), 40, "sha256:x") == ("none", "none")
    assert choose_map(replace(asked, layer_map="m.json"), 40, "sha256:x") == ("m.json", "given")
    assert choose_map(ThroughputOptions("folder"), 40, "sha256:x") == (None, "alias")


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["throughput", *map(str, arguments)])


def quick(model: Path, map_file: Path) -> Sequence[object]:
    options = "--depths 0,3 --batches 2 --prompt-tokens 8 --output-tokens 3 --repetitions 2"
    options += " --max-repetitions 2 --no-control --no-mixed --threads 1"
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
    assert list(result) == ["kind", "environment", "model", "settings", "rows", "complete", "conditions"]
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
    ("option", "value"),
    [
        *(("--depths", "0,six"), ("--batches", "1;2"), ("--depths", "0.5")),
        *(("--prompt-tokens", "1k"), ("--output-tokens", "8,x"), ("--context", "0-8")),
    ],
)
def test_lists_of_numbers(option: str, value: str) -> None:
    done = bench("model", option, value)
    assert isinstance(done.exception, ConfigError)
    assert option in str(done.exception) and value in str(done.exception)
