"""`sleb bench kernels`: what is counted, how shares come about, and what a backend that cannot run says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sleb.benchmarks import ceilings as ceilings_module
from sleb.benchmarks import kernels as kernels_module
from sleb.benchmarks.ceilings import Ceilings, measure_ceilings, seconds_of_calls
from sleb.benchmarks.kernel_cases import KernelCase, Maker, make_cases
from sleb.benchmarks.kernel_options import BACKENDS, OPS, KernelsOptions
from sleb.benchmarks.kernels import KernelsBench, run_kernels, with_rates
from sleb.benchmarks.record import Measurement, Result
from sleb.cli.bench import app
from sleb.errors import ConfigError
from sleb.kernels.quantization import Int4Weight, Int8Weight
from sleb.kernels.registry import torch_gpu_kernels

CEILINGS = Ceilings(1e9, 1e12, "float32")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of small buffers, and samples of one call: nothing here asks how long it took."""
    monkeypatch.setattr(ceilings_module, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings_module, "_MATRIX_SIZE", {"cpu": 16})
    monkeypatch.setattr(kernels_module, "_num_passes", lambda num_sets, seconds: 1)


def case(op: str, start: str) -> KernelCase:
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
        # The weight; x, its norm's weight and moments; half of the products are gates.
        ("linear_activate", "plain, 1 rows", (4096 * 28672 + 4096 * 2 + 14336) * 2 + 64 * 4),
        # x; the residual in and out, and its moments.
        ("linear_add", "int8, 64 rows", 14336 * 4096 + 4096 * 4 + 64 * ((14336 + 2 * 4096) * 2 + 64 * 4)),
        # x, its norm's weight and moments; queries, keys and values; cosines, sines, a position and a slot.
        ("linear_rope_store", "plain, 1 rows", (4096 * 6144 + 2 * 4096 + 6144) * 2 + 64 * 4 + 128 * 4 + 8),
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
    """1,000 bytes take 1 µs at a ceiling of 1 GB/s, 10⁶ operations 1 µs at one of 1 TFLOP/s."""

    def rated(num_bytes: int, flops: int, timing: str = "clock") -> Measurement:
        facts = {"num_bytes": num_bytes, "num_operations": flops, "timing": timing}
        return with_rates(Measurement("linear x", "torch", "µs", 4.0, facts=facts), CEILINGS)

    facts = rated(1000, 500_000).facts
    assert facts["roofline_share"] == facts["GB/s"] == pytest.approx(0.25)
    assert facts["TFLOP/s"] == pytest.approx(0.125)
    assert rated(1000, 3_000_000).facts["roofline_share"] == pytest.approx(0.75)
    assert rated(1000, 0).facts["TFLOP/s"] is None
    assert "roofline_share" not in rated(1000, 1, "interpreted").facts


def test_ceilings() -> None:
    found = measure_ceilings(torch.device("cpu"), torch.bfloat16)
    assert found.copy_bytes_per_second > 0 and found.matrix_flops_per_second > 0
    assert found.dtype == "bfloat16"
    assert CEILINGS.floor_seconds(2e9) == 2.0
    assert CEILINGS.floor_seconds(1e9, 3e12) == 3.0
    assert replace(CEILINGS, read_bytes_per_second=2e9).floor_seconds(2e9) == 1.0


def test_a_call_is_timed_as_the_mean_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 16.0])
    monkeypatch.setattr(ceilings_module.time, "perf_counter", lambda: next(now))
    made: list[int] = []
    calls = [lambda: made.append(1), lambda: made.append(2), lambda: made.append(3)]
    assert seconds_of_calls(calls, torch.device("cpu")) == 2.0
    assert made == [1, 2, 3]


def run(**options: Any) -> Result:
    return run_kernels(KernelsOptions(**{"device": "cpu", "repetitions": 1, "max_repetitions": 1} | options))


def test_every_operator_runs_on_a_cpu() -> None:
    result = run(backends=("torch",), repetitions=2, max_repetitions=2)
    assert result.complete and result.environment["dtype"] == "float32"
    assert tuple(dict.fromkeys(each.case.split()[0] for each in result.measurements)) == OPS
    for each in result.measurements:
        assert (each.subject, each.metric, each.facts["timing"]) == ("torch", "µs", "clock")
        assert len(each.facts["samples"]) == 2 and each.facts["roofline_share"] is not None


def test_backends_that_cannot_run_are_rows_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "_interpreted", lambda: False)
    result = run(ops=("decode_attention", "greedy"), backends=BACKENDS)
    by_backend: dict[str, list[Measurement]] = {}
    for each in result.measurements:
        by_backend.setdefault(each.subject, []).append(each)
    for name in ("flash", "varlen"):  # they have nothing else
        assert {each.case.split()[0] for each in by_backend[name]} == {"decode_attention"}
    for name, word in (("triton", "CUDA"), ("flash", "CUDA"), ("varlen", "varlen")):
        assert all(each.value is None and word in each.facts["failed"] for each in by_backend[name])
        assert {each.metric for each in by_backend[name]} == {"µs"}
    assert all(each.value is not None for each in by_backend["torch"])
    json.dumps(result.document(), allow_nan=False)


def test_default_backends_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for interpreted, wanted in ((False, ("torch",)), (True, ("torch", "triton"))):
        monkeypatch.setattr(kernels_module, "_interpreted", lambda interpreted=interpreted: interpreted)
        assert KernelsBench(KernelsOptions(device="cpu")).backends == wanted


def test_an_operator_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr("sleb.kernels.reference.ops.greedy", broken)
    found = run(ops=("greedy", "sample"), backends=("torch",)).measurements
    assert [(each.case.split()[0], each.facts.get("failed")) for each in found] == [
        ("greedy", "RuntimeError: no such instruction"),
        ("sample", None),
    ]


def test_an_output_that_differs_from_the_reference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose activation is off by a tenth of its largest value."""
    kernels = torch_gpu_kernels()

    def off(rows: torch.Tensor, name: str, count: torch.Tensor) -> torch.Tensor:
        found = kernels.activate(rows, name, count)
        return found + found.abs().max() / 10

    monkeypatch.setattr(kernels_module, "_interpreted", lambda: True)
    monkeypatch.setattr(kernels_module, "triton_gpu_kernels", lambda: replace(kernels, activate=off))
    result = run(ops=("activate", "gated_activate", "greedy"), backends=("torch", "triton"))
    errors = {
        each.case.split()[0]: each.facts["error"] for each in result.measurements if each.subject == "triton"
    }
    assert errors == {"activate": pytest.approx(0.1, rel=1e-3), "gated_activate": 0.0, "greedy": 0.0}
    assert "WRONG beside the reference: activate gelu 4 × 128, triton: 0.1" in result.notes[1]


def test_an_interrupted_run_reports_complete_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, num_cases = kernels_module.measure, 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal num_cases
        num_cases += 1
        if num_cases > 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(kernels_module, "measure", interrupted)
    result = run(backends=("torch",))
    assert not result.complete
    assert [each.case for each in result.measurements] == ["add_norm rms 4 × 64", "add_norm layer 4 × 64"]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton decides when a kernel is defined, and compiles there"
)
def test_interpreted_kernels_are_marked() -> None:
    pytest.importorskip("triton")
    found = run(ops=("activate",)).measurements
    assert all((each.facts["error"] or 0) < 1e-5 for each in found)
    marks = [(each.subject, each.facts["timing"], "roofline_share" in each.facts) for each in found]
    assert marks == [("torch", "clock", True), ("triton", "interpreted", False)] * 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--ops", "softmax"], "--ops 'softmax' is not known; choose one of: add_norm, rope_store"),
        (["--ops", "greedy,greedy"], "--ops names one twice"),
        (
            ["--backends", "cudnn"],
            "--backends 'cudnn' is not known; choose one of: torch, triton, flash, varlen",
        ),
        (["--repetitions", "0"], "--repetitions is 0"),
        (["--repetitions", "1001"], "--repetitions is 1001; it must be an integer from 1 to 1000"),
        (["--dtype", "float8"], "--dtype 'float8' is not known"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_measured_is_told_before_torch(
    words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sleb.benchmarks.kernels", None)  # type: ignore[arg-type]
    done = CliRunner().invoke(app, ["kernels", *words])
    assert isinstance(done.exception, ConfigError), done.output
    assert complaint in str(done.exception)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    words = ["kernels", "--ops", "greedy,linear", "--device", "cpu", "--repetitions", "1", "--dtype", "bf16"]
    words += ["--max-repetitions", "1", "--backends", "torch,flash", "--json", str(output)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for text in ("bfloat16", "greedy", "of roofline", "GB/s"):
        assert text in done.stdout
    assert "linear int4, 4 rows, 64 → 96, turn 1: torch " in done.stderr
    result = json.loads(output.read_text())
    assert set(result["environment"]["ceilings"]) >= {"copy_bytes_per_second", "matrix_flops_per_second"}
    assert {row["metric"] for row in result["rows"]} == {"µs"}
    assert str(tmp_path) not in output.read_text()
