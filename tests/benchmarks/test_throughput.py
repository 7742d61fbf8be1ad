"""`sleb bench throughput` from options to table and JSON, on a tiny model."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sleb.benchmarks import ceilings as ceilings_module
from sleb.benchmarks.ceilings import Ceilings
from sleb.benchmarks.ideal import DepthCost, decode_bytes, decode_flops, prompt_flops, step_weight_bytes
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.throughput import ThroughputBench, plain_token_ids, run_throughput, too_slow
from sleb.benchmarks.turns import Turns
from sleb.benchmarks.workloads import (
    TESTS,
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
from sleb.server.bench_result import BenchResult

Calls = list[tuple[list[list[int]], Any, Any]]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings_module, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(ceilings_module, "_MATRIX_SIZE", {"cpu": 16})


@pytest.fixture
def options(tiny_model_dir: Path, tiny_chain: LayerMap) -> ThroughputOptions:
    """Both tests, depths 0 and 3, small enough to be quick."""
    return ThroughputOptions(
        model=str(tiny_model_dir), layer_map=tiny_chain, depths=(0, 3), batches=(3, 1), prompt_tokens=(20,),
        output_tokens=(5,), repetitions=2, max_repetitions=2, control=False, mixed=False, time_budget=0.0,
    )  # fmt: skip


@pytest.fixture
def map_file(tmp_path: Path, tiny_chain: LayerMap) -> Path:
    path = tmp_path / "map.json"
    tiny_chain.save(path)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every call of LLM.generate: prompts, sampling parameters, depth."""
    made: Calls = []
    generate = LLM.generate

    def recorded(self: LLM, prompts: Any, params: Any, depth: Any) -> Any:
        made.append((prompts, params, depth))
        return generate(self, prompts, params, depth)

    monkeypatch.setattr(LLM, "generate", recorded)
    return made


def once(options: ThroughputOptions, **changes: Any) -> ThroughputOptions:
    return replace(options, repetitions=1, max_repetitions=1, **changes)


def rows_of(result: Result) -> list[dict[str, Any]]:
    return [each.row() for each in result.measurements]


def test_every_turn_compares_the_depths_on_prompts_of_its_own(
    options: ThroughputOptions, calls: Calls
) -> None:
    result = run_throughput(options)
    assert result.complete
    assert len(calls) == 3 * 3 * 2  # workloads × (warm-up and two turns) × depths
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        assert {first[2], second[2]} == {0, 3}
        assert first[0] == second[0]
    assert len({json.dumps(prompts) for prompts, _, _ in calls}) == 3 * 3
    shapes = [
        (len(prompts), {len(prompt) for prompt in prompts}, params.max_tokens) for prompts, params, _ in calls
    ]
    # The warm-up of a long answer is a short one.
    prompt, three, one = [(1, {20}, 1)] * 2, [(3, {20}, 5)] * 2, [(1, {20}, 5)] * 2
    warm = [[(batch, {20}, 4)] * 2 for batch in (3, 1)]
    assert shapes == [*prompt, *prompt, *warm[0], *three, *warm[1], *one, *prompt, *three, *one]
    assert all(params.ignore_eos and params.temperature == 0 for _, params, _ in calls)


def test_the_same_seed_gives_the_same_prompts_and_order(options: ThroughputOptions, calls: Calls) -> None:
    for seed in (7, 7, 8):
        run_throughput(once(options, tests=("generate",), batches=(1,), seed=seed))
    first, second, third = (calls[start : start + 4] for start in (0, 4, 8))
    assert first == second
    assert [prompts for prompts, _, _ in first] != [prompts for prompts, _, _ in third]


def test_prompts_hold_only_ordinary_tokens(options: ThroughputOptions) -> None:
    """The tokenizer knows 256 bytes and four special tokens; the model's vocabulary goes on to 263."""
    assert plain_token_ids(ThroughputBench(options).engine) == list(range(256))


def test_ids_of_a_model_without_tokenizer(tiny_model: Callable[[str], Any]) -> None:
    """bos and eos (2) and pad (1) come from the config."""
    engine = LLM(tiny_model("opt").path, kv_cache_memory=0.01).engine
    assert plain_token_ids(engine) == [0, *range(3, 96)]


def test_the_engine_has_room_for_the_largest_batch_at_once(options: ThroughputOptions) -> None:
    """No prefix cache, no preemption, and a batch's prompts in one step."""
    bench = ThroughputBench(options)
    engine = bench.engine
    assert not engine.config.prefix_caching
    assert engine.config.max_num_batched_tokens == 3 * 20
    assert engine.max_model_len == 25
    assert engine.runner.num_pages == 3 * 2
    case = next(each for each in bench.cases() if each.name == "generate 3 × 5 after 20")
    for turn in (1, 2):
        case.subjects["depth 3"](turn)
    stats = engine.stats()
    assert (stats.num_preemptions, stats.num_cached_tokens, stats.num_output_tokens) == (0, 0, 2 * 3 * 5)


def test_rows(options: ThroughputOptions) -> None:
    rows = rows_of(run_throughput(replace(options, depths=(5, 0, 3))))
    shapes = [(row["test"], row["batch"], row["depth"]) for row in rows]
    workloads = [("prompt", 1), ("generate", 3), ("generate", 1)]
    assert shapes == [(*workload, depth) for workload in workloads for depth in (5, 0, 3)]
    for row in rows:
        assert (row["metric"], row["baseline_depth"]) == ("tokens/s", 0)
        assert len(row["samples"]) == row["repetitions"] == 2
        counted = 20 if row["test"] == "prompt" else row["batch"] * 5
        assert row["tokens_per_second"] == row["value"] == pytest.approx(counted / row["seconds"])
        assert row["low"] <= row["value"] <= row["high"]
        last_token = 1  # is never fed back
        new = 1 if row["test"] == "prompt" else 5
        assert row["kv_bytes"] == row["batch"] * (20 + new - last_token) * row["kv_bytes_per_token"]
    deepest, dense, middle = rows[3:6]
    assert deepest["ideal_speedup"] > middle["ideal_speedup"] > dense["ideal_speedup"] == 1.0
    assert deepest["weight_bytes"] < middle["weight_bytes"] < dense["weight_bytes"]
    assert [row["num_blocks_kept"] for row in (deepest, middle, dense)] == [2, 4, 6]
    assert (dense["ratio"], dense["speedup"], dense["speedup_high"]) == (None, 1.0, 1.0)
    assert [row["verdict"] for row in rows[3:6]] == ["no difference", "baseline", "no difference"]
    # Of two turns there is no interval: the least ratio and the greatest one.
    ratios = sorted(mine / full for mine, full in zip(deepest["samples"], dense["samples"], strict=True))
    found = [deepest[f"speedup_{end}"] for end in ("low", "high", "level")]
    assert found == [*map(pytest.approx, ratios), None]


def test_the_first_depth_is_the_baseline_where_the_full_model_is_not_asked_for(
    options: ThroughputOptions,
) -> None:
    rows = rows_of(run_throughput(once(options, depths=(3, 5), tests=("prompt",))))
    assert [(row["depth"], row["baseline_depth"]) for row in rows] == [(3, 3), (5, 3)]


def test_quantised_weights_are_reported_and_loading_is_told(options: ThroughputOptions) -> None:
    small = once(options, tests=("prompt",), depths=(0,))
    seen: list[tuple[int, int]] = []
    result = run_throughput(replace(small, weights="int4"), on_load=lambda *now: seen.append(now))
    assert result.settings["weights"] == "int4"
    assert seen[-1][0] == seen[-1][1] > seen[0][0] == 0
    [row], [plain] = rows_of(result), rows_of(run_throughput(small))
    assert row["weight_bytes"] < plain["weight_bytes"] / 2


def test_defaults_are_the_papers_settings_on_a_gpu_and_smaller_ones_on_a_cpu() -> None:
    options = ThroughputOptions(model="model")
    large = [
        Workload("prompt", 1, 2048, 1),
        Workload("generate", 1, 64, 128),
        Workload("generate", 64, 64, 128),
    ]
    assert plan_workloads(options, 8192, True) == large
    # A model of 2,048 positions must keep one for the token that the prompt test samples.
    assert plan_workloads(options, 2048, True)[0].prompt_tokens == 2047
    small = [
        Workload("prompt", 1, 512, 1),
        Workload("generate", 1, 64, 128),
        Workload("generate", 8, 64, 128),
    ]
    assert plan_workloads(options, 8192, False) == small


def test_lists_make_every_combination() -> None:
    options = ThroughputOptions(
        model="model", tests=("prompt", "generate", "decode"), batches=(1, 8), prompt_tokens=(128, 512),
        output_tokens=(32, 64),
    )  # fmt: skip
    assert [str(workload) for workload in plan_workloads(options, 2048, False)] == [
        *("prompt 1 × 128", "prompt 1 × 512"),
        *("generate 1 × 32 after 128", "generate 8 × 32 after 128"),
        *("generate 1 × 32 after 512", "generate 8 × 32 after 512"),
        *("generate 1 × 64 after 128", "generate 8 × 64 after 128"),
        *("generate 1 × 64 after 512", "generate 8 × 64 after 512"),
        *("decode 1 × 32 after 128", "decode 8 × 32 after 128"),
        *("decode 1 × 32 after 512", "decode 8 × 32 after 512"),
        *("decode 1 × 64 after 128", "decode 8 × 64 after 128"),
        *("decode 1 × 64 after 512", "decode 8 × 64 after 512"),
    ]


def test_a_sweep_measures_every_combination(options: ThroughputOptions) -> None:
    sweep = once(options, tests=TESTS, prompt_tokens=(1, 9), output_tokens=(2, 3))
    sizes = ("test", "batch", "prompt_tokens", "output_tokens")
    assert {tuple(row[name] for name in sizes) for row in rows_of(run_throughput(sweep))} == {
        *(("prompt", 1, prompt, 1) for prompt in (1, 9)),
        *(("generate", batch, prompt, new) for batch in (3, 1) for prompt in (1, 9) for new in (2, 3)),
        *(("decode", batch, context, new) for batch in (3, 1) for context in (1, 9) for new in (2, 3)),
    }


def test_depths_default_to_the_full_model_and_the_recommended_depth(options: ThroughputOptions) -> None:
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
        ({"depths": (0, 0)}, ConfigError, "--depths names 0 twice"),
        ({"depths": ()}, ConfigError, "--depths names nothing"),
        ({"layer_map": "absent.json"}, LayerMapError, "absent.json does not exist"),
        ({"model": "./absent"}, ModelError, "absent"),
        ({"tests": ()}, ConfigError, "--tests names nothing"),
        ({"batches": (4, 4)}, ConfigError, "--batches names 4 twice"),
        ({"repetitions": 0}, ConfigError, "repetitions is 0; it must be an integer from 1 to"),
        ({"max_repetitions": 1}, ConfigError, "--max-repetitions is 1; it must be at least --repetitions, 2"),
        ({"prompt_tokens": (8, 16, 8)}, ConfigError, "--prompt-tokens names 8 twice"),
        (
            {"batches": tuple(range(1, 9)), "prompt_tokens": tuple(range(1, 9))},
            ConfigError,
            "the lists make 72 workloads; 64 are the most: shorten --batches",
        ),
        (
            {"prompt_tokens": (512,)},
            ConfigError,
            "512 prompt tokens and 1 new ones do not fit the model's 512 positions",
        ),
        ({"output_tokens": (500,)}, ConfigError, "lower --prompt-tokens or --output-tokens"),
        ({"dtype": "float8"}, ConfigError, "float8"),
        ({"weights": "int3"}, ConfigError, "int3"),
        ({"device": "abacus"}, ConfigError, "abacus"),
        ({"load_format": "pickle"}, ConfigError, "pickle"),
        ({"model": ""}, ConfigError, "no MODEL and no --config; give one of them"),
        ({"config": "llama-2-7b"}, ConfigError, "--config 'llama-2-7b'; give one of them"),
        ({"model": "", "config": "llama-9"}, ConfigError, "shape 'llama-9' does not come with sleb"),
        (
            {"model": "", "config": "llama-2-7b", "load_format": "safetensors"},
            ConfigError,
            "--config has no weights to read",
        ),
        ({"fail_below": 0.0}, ConfigError, "fail_below is 0"),
        ({"fail_below": 1.1, "depths": (3,)}, ConfigError, "depth 3 alone is measured"),
    ],
)
def test_what_cannot_be_measured_is_an_error_with_a_remedy(
    options: ThroughputOptions, changes: dict[str, Any], error: type[SlebError], complaint: str
) -> None:
    with pytest.raises(error) as caught:
        run_throughput(replace(options, **changes))
    assert complaint in str(caught.value)


def test_decode_counts_what_follows_the_first_tokens(options: ThroughputOptions) -> None:
    for row in rows_of(run_throughput(once(options, tests=("decode",), batches=(3,)))):
        assert (row["test"], row["batch"], row["output_tokens"]) == ("decode", 3, 5)
        assert row["value"] == pytest.approx(3 * 4 / row["seconds"])


def test_roofline_shares(options: ThroughputOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ceilings of 10⁶ bytes and 4·10⁷ operations a second, against sums by hand."""
    ceilings = Ceilings(1e6, 4e7, "float32")
    bench = ThroughputBench(replace(options, tests=("prompt", "generate", "decode"), depths=(0,)))
    cost = DepthCost.of(bench.engine, 0)
    cases = bench.cases(ceilings)
    turns = Turns(cases, {case.name: [{"depth 0": {"tokens/s": 1.0}}] for case in cases})
    rows = [each.row() for each in bench.measurements(turns)]
    prompt = {
        batch: max(step_weight_bytes(cost, batch) / 1e6, prompt_flops(cost, batch, 20) / 4e7)
        for batch in (1, 3)
    }
    decode = {
        batch: max(decode_bytes(cost, batch, 20, 5) / 1e6, decode_flops(cost, batch, 20, 5) / 4e7)
        for batch in (1, 3)
    }
    wanted = [prompt[1] / 20]
    wanted += [(prompt[batch] + decode[batch]) / (5 * batch) for batch in (3, 1)]
    wanted += [decode[batch] / (4 * batch) for batch in (3, 1)]
    assert [row["roofline_share"] for row in rows] == pytest.approx(wanted)


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
        monkeypatch.setattr("sleb.models.shapes.shape_folder", lambda asked: tmp_path / asked)

    return shrink


def test_a_shipped_shape_runs_with_random_weights_and_its_shipped_map(shape: Callable[[str], None]) -> None:
    shape("llama-2-7b")
    result = run_throughput(
        once(
            ThroughputOptions(
                config="llama-2-7b",
                depths=(0, 7),
                batches=(2,),
                prompt_tokens=(4,),
                output_tokens=(3,),
                dtype="float32",
            )
        )
    )
    model = result.settings["model"]
    assert (model["name"], model["layer_map"]) == ("llama-2-7b", "shipped")
    assert model["removed"] == ["14", "23", "11", "24", "10", "27", "15"]
    assert {row["num_blocks_kept"] for row in rows_of(result)} == {32, 25}
    assert not any("stand-in" in note for note in result.notes)


def test_a_shape_without_a_shipped_map_has_a_stand_in(shape: Callable[[str], None], tmp_path: Path) -> None:
    shape("llama-2-70b")
    output = tmp_path / "result.json"
    words = "--depths 16 --tests decode --batches 2 --prompt-tokens 4 --output-tokens 3 --repetitions 1"
    words += " --max-repetitions 1 --no-control"
    done = bench("--config", "llama-2-70b", *words.split(), "--dtype", "float32", "--json", output)
    assert done.exit_code == 0, done.output
    assert "decode 2 × 3 after 4" in done.stdout and "stand-in" in done.stdout
    result = json.loads(output.read_text())
    assert result["settings"]["model"]["layer_map"] == "stand-in"
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
    assert choose_map(ThroughputOptions(model="folder"), 40, "sha256:x") == (None, "alias")


# The control and the mixed batch.


def test_the_control_and_the_mixed_batch_take_turns_with_the_depths(
    options: ThroughputOptions, calls: Calls
) -> None:
    full = replace(options, depths=(0, 3, 5), batches=(5, 2), tests=("generate",), control=True, mixed=True)
    result = run_throughput(full)
    rows = rows_of(result)
    subjects = ["depth 0", "depth 3", "depth 5", "control"]
    assert [row["variant"] for row in rows] == [*subjects, "mixed", *subjects]
    turn = [call for call in calls if len(call[0]) == 5][-5:]
    depths = ["0", "0", "3", "5", "[0, 3, 5, 0, 3]"]
    assert sorted(str(depth) for _, _, depth in turn) == depths
    assert all(prompts == turn[0][0] for prompts, _, _ in turn)
    mixed, alone = rows[4], rows[:3]
    assert (mixed["depth"], mixed["depths"], mixed["ideal_speedup"]) == (None, [0, 3, 5], 1.0)
    times = [[1 / value for value in row["samples"]] for row in rows[:5]]
    expected = [
        (2 * times[0][turn] + 2 * times[1][turn] + times[2][turn]) / 5 / times[4][turn] for turn in range(2)
    ]
    found = [mixed["speedup_low"], mixed["speedup_high"]]
    assert found == pytest.approx(sorted(expected))
    assert mixed["weight_bytes"] == alone[0]["weight_bytes"]
    kv_bytes = [row["kv_bytes"] // 5 for row in alone]
    assert mixed["kv_bytes"] == 2 * kv_bytes[0] + 2 * kv_bytes[1] + kv_bytes[2]
    assert any("fewer requests than depths: generate 2 × 5 after 20" in note for note in result.notes)


def test_only_generate_is_mixed(options: ThroughputOptions) -> None:
    full = replace(options, tests=("prompt", "generate", "decode"), control=True, mixed=True)
    cases = {case.name: list(case.subjects) for case in ThroughputBench(full).cases()}
    plain = ["depth 0", "depth 3", "control"]
    assert cases == {
        "prompt 1 × 20": plain,
        "generate 3 × 5 after 20": [*plain, "mixed"],
        "generate 1 × 5 after 20": plain,
        "decode 3 × 5 after 20": plain,
        "decode 1 × 5 after 20": plain,
    }


def measured(
    options: ThroughputOptions, rates: dict[str, list[float]]
) -> tuple[list[Measurement], list[str]]:
    """The figures and notes of turns with these tokens/s."""
    bench = ThroughputBench(replace(options, tests=("generate",), batches=(3,), control=True))
    [case] = bench.cases()
    samples = [
        {subject: {"tokens/s": values[turn]} for subject, values in rates.items()}
        for turn in range(len(rates["depth 0"]))
    ]
    found = bench.measurements(Turns([case], {case.name: samples}))
    return found, bench.notes(found)


def test_a_control_that_differs_is_told(options: ThroughputOptions) -> None:
    equal = [0.99, 1.01, 1.0, 0.995, 1.004, 1.002]
    rates = {"depth 0": [1.0] * 6, "depth 3": [1.2] * 6, "control": equal}
    found, notes = measured(options, rates)
    assert [each.row()["verdict"] for each in found] == ["baseline", "faster", "no difference"]
    assert found[1].facts["speedup_level"] == 0.95
    assert not any("control" in note for note in notes)
    _, notes = measured(options, rates | {"control": [0.95, 0.94, 0.96] * 2})
    assert any("control, depth 0 again, came out 5.0% slower than itself" in note for note in notes)


def test_too_slow(options: ThroughputOptions) -> None:
    rates = {"depth 0": [1.0] * 6, "depth 3": [1.1] * 6, "control": [0.9] * 6}
    result = Result("throughput", {}, {}, measured(options, rates)[0])
    assert too_slow(result, 1.15) == ["generate 3 × 5 after 20, depth 3: 1.100"]
    assert too_slow(result, 1.0) == []


def test_the_time_budget_ends_the_turns(options: ThroughputOptions) -> None:
    result = run_throughput(replace(options, time_budget=1e-6))
    rows = rows_of(result)
    assert {(row["repetitions"], row["stopped"]) for row in rows} == {(1, "time")}
    assert any("An interval takes 6 turns" in note for note in result.notes)


def test_the_result_has_the_machines_conditions(options: ThroughputOptions) -> None:
    environment = run_throughput(once(options)).environment
    assert set(environment["conditions"]) >= {"others_share", "pace_drift"}
    assert environment["ceilings"]["copy_bytes_per_second"] > 0


@pytest.mark.slow
def test_a_real_slowdown_of_five_percent_is_found_and_none_is_not(
    options: ThroughputOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal subjects may differ in one measurement of twenty, and two of three seldom do."""
    real = replace(
        options, depths=(0,), batches=(8,), prompt_tokens=(64,), output_tokens=(64,), repetitions=6,
        tests=("generate",), max_repetitions=30, threads=1, control=True,
    )  # fmt: skip

    def control_of(seed: int) -> dict[str, Any]:
        return rows_of(run_throughput(replace(real, seed=seed)))[-1]

    equal = [control_of(seed) for seed in range(3)]
    assert sum(row["verdict"] == "no difference" for row in equal) >= 2, equal
    cases = ThroughputBench.cases

    def slowed(self: ThroughputBench, ceilings: Ceilings | None = None) -> Any:
        """The control spins for 5 % of its time after it is done."""
        [case] = cases(self, ceilings)
        run = case.subjects["control"]

        def slow(turn: int) -> dict[str, float]:
            started = time.perf_counter()
            rate = run(turn)["tokens/s"]
            ends = time.perf_counter() + 0.05 * (time.perf_counter() - started)
            while time.perf_counter() < ends:
                pass
            return {"tokens/s": rate / 1.05}

        return [replace(case, subjects={**case.subjects, "control": slow})]

    monkeypatch.setattr(ThroughputBench, "cases", slowed)
    slow = [control_of(seed) for seed in range(3)]
    assert all(row["verdict"] == "slower" for row in slow), slow
    assert [row["speedup"] for row in slow] == pytest.approx([1 / 1.05] * 3, abs=0.03)


# The command.


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["throughput", *map(str, arguments)])


def quick(model: Path, map_file: Path, *more: object) -> Sequence[object]:
    options = "--depths 0,3 --batches 2 --prompt-tokens 8 --output-tokens 3 --repetitions 2"
    options += " --max-repetitions 2 --no-control --no-mixed --threads 1"
    return [model, "--layer-map", map_file, *options.split(), *more]


def test_the_command_prints_a_table_and_writes_json_and_a_report(
    tiny_model_dir: Path, map_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    done = bench(*quick(tiny_model_dir, map_file, "--json", output, "--report", tmp_path / "report"))
    assert done.exit_code == 0, done.output
    for text in ("tiny-llama, float32", "prompt 1 × 8", "generate 2 × 3 after 8", "tokens/s", "ideal"):
        assert text in done.stdout
    # Where standard error is no terminal, a line a turn.
    lines = [line for line in done.stderr.splitlines() if ", turn " in line]
    assert len(lines) == 4 and lines[0].startswith("prompt 1 × 8, turn 1: depth 0 ")
    result = json.loads(output.read_text())
    assert result["complete"] is True and result["environment"]["command"]
    assert result["settings"]["model"]["name"] == "tiny-llama"
    assert result["settings"]["model"]["removed"] == ["3", "1", "4.attention"]
    required = {"test", "depth", "batch", "prompt_tokens", "output_tokens", "tokens_per_second", "speedup"}
    required |= {"speedup_low", "speedup_high", "ideal_speedup", "weight_bytes", "kv_bytes"}
    assert len(result["rows"]) == 4
    assert all(required <= set(row) for row in result["rows"])
    # `sleb serve --bench-result` reads it.
    served = BenchResult.load(str(output)).speedup(3)
    assert served is not None and served["value"] == result["rows"][3]["speedup"]
    assert [each["test"] for each in served["measured"]] == ["generate", "prompt"]
    assert {"report.md"} <= set(os.listdir(tmp_path / "report"))
    assert "generate 2 × 3 after 8" in (tmp_path / "report" / "report.md").read_text()


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
    done = bench(*quick(tiny_model_dir, map_file, "--json", output))
    assert done.exit_code == 130
    assert "Interrupted" in done.stdout
    result = json.loads(output.read_text())
    assert result["complete"] is False
    found = [(row["depth"], row["repetitions"], row["stopped"]) for row in result["rows"]]
    assert found == [(0, 1, "interrupt"), (3, 1, "interrupt")]

    # Interrupted before anything is complete: an older result stays.
    older, num_calls, limit = output.read_text(), 0, 1
    done = bench(*quick(tiny_model_dir, map_file, "--json", output))
    assert done.exit_code == 130
    assert output.read_text() == older


def test_fail_below(tiny_model_dir: Path, map_file: Path) -> None:
    done = bench(*quick(tiny_model_dir, map_file, "--fail-below", 1000))
    assert done.exit_code == 1
    assert "below --fail-below 1000: prompt 1 × 8, depth 3: " in done.stderr.strip().splitlines()[-1]
    assert "tokens/s" in done.stdout
    assert bench(*quick(tiny_model_dir, map_file, "--fail-below", 0.001)).exit_code == 0


@pytest.mark.parametrize("name", ["absent/result.json", ".", "map.json/result.json"])
def test_a_json_path_that_cannot_be_written_is_told_before_the_run(
    map_file: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sleb.benchmarks.throughput", None)  # type: ignore[arg-type]
    done = bench("smollm2", "--json", tmp_path / name)
    assert isinstance(done.exception, ConfigError)
    assert "name a file in" in str(done.exception)
    assert os.listdir(tmp_path) == ["map.json"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--depths", "0,six"], "--depths is 'six'"),
        (["--batches", "1;2"], "--batches is '1;2'"),
        (["--depths", "-1"], "--depths is -1; it must be an integer of at least 0"),
        (["--batches", "4,0"], "--batches is 0"),
        (["--prompt-tokens", "1k"], "--prompt-tokens is '1k'"),
        (["--output-tokens", "4,1"], "--output-tokens is 1; it must be an integer of at least 2"),
        (
            ["--tests", "prompt,score"],
            "--tests 'score' is not known; choose one of: prompt, generate, decode",
        ),
        (["--threads", "0"], "--threads is 0"),
        (["--interval", "1"], "--interval is '1'; it must be a share between 0 and 1, as 1%"),
        (["--max-repetitions", 1], "--max-repetitions is 1; it must be at least --repetitions, 6"),
        (["--time-budget", "nan"], "--time-budget is nan"),
        (["--fail-below", 0], "--fail-below is 0"),
    ],
)
def test_options_out_of_range_are_told_before_anything_is_loaded(
    words: list[object], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sleb.benchmarks.throughput", None)  # type: ignore[arg-type]
    done = bench("smollm2", *words)
    assert isinstance(done.exception, ConfigError), done.output
    assert complaint in str(done.exception)
