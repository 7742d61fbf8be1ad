"""A batch of several depths against its depths alone, as a row of `sleb bench throughput`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sleb.benchmarks import ceilings as ceilings_module
from sleb.benchmarks import mixed as mixed_module
from sleb.benchmarks.mixed import MixedOptions, MixedRepetition, run_mixed
from sleb.benchmarks.throughput import ThroughputBench, run_throughput
from sleb.benchmarks.throughput_report import notes
from sleb.benchmarks.variants import CONTROL, MIXED, Variants, depths_in_turns
from sleb.benchmarks.workloads import ThroughputOptions, Workload
from sleb.engine.llm import LLM
from sleb.layer_map.layer_map import LayerMap


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("_COPY_BYTES", {"cpu": 1 << 16}),
        ("_READ_BYTES", 1 << 16),
        ("_MATRIX_SIZE", {"cpu": 16}),
    ):
        monkeypatch.setattr(ceilings_module, name, value)


@pytest.fixture
def options(tiny_model_dir: Path, tiny_chain: LayerMap) -> ThroughputOptions:
    return ThroughputOptions(
        model=str(tiny_model_dir), layer_map=tiny_chain, depths=(0, 3, 5), batches=(5, 2), prompt_tokens=6,
        output_tokens=3, repetitions=2, max_repetitions=2, control=False, tests=("prompt", "generate", "decode"),
    )  # fmt: skip


def test_the_expected_time_is_the_mean_over_the_requests() -> None:
    """Of five requests two are at depth 0, two at 3 and one at 6: (2·10 + 2·6 + 4) / 5 s, over what it took."""
    variants = Variants((0, 3, 6), 0)
    workload = Workload("generate", 5, 64, 128)
    times = {0: 10.0, 3: 6.0, 6: 4.0, CONTROL: 8.0, MIXED: 9.0}
    assert depths_in_turns((0, 3, 6), 5) == [0, 3, 6, 0, 3]
    assert variants.ratio(MIXED, workload, times) == pytest.approx(36 / 5 / 9)
    assert variants.ratio(3, workload, times) == pytest.approx(10 / 6)
    assert variants.ratios(workload, times) == pytest.approx([10 / 6, 10 / 4, 10 / 8, 36 / 5 / 9])


def test_which_workloads_are_mixed() -> None:
    variants = Variants((0, 6), 0)
    assert variants.of(Workload("generate", 2, 64, 128)) == [0, 6, CONTROL, MIXED]
    assert variants.of(Workload("generate", 1, 64, 128)) == [0, 6, CONTROL]
    assert variants.of(Workload("decode", 2, 64, 128)) == [0, 6, CONTROL]
    assert variants.of(Workload("prompt", 1, 64, 1)) == [0, 6, CONTROL]
    assert Variants((0, 6), 0, control=False, mixed=False).of(Workload("generate", 2, 64, 128)) == [0, 6]
    assert Variants((0,), 0).of(Workload("generate", 2, 64, 128)) == [0, CONTROL]


def test_the_mixed_batch_takes_turns_with_the_depths(
    options: ThroughputOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, Any]] = []
    generate = LLM.generate

    def recorded(self: LLM, prompts: Any, params: Any, depth: Any) -> Any:
        made.append((prompts, depth))
        return generate(self, prompts, params, depth)

    monkeypatch.setattr(LLM, "generate", recorded)
    report = run_throughput(replace(options, batches=(5,), tests=("generate",)))
    assert [depth for _, depth in made[:4]] == [0, 3, 5, [0, 3, 5, 0, 3]]
    for start in (4, 8):  # a repetition runs each of them on the same prompts
        assert sorted(str(depth) for _, depth in made[start : start + 4]) == [
            "0",
            "3",
            "5",
            "[0, 3, 5, 0, 3]",
        ]
        assert all(prompts == made[start][0] for prompts, _ in made[start : start + 4])
    mixed = report.rows[-1]
    alone = {row.depth: row.seconds_samples for row in report.rows[:-1]}
    expected = [
        (2 * alone[0][number] + 2 * alone[3][number] + alone[5][number]) / 5 / mixed.seconds_samples[number]
        for number in range(2)
    ]
    assert mixed.speedup_samples == pytest.approx(expected)


def test_the_row(options: ThroughputOptions) -> None:
    bench = ThroughputBench(options)
    samples = {
        workload: [dict.fromkeys(bench.variants.of(workload), 1.0)] * 6 for workload in bench.workloads
    }
    rows = bench.rows(samples)
    [mixed] = [row for row in rows if row.variant == "mixed"]
    assert (mixed.test, mixed.batch, mixed.depth, mixed.depths) == ("generate", 5, None, [0, 3, 5])
    assert (mixed.speedup, mixed.ideal_speedup, mixed.verdict) == (1.0, 1.0, "no difference")
    alone = {
        row.depth: row for row in rows if row.test == "generate" and row.batch == 5 and row.depth is not None
    }
    assert mixed.weight_bytes == alone[0].weight_bytes
    per_request = {depth: row.kv_bytes // 5 for depth, row in alone.items()}
    assert mixed.kv_bytes == 2 * per_request[0] + 2 * per_request[3] + per_request[5]


def test_a_batch_that_is_too_small_is_left_out_and_told(options: ThroughputOptions) -> None:
    report = run_throughput(options)
    assert {(row.test, row.batch) for row in report.rows if row.variant == "mixed"} == {("generate", 5)}
    assert any(
        note.endswith("than there are depths: generate 2 × 3 after 6.") for note in notes(report.to_dict())
    )


def test_the_target_is_that_of_the_device_that_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.93 of the throughput expected meets a card's target and not a processor's."""
    repetition = MixedRepetition(mixed=1.0, alone={0: 1.0, 3: 0.86}, others_share=None, disturbed=False)
    monkeypatch.setattr(
        mixed_module, "_measure", lambda llm, options, repetitions, progress: repetitions.append(repetition)
    )
    monkeypatch.setattr(mixed_module, "describe_environment", lambda engine, command: {})
    for device, target in (("cpu", 0.95), ("cuda", 0.90)):
        runner = SimpleNamespace(device=torch.device(device))
        llm = SimpleNamespace(engine=SimpleNamespace(runner=runner, model_name="m"))
        monkeypatch.setattr(mixed_module, "_load", lambda options, llm=llm: llm)
        found = run_mixed(MixedOptions("m", depths=(0, 3), device="auto"))
        assert (found["target"], found["met"]) == (target, device == "cuda")
