"""What a run of `sleb bench throughput` says about itself: its control, its conditions, whether it is fast enough."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sleb.benchmarks import ceilings as ceilings_module
from sleb.benchmarks.results import Row, make_row, rows_below
from sleb.benchmarks.throughput import ThroughputBench, run_throughput
from sleb.benchmarks.throughput_report import notes, print_report
from sleb.benchmarks.throughput_rows import control_notices
from sleb.benchmarks.variants import CONTROL, Variant
from sleb.benchmarks.workloads import ThroughputOptions, Workload
from sleb.cli.bench import app
from sleb.errors import ConfigError
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
        model=str(tiny_model_dir), layer_map=tiny_chain, depths=(0, 3), batches=(2,), prompt_tokens=6,
        output_tokens=3, tests=("generate",), repetitions=6, max_repetitions=6,
    )  # fmt: skip


@pytest.fixture
def map_file(tmp_path: Path, tiny_chain: LayerMap) -> Path:
    tiny_chain.save(tmp_path / "map.json")
    return tmp_path / "map.json"


def rows_of(options: ThroughputOptions, ratios: dict[Variant, Sequence[float]]) -> list[Row]:
    """The rows of runs that are so much faster than the baseline, one ratio a repetition."""
    bench = ThroughputBench(options)
    [workload] = bench.workloads
    count = len(next(iter(ratios.values())))
    repetitions = [
        {0: 1.0} | {variant: 1.0 / each[number] for variant, each in ratios.items()}
        for number in range(count)
    ]
    return bench.rows({workload: repetitions})


def test_rows_of_all_variants(options: ThroughputOptions) -> None:
    report = run_throughput(options)
    assert [row.variant for row in report.rows] == ["depth 0", "depth 3", "control", "mixed"]
    assert [row.depth for row in report.rows] == [0, 3, 0, None]
    assert report.rows[0].verdict == "baseline"
    assert {row.repetitions for row in report.rows} == {6}
    assert {row.stopped for row in report.rows} <= {"interval", "repetitions"}
    assert all(row.speedup_level == 0.95 for row in report.rows)
    assert all(row.speedup_low <= row.speedup <= row.speedup_high for row in report.rows)
    assert (report.rows[2].ideal_speedup, report.rows[2].ideal_gain_share) == (1.0, None)


def test_a_control_that_equals_its_baseline_needs_no_word(options: ThroughputOptions) -> None:
    plain = replace(options, mixed=False)
    rows = rows_of(plain, {3: [1.2] * 6, CONTROL: [0.99, 1.01, 1.0, 0.995, 1.004, 1.002]})
    assert rows[-1].verdict == "no difference"
    assert control_notices(rows, 0.01) == []


def test_a_control_that_differs_makes_the_run_untrusted(options: ThroughputOptions) -> None:
    plain = replace(options, mixed=False)
    [notice] = control_notices(rows_of(plain, {3: [1.2] * 6, CONTROL: [0.95, 0.94, 0.96] * 2}), 0.01)
    assert notice.startswith(
        "generate 2 × 3 after 6: depth 0 measured a second time, as a control, came out 5.0% slower than itself "
        "(0.940–0.960). This run cannot be trusted"
    )
    [small] = control_notices(rows_of(plain, {3: [1.2] * 6, CONTROL: [1.004, 1.003, 1.005] * 2}), 0.01)
    assert "0.4% faster than itself" in small and "cannot be trusted" not in small
    assert small.endswith(
        "Differences of 0.4% and less mean nothing here; one control in twenty errs by chance."
    )


def test_controls_err_more_often_where_repetitions_go_on_until_narrow(options: ThroughputOptions) -> None:
    rows = rows_of(replace(options, mixed=False), {3: [1.2] * 6, CONTROL: [1.004, 1.003, 1.005] * 2})
    rows = [replace(row, stopped="interval") for row in rows]
    [notice] = control_notices(rows, 0.01, until_narrow=True)
    assert "repeated until intervals are narrow, about one control in twelve errs by chance" in notice
    for others in (
        control_notices(rows, 0.01),
        control_notices([replace(rows[-1], stopped="time")], 0.01, True),
    ):
        assert "one control in twenty" in others[0]


def test_what_intervals_are_worth_is_told_where_they_ended_the_repetitions(
    options: ThroughputOptions,
) -> None:
    report = run_throughput(options)
    for most, stopped, told in ((30, "interval", True), (6, "interval", False), (30, "repetitions", False)):
        rows = [replace(row, stopped=stopped) for row in report.rows]
        changed = replace(report, rows=rows, settings={**report.settings, "max_repetitions": most})
        found = [
            note for note in notes(changed.to_dict()) if "hold the true value in 92 to 95 % of runs" in note
        ]
        assert len(found) == told


def test_notes_of_a_file_that_lacks_what_came_later() -> None:
    row = {
        "test": "generate",
        "depth": 6,
        "batch": 8,
        "prompt_tokens": 64,
        "output_tokens": 128,
        "speedup": 1.2,
    }
    assert notes({"kind": "throughput", "rows": [row]}) == []
    assert notes({"kind": "throughput", "model": "a name", "rows": []}) == []
    [note] = notes({"rows": [row | {"relative_spread": 0.2}]})
    assert note.startswith(
        "* Noisy: half the spread is above 10% of the median (generate 8 × 128 after 64, 6: ±20%)"
    )
    [note] = notes({"rows": [row | {"roofline_share": 1.2}], "settings": {}})
    assert "measured too low" in note


def test_rows_below(options: ThroughputOptions) -> None:
    deep = replace(options, depths=(0, 3, 5), mixed=False)
    rows = rows_of(deep, {3: [1.1] * 6, 5: [1.3] * 6, CONTROL: [0.9] * 6})
    assert [row.variant for row in rows_below(rows, 1.15)] == ["depth 3"]
    assert [row.variant for row in rows_below(rows, 1.5)] == ["depth 3", "depth 5"]
    assert rows_below(rows, 1.0) == []


def test_the_time_budget_ends_a_workload(options: ThroughputOptions) -> None:
    report = run_throughput(replace(options, time_budget=1e-6))
    assert {row.repetitions for row in report.rows} == {1} and {row.stopped for row in report.rows} == {
        "time"
    }
    text = " ".join(notes(report.to_dict()))
    assert "An interval of 95 % takes 6 repetitions" in text


def test_the_result_has_the_machines_conditions(options: ThroughputOptions) -> None:
    result = run_throughput(options).to_dict()
    assert result["kind"] == "throughput"
    found = result["conditions"]
    assert set(found) >= {"notices", "others_share", "clock"}
    assert len(found["repetitions"]) == 6
    assert {each["workload"] for each in found["repetitions"]} == {"generate 2 × 3 after 6"}
    assert all(len(each["run_shares"]) <= 4 for each in found["repetitions"])
    assert found["clock"]["unit"] in ("MHz", "relative")
    json.dumps(result, allow_nan=False)


def test_notices_are_printed(options: ThroughputOptions) -> None:
    report = run_throughput(options)
    told = replace(report, conditions={"notices": ["The processor's pace changed by 12% (…)."]})
    console = Console(record=True, width=160)
    print_report(told, console)
    assert console.export_text().splitlines()[-1] == "The processor's pace changed by 12% (…)."


def test_wide_intervals_are_told_with_what_stopped_them(options: ThroughputOptions) -> None:
    report = run_throughput(options)
    wide = [1.2, 1.1, 1.3, 1.2, 1.15, 1.25]
    rows = rows_of(replace(options, mixed=False), {3: wide, CONTROL: [1.0] * 6})
    told = replace(report, rows=[replace(row, stopped="repetitions") for row in rows])
    assert any(
        note.startswith("Intervals wider than ±1.0% (generate 2 × 3 after 6, the most repetitions: ±8.3%)")
        for note in notes(told.to_dict())
    )
    narrow = replace(report, rows=[replace(row, stopped="interval") for row in rows[:1]])
    assert not any("wider" in note for note in notes(narrow.to_dict()))


def test_a_share_above_the_ceiling_is_explained(options: ThroughputOptions) -> None:
    report = run_throughput(options)
    for share, explained in ((0.9, False), (1.3, True)):
        told = replace(report, rows=[replace(row, roofline_share=share) for row in report.rows])
        assert any("measured too low" in note for note in notes(told.to_dict())) is explained


def bench(model: Path, map_file: Path, *arguments: object) -> Any:
    words = "--depths 0,3 --batches 2 --tests generate --prompt-tokens 6 --output-tokens 3 --threads 1"
    words += " --repetitions 2 --max-repetitions 2"
    return CliRunner().invoke(
        app, ["throughput", str(model), "--layer-map", str(map_file), *words.split(), *map(str, arguments)]
    )


def test_the_table_names_the_variants(tiny_model_dir: Path, map_file: Path) -> None:
    done = bench(tiny_model_dir, map_file)
    assert done.exit_code == 0, done.output
    for text in ("0 again", "0 + 3", "verdict", "as a control", "1 if mixing costs nothing", "threads read"):
        assert text in done.stdout, text


def test_fail_below(tiny_model_dir: Path, map_file: Path) -> None:
    done = bench(tiny_model_dir, map_file, "--fail-below", 1000)
    assert done.exit_code == 1
    [line] = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("below --fail-below 1000: generate 2 × 3 after 6, depth 3: ")
    assert "tokens/s" in done.stdout
    assert bench(tiny_model_dir, map_file, "--fail-below", 0.001).exit_code == 0


def test_fail_below_needs_something_to_judge(tiny_model_dir: Path, map_file: Path) -> None:
    done = bench(tiny_model_dir, map_file, "--depths", "3", "--fail-below", 1.1)
    assert isinstance(done.exception, ConfigError)
    assert "depth 3 alone is measured" in str(done.exception)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for the module that writes reports: what it was called with."""
    calls: list[Any] = []
    module: Any = ModuleType("sleb.benchmarks.show")

    def check(directory: Path) -> None:
        if directory.name == "forbidden":
            raise ConfigError("forbidden cannot be written")
        calls.append(("check", directory))

    module.check_report = check
    module.write_report = lambda directory, results: calls.append(("write", directory, len(results)))
    monkeypatch.setitem(sys.modules, "sleb.benchmarks.show", module)
    return calls


def test_a_report_is_checked_first_and_written_last(
    tiny_model_dir: Path, map_file: Path, tmp_path: Path, reports: list[Any]
) -> None:
    done = bench(tiny_model_dir, map_file, "--report", tmp_path / "report", "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    assert reports[0] == ("check", tmp_path / "report")
    assert reports[1] == ("write", tmp_path / "report", 1)
    done = bench(Path("no such model"), map_file, "--report", tmp_path / "forbidden")
    assert "forbidden cannot be written" in str(done.exception)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--interval", "1"], "--interval is '1'; it must be a share between 0 and 1, as 1%"),
        (["--interval", "nan"], "--interval is 'nan'"),
        (["--interval", "0%"], "--interval is '0%'"),
        (["--max-repetitions", 1], "--max-repetitions is 1; it must be at least --repetitions, 2"),
        (["--time-budget", -1], "--time-budget is -1"),
        (["--time-budget", "inf"], "--time-budget is inf"),
        (["--fail-below", 0], "--fail-below is 0"),
    ],
)
def test_options_out_of_range(
    tiny_model_dir: Path, map_file: Path, words: list[object], complaint: str
) -> None:
    done = bench(tiny_model_dir, map_file, *words)
    assert isinstance(done.exception, ConfigError), done.output
    assert complaint in str(done.exception)


def slowed(share: float) -> Callable[[ThroughputBench, Workload, int], Callable[[Variant], float | None]]:
    """ThroughputBench.prepare whose control spins for that share of its time after it is done."""
    prepare = ThroughputBench.prepare

    def prepared(
        self: ThroughputBench, workload: Workload, repetition: int
    ) -> Callable[[Variant], float | None]:
        run = prepare(self, workload, repetition)

        def timed(variant: Variant) -> float | None:
            started = time.perf_counter()
            found = run(variant)
            if variant == CONTROL:
                ends = time.perf_counter() + share * (time.perf_counter() - started)
                while time.perf_counter() < ends:
                    pass
            return found

        return timed

    return prepared


@pytest.mark.slow
def test_a_real_slowdown_of_five_percent_is_found_and_none_is_not(
    options: ThroughputOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal variants may differ in one measurement of twenty, and two of three seldom do."""
    real = replace(
        options, depths=(0,), batches=(8,), prompt_tokens=64, output_tokens=64, max_repetitions=30, threads=1
    )
    equal = [run_throughput(replace(real, seed=seed)).rows[-1] for seed in range(3)]
    assert sum(row.verdict == "no difference" for row in equal) >= 2, equal
    monkeypatch.setattr(ThroughputBench, "prepare", slowed(0.05))
    slow = [run_throughput(replace(real, seed=seed)) for seed in range(3)]
    assert all(report.rows[-1].verdict == "slower" for report in slow), [report.rows[-1] for report in slow]
    assert all("cannot be trusted" in report.conditions["notices"][0] for report in slow)
    assert [row.rows[-1].speedup for row in slow] == pytest.approx([1 / 1.05] * 3, abs=0.03)


def test_a_row_without_a_level_has_no_half_width() -> None:
    facts: dict[str, Any] = dict.fromkeys(
        (
            "depth",
            "baseline_depth",
            "num_blocks_kept",
            "batch",
            "prompt_tokens",
            "output_tokens",
            "weight_bytes",
        ),
        0,
    )
    row = make_row(
        [1.0] * 5, [1.0, 1.1, 1.2, 1.1, 1.0], counted_tokens=1, ideal_speedup=1.0, test="prompt",
        kv_bytes=0, kv_bytes_per_token=0, **facts,
    )  # fmt: skip
    assert (row.speedup_low, row.speedup_high, row.half_width) == (1.0, 1.2, None)
