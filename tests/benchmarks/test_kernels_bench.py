"""`sleb bench kernels`: what is counted, how shares come about, and what a backend that cannot run says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sleb.benchmarks import ceilings as ceilings_module
from sleb.benchmarks import kernels as kernels_module
from sleb.benchmarks.ceilings import Ceilings, measure_ceilings, seconds_of_calls
from sleb.benchmarks.kernel_cases import OPS, Case, Maker, make_cases
from sleb.benchmarks.kernels import KernelOptions, make_kernel_row, plan, run_kernels
from sleb.benchmarks.report import kernel_notes
from sleb.cli.bench import app
from sleb.errors import ConfigError
from sleb.kernels.quantization import Int4Weight, Int8Weight

CEILINGS = Ceilings(1e9, 1e12, [1e9], [1e12], "float32")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of small buffers, and samples of one call: nothing here asks how long it took."""
    monkeypatch.setattr(ceilings_module, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings_module, "_MATRIX_SIZE", {"cpu": 16})
    monkeypatch.setattr(kernels_module, "_num_passes", lambda num_sets, seconds: 1)


def case(op: str, start: str) -> Case:
    """The full case of `op` whose shape begins so, in bfloat16."""
    [found] = [each for each in make_cases("full", torch.bfloat16, (op,)) if each.shape.startswith(start)]
    return found


@pytest.mark.parametrize(
    ("op", "start", "num_bytes"),
    [
        # Residual and delta in, residual and norm out: 2 bytes each; the weight; LayerNorm's bias too.
        ("add_norm", "rms 64", 4 * 64 * 4096 * 2 + 4096 * 2),
        ("add_norm", "layer 4096", 4 * 4096 * 4096 * 2 + 2 * 4096 * 2),
        # 48 heads of 128 in and out; 64 float32 cosines and sines; a position and a slot of 4 bytes.
        ("rope_store", "64 × (32 + 2 · 8) × 128", 64 * (48 * 128 * 2 * 2 + 2 * 64 * 4 + 2 * 4)),
        ("gated_activate", "silu 64", 64 * 14336 * 3 * 2),
        ("activate", "relu 64", 64 * 16384 * 2 * 2),
        # K and V of 8 heads; queries in and out of 32.
        ("decode_attention", "batch 64, context 2048, heads 32/8", 64 * (2048 * 2 * 8 + 2 * 32) * 128 * 2),
        ("decode_attention", "batch 64, context 2048, heads 32/32", 64 * (2048 * 2 * 32 + 2 * 32) * 128 * 2),
        ("decode_attention", "batch 1, context 8192", (8192 * 2 * 8 + 2 * 32) * 128 * 2),
        ("greedy", "64", 64 * 128256 * 2 + 64 * 8),
        ("log_softmax_gather", "64", 64 * 128256 * 2 + 64 * (8 + 4)),
        ("sample", "64", 64 * 128256 * 2 + 64 * (5 * 8 + 8)),
        ("linear", "plain, 16 rows, 4096 → 4096", (4096 * 4096 + 2 * 16 * 4096) * 2),
        ("linear", "int8, 1 rows, 14336", 14336 * 4096 + 4096 * 4 + (14336 + 4096) * 2),
        ("linear", "int4, 1 rows, 4096 → 4096", 4096 * 4096 * 5 // 8 + 2 * 4096 * 2),
    ],
)
def test_bytes_by_hand(op: str, start: str, num_bytes: int) -> None:
    if op == "rope_store":
        found = [each for each in make_cases("full", torch.bfloat16, (op,)) if each.shape == start]
        assert [each.num_bytes for each in found] == [num_bytes]
    else:
        assert case(op, start).num_bytes == num_bytes


def test_operations_by_hand() -> None:
    """Scores and values are a product each; a prompt's token sees itself and those before."""
    assert case("prefill_attention", "2048 tokens").flops == 2 * 2 * 32 * 128 * (2048 * 2049 // 2)
    after = sum(4096 + number for number in range(1, 513))
    assert case("prefill_attention", "512 tokens after 4096").flops == 2 * 2 * 32 * 128 * after
    assert case("linear", "int8, 64 rows, 4096 → 28672").flops == 2 * 64 * 4096 * 28672


def bytes_in(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Int8Weight | Int4Weight):
        return value.num_bytes
    return sum(map(bytes_in, value)) if isinstance(value, tuple) else 0


@pytest.mark.parametrize(
    "op", ["gated_activate", "activate", "greedy", "log_softmax_gather", "sample", "linear"]
)
def test_the_bytes_are_those_of_inputs_and_outputs(op: str) -> None:
    """Against the tensors themselves; the row count, which has four bytes, is not counted."""
    for each in make_cases("small", torch.float32, (op,)):
        inputs = each.build(Maker(torch.device("cpu"), torch.float32), 16)
        backend = kernels_module.select_backend("torch", each, torch.device("cpu"), torch.float32)
        uncounted = 4 if "activate" in op else 0
        assert bytes_in(inputs) + each.call(backend, inputs).nbytes - uncounted == each.num_bytes


def test_the_share_is_of_the_limit_that_takes_longer() -> None:
    def made(num_bytes: int, flops: int) -> Case:
        return Case(
            "linear", "x", num_bytes, flops, lambda maker, size: (), lambda backend, inputs: inputs[0]
        )

    # 1,000 bytes take 1 µs at a ceiling of 1 GB/s, 10⁶ operations 1 µs at one of 1 TFLOP/s.
    row = make_kernel_row(made(1000, 500_000), "torch", "clock", [2e-6, 4e-6, 5e-6], CEILINGS)
    assert (row.bound, row.microseconds) == ("bytes", pytest.approx(4))
    assert (row.microseconds_low, row.microseconds_high) == (pytest.approx(2), pytest.approx(5))
    assert row.roofline_share == pytest.approx(0.25)
    assert row.gb_per_second == pytest.approx(0.25)
    assert row.tflops == pytest.approx(0.125)
    row = make_kernel_row(made(1000, 3_000_000), "torch", "clock", [4e-6], CEILINGS)
    assert (row.bound, row.roofline_share) == ("operations", pytest.approx(0.75))
    row = make_kernel_row(made(1000, 0), "torch", "clock", [4e-6], CEILINGS)
    assert row.tflops is None
    row = make_kernel_row(made(1000, 1), "triton", "interpreted", [4e-6], CEILINGS)
    assert (row.roofline_share, row.gb_per_second, row.tflops) == (None, None, None)


def test_ceilings_count_what_is_read_and_written() -> None:
    found = measure_ceilings(torch.device("cpu"), torch.bfloat16, repetitions=3)
    assert len(found.copy_samples) == len(found.matrix_samples) == 3
    assert min(found.copy_samples) <= found.copy_bytes_per_second <= max(found.copy_samples)
    assert found.dtype == "bfloat16"
    assert CEILINGS.floor_seconds(2e9) == 2.0
    assert CEILINGS.floor_seconds(1e9, 3e12) == 3.0


def test_a_call_is_timed_as_the_mean_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 16.0])
    monkeypatch.setattr(ceilings_module.time, "perf_counter", lambda: next(now))
    made: list[int] = []
    calls = [lambda: made.append(1), lambda: made.append(2), lambda: made.append(3)]
    assert seconds_of_calls(calls, torch.device("cpu")) == 2.0
    assert made == [1, 2, 3]


def test_every_operator_runs_on_a_cpu() -> None:
    report = run_kernels(KernelOptions(backends=("torch",), device="cpu", repetitions=2))
    assert report.complete
    assert tuple(dict.fromkeys(row.op for row in report.rows)) == OPS
    for row in report.rows:
        assert (row.backend, row.timing, row.reason) == ("torch", "clock", None)
        assert len(row.microseconds_samples) == 2 and row.roofline_share is not None
    assert report.settings["scale"] == "small"
    assert report.environment["dtype"] == "float32"


def test_backends_that_cannot_run_are_rows_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "_interpreted", lambda: False)
    options = KernelOptions(
        ops=("decode_attention", "greedy"), backends=kernels_module.BACKENDS, device="cpu", repetitions=1
    )
    report = run_kernels(options)
    by_backend: dict[str, list[Any]] = {}
    for row in report.rows:
        by_backend.setdefault(row.backend, []).append(row)
    assert {row.op for row in by_backend["flash"]} == {row.op for row in by_backend["varlen"]}
    assert {row.op for row in by_backend["flash"]} == {"decode_attention"}  # they have nothing else
    for name, word in (("triton", "CUDA"), ("flash", "CUDA"), ("varlen", "varlen")):
        assert all(row.microseconds is None and word in str(row.reason) for row in by_backend[name])
    assert all(row.reason is None for row in by_backend["torch"])
    json.loads(report.to_json())


def test_default_backends_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "_interpreted", lambda: False)
    assert plan(KernelOptions(device="cpu")).backends == ("torch",)
    monkeypatch.setattr(kernels_module, "_interpreted", lambda: True)
    assert plan(KernelOptions(device="cpu")).backends == ("torch", "triton")


def test_an_operator_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr("sleb.kernels.reference.ops.greedy", broken)
    report = run_kernels(
        KernelOptions(ops=("greedy", "sample"), backends=("torch",), device="cpu", repetitions=1)
    )
    assert [(row.op, row.reason) for row in report.rows] == [
        ("greedy", "RuntimeError: no such instruction"),
        ("sample", None),
    ]


def test_an_interrupted_run_reports_complete_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_case, num_cases = kernels_module.measure_case, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal num_cases
        num_cases += 1
        if num_cases > 2:
            raise KeyboardInterrupt
        return measure_case(*arguments)

    monkeypatch.setattr(kernels_module, "measure_case", interrupted)
    report = run_kernels(KernelOptions(backends=("torch",), device="cpu", repetitions=1))
    assert not report.complete
    assert [row.shape for row in report.rows] == ["rms 4 × 64", "layer 4 × 64"]
    assert "Interrupted" in kernel_notes(report)[0]


def test_interpreted_kernels_are_marked() -> None:
    """In a process of its own: Triton decides when a kernel is defined."""
    pytest.importorskip("triton")
    program = (
        "from sleb.benchmarks.kernels import KernelOptions, run_kernels\n"
        "report = run_kernels(KernelOptions(ops=('activate',), device='cpu', repetitions=1))\n"
        "print(*(f'{row.backend}:{row.timing}:{row.roofline_share is None}' for row in report.rows))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch:clock:False", "triton:interpreted:True"] * 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ops": ("softmax",)}, "op 'softmax' is not known; choose from: add_norm, rope_store"),
        ({"ops": ()}, "no op is named"),
        ({"ops": ("greedy", "greedy")}, "op 'greedy' is named twice"),
        ({"backends": ("cudnn",)}, "backend 'cudnn' is not known; choose from: torch, triton, flash, varlen"),
        ({"repetitions": 0}, "--repetitions is 0"),
        ({"repetitions": 10_001}, "--repetitions is 10001; it must be an integer from 1 to 10,000"),
        ({"dtype": "float8"}, "--dtype is 'float8'"),
        ({"scale": "huge"}, "--scale is 'huge'; choose one of: auto, full, small"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_what_cannot_be_measured_is_an_error_with_a_remedy(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(KernelOptions(**changes))
    assert complaint in str(caught.value)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    words = ["kernels", "--ops", "greedy,linear", "--device", "cpu", "--repetitions", "1", "--dtype", "bf16"]
    done = CliRunner().invoke(app, [*words, "--backends", "torch,flash", "--json", str(output)])
    assert done.exit_code == 0, done.output
    for text in ("bfloat16", "greedy", "int4, 4 rows, 64 → 96", "of limit", "GB/s"):
        assert text in done.stdout
    result = json.loads(output.read_text())
    assert list(result) == ["kind", "environment", "settings", "rows", "complete"]
    assert set(result["environment"]["ceilings"]) >= {"copy_bytes_per_second", "matrix_flops_per_second"}
    assert str(tmp_path) not in output.read_text()


def test_the_command_names_a_wrong_option() -> None:
    done = CliRunner().invoke(app, ["kernels", "--ops", "softmax"])
    assert isinstance(done.exception, ConfigError)
