"""`sleb bench diff`: planted changes are found, equal files are equal, what does not compare is an error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result as Outcome
from typer.testing import CliRunner

from sleb.benchmarks.reports.diff import Change, Difference, compare
from sleb.benchmarks.reports.kinds import Result, read_result
from sleb.benchmarks.reports.measure import sample_interval
from sleb.benchmarks.reports.measures import measures
from sleb.cli.bench.diff import diff
from sleb.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks/results").glob("*.json"))
ENVIRONMENT = {
    "cpu": "A processor",
    "threads": 2,
    "python": "3.11.7",
    "date": "2026-01-02",
    "load_average": 0.5,
}
PRUNED = "prompt 1 × 2048, depth 6"
_SAMPLES = (0.97, 1.0, 0.99, 1.01, 1.02, 1.0)


def speed() -> dict[str, Any]:
    """A prompt and eight streams at depths 0 and 6; the six samples of a row are within 5 % of each other."""
    rows = []
    for test, batch, prompt_tokens, output_tokens in (("prompt", 1, 2048, 1), ("generate", 8, 64, 128)):
        for depth, rate in ((0, 1000.0), (6, 1250.0)):
            rows.append(
                {
                    "test": test,
                    "depth": depth,
                    "variant": f"depth {depth}",
                    "batch": batch,
                    "prompt_tokens": prompt_tokens,
                    "output_tokens": output_tokens,
                    "tokens_per_second": rate,
                    "tokens_per_second_samples": [rate * share for share in _SAMPLES],
                    "speedup": rate / 1000,
                }
            )
    return {
        "kind": "throughput",
        "environment": dict(ENVIRONMENT),
        "settings": {"weights": "auto"},
        "rows": rows,
    }


def formats() -> dict[str, Any]:
    rows = [
        {"implementation": "sleb", "weights": weights, "perplexity": perplexity}
        for weights, perplexity in (("bfloat16", 24.0), ("int8", 25.0))
    ]
    return {"kind": "weight-formats", "rows": rows}


def slower(row: dict[str, Any], factor: float) -> None:
    """Multiplies the rates of a row."""
    row["tokens_per_second"] *= factor
    row["tokens_per_second_samples"] = [factor * value for value in row["tokens_per_second_samples"]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Outcome]:
    """Runs the command on two results."""
    app = typer.Typer()
    app.command()(diff)

    def invoke(a: Any, b: Any, *arguments: str) -> Outcome:
        for name, data in (("a.json", a), ("b.json", b)):
            (tmp_path / name).write_text(json.dumps(data), "utf-8")
        files = [str(tmp_path / name) for name in ("a.json", "b.json")]
        return CliRunner().invoke(app, [*files, *arguments])

    return invoke


def compared(a: Any, b: Any) -> Difference:
    return compare(Result.of(a, "a.json"), Result.of(b, "b.json"))


def by_name(found: Difference) -> dict[str, Change]:
    return {row.name: row for row in found.rows}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_file_is_as_good_as_itself(path: Path) -> None:
    found = compare(read_result(path), read_result(path))
    assert found.rows
    assert {row.ratio for row in found.rows} == {1.0}
    assert {row.overlap for row in found.rows} <= {True, None}
    assert {row.speedup_change for row in found.rows} <= {0.0, None}
    assert (found.environment, found.only_a, found.only_b) == ({}, [], [])
    assert found.below(1.0) == []


def test_equal_files_do_not_fail(run: Callable[..., Outcome]) -> None:
    data = speed()
    done = run(data, data, "--fail-below", "1")
    assert done.exit_code == 0, done.output
    assert "The environments are the same." in done.output


def test_a_planted_change_is_found_in_its_row(run: Callable[..., Outcome], tmp_path: Path) -> None:
    a, b = speed(), speed()
    slower(b["rows"][1], 0.9)
    written = tmp_path / "diff.json"
    assert run(a, b).exit_code == 0  # nobody asked it to fail
    done = run(a, b, "--fail-below", "0.95", "--json", str(written))
    assert done.exit_code == 1
    assert f"Below 0.95: {PRUNED} (0.900)." in done.output
    found = json.loads(written.read_text("utf-8"))
    assert found["below"] == [PRUNED]
    assert (found["kind"], found["of"], found["fail_below"]) == ("diff", "throughput", 0.95)
    ratios = {row["name"]: row["ratio"] for row in found["rows"]}
    assert ratios.pop(PRUNED) == pytest.approx(0.9)
    assert set(ratios.values()) == {1.0}
    assert run(a, b, "--fail-below", "0.85").exit_code == 0


def test_overlap_is_that_of_the_samples() -> None:
    """The samples are within 5 % of each other: ten percent parts them, one percent does not."""
    a = speed()
    for factor, overlap in ((0.9, False), (0.99, True)):
        b = copy.deepcopy(a)
        slower(b["rows"][1], factor)
        low, high = (
            min(b["rows"][1]["tokens_per_second_samples"]),
            max(b["rows"][1]["tokens_per_second_samples"]),
        )
        samples = a["rows"][1]["tokens_per_second_samples"]
        assert (min(samples) <= high and low <= max(samples)) is overlap
        assert by_name(compared(a, b))[PRUNED].overlap is overlap
    del b["rows"][1]["tokens_per_second_samples"]
    assert by_name(compared(a, b))[PRUNED].overlap is None


def test_few_samples_tell_nothing_of_chance(run: Callable[..., Outcome]) -> None:
    """With one repetition each, the samples never overlap: that says nothing."""
    a, b = speed(), speed()
    slower(b["rows"][1], 0.9)
    b["rows"][1]["tokens_per_second_samples"] = b["rows"][1]["tokens_per_second_samples"][:5]
    assert by_name(compared(a, b))[PRUNED].overlap is None
    assert by_name(compared(b, a))[PRUNED].overlap is None
    done = run(a, b)
    assert "blank where either has fewer than six samples" in " ".join(done.output.split())


def test_a_rate_that_collapses_to_nothing_fails(run: Callable[..., Outcome], tmp_path: Path) -> None:
    a, b = speed(), speed()
    slower(b["rows"][1], 0.0)
    assert by_name(compared(a, b))[PRUNED].ratio == 0
    done = run(a, b, "--fail-below", "0.5")
    assert done.exit_code == 1
    assert f"Below 0.5: {PRUNED} (0.000)." in done.output
    written = tmp_path / "diff.json"
    back = run(b, a, "--fail-below", "0.5", "--json", str(written))  # nothing has a ratio to nothing
    assert back.exit_code == 0, back.output
    assert f"Without a ratio, as it would be over 0: {PRUNED}." in back.output
    assert json.loads(written.read_text("utf-8"))["without_ratio"] == [PRUNED]


def test_other_layer_maps_and_models_are_told() -> None:
    def of(fingerprint: str, *removed: str) -> dict[str, Any]:
        return speed() | {"model": {"name": "tiny", "fingerprint": fingerprint, "removed": list(removed)}}

    assert compared(of("sha256:1", "17", "5"), of("sha256:2", "17", "18", "5")).environment == {
        "model fingerprint": ("sha256:1", "sha256:2"),
        "layer map": ("17, 5", "17, 18, 5"),
    }
    # Measured to other depths it is the same map.
    assert compared(of("sha256:1", "17", "5"), of("sha256:1", "17", "5", "18")).environment == {}
    assert compared(of("sha256:1"), of("sha256:1", "17")).environment == {}


def test_other_orders_of_searches_and_fronts_are_told() -> None:
    def search(*removed: int) -> dict[str, Any]:
        calibration = {"windows": 2, "seqlen": 4}
        return {"kind": "prune", "losses": [8.0, 9.0, 9.5], "removed": removed, "calibration": calibration}

    assert compared(search(17, 5), search(5, 17)).environment == {"layer map": ("17, 5", "5, 17")}
    row = {"map": "blocks", "depth": 1, "predicted_speedup": 1.1}
    first, second = (
        {"kind": "fronts", "rows": [row], "maps": {"blocks": {"removed": [unit]}, "more": {"removed": ["1"]}}}
        for unit in ("17", "5.mlp")
    )
    assert compared(first, second).environment == {"layer map blocks": ("17", "5.mlp")}


def test_speedups_are_subtracted() -> None:
    a, b = speed(), speed()
    b["rows"][1]["speedup"] = a["rows"][1]["speedup"] - 0.125
    assert by_name(compared(a, b))[PRUNED].speedup_change == pytest.approx(-0.125)


def test_of_times_and_perplexities_less_is_better() -> None:
    a, b = formats(), formats()
    b["rows"][1]["perplexity"] *= 1.25
    rows = by_name(compared(a, b))
    assert rows["sleb, int8"].ratio == pytest.approx(0.8)
    kernels = {
        "kind": "kernels",
        "rows": [{"op": "add", "shape": "4", "backend": "torch", "microseconds": 10.0}],
    }
    faster = copy.deepcopy(kernels)
    faster["rows"][0]["microseconds"] = 8.0  # type: ignore[index]
    [change] = compared(kernels, faster).rows
    assert (change.name, change.ratio) == ("add, 4, torch", pytest.approx(1.25))


def test_what_differs_around_it_is_told_first(run: Callable[..., Outcome]) -> None:
    a, b = speed(), speed()
    b["environment"] |= {"threads": 4, "date": "2027-01-01", "load_average": 7.5}
    del b["environment"]["python"]
    b["settings"]["weights"] = "int8"
    lines = run(a, b).output.splitlines()
    assert lines[2:5] == [
        "weights: auto in A, int8 in B",
        "threads: 2 in A, 4 in B",
        "Python: 3.11.7 in A, not told in B",
    ]
    assert "measured" in lines[6]


def test_rows_of_one_alone_are_listed_and_do_not_fail(run: Callable[..., Outcome]) -> None:
    a, b = speed(), speed()
    dropped = b["rows"].pop(0)
    b["rows"].append(dropped | {"batch": 77, "test": "generate", "output_tokens": 128, "prompt_tokens": 64})
    done = run(a, b, "--fail-below", "0.99")
    assert done.exit_code == 0
    assert "Only in A: prompt 1 × 2048, depth 0." in done.output
    assert "Only in B: generate 77 × 128 after 64, depth 0." in done.output


def test_different_kinds_are_an_error(run: Callable[..., Outcome]) -> None:
    for a, b in ((speed(), formats()), (formats(), speed())):
        done = run(a, b)
        assert isinstance(done.exception, ConfigError)
        assert "two results of the same kind" in str(done.exception)


def test_nothing_in_common_is_an_error(run: Callable[..., Outcome]) -> None:
    a, b = speed(), speed()
    a["rows"], b["rows"] = a["rows"][:1], a["rows"][1:]
    done = run(a, b)
    assert isinstance(done.exception, ConfigError)
    assert "nothing in common" in str(done.exception)


@pytest.mark.parametrize("bound", ["0", "-1", "nan", "inf"])
def test_a_bound_that_is_no_ratio_is_an_error(bound: str, run: Callable[..., Outcome]) -> None:
    data = speed()
    done = run(data, data, "--fail-below", bound)
    assert isinstance(done.exception, ConfigError)
    assert "--fail-below" in str(done.exception)


def test_a_row_that_is_there_twice_is_an_error() -> None:
    a = speed()
    a["rows"].append(a["rows"][0])
    with pytest.raises(ConfigError, match=r"a\.json is no whole throughput result.*there twice"):
        compared(a, a)


def test_names_are_not_read_as_markup(run: Callable[..., Outcome]) -> None:
    data = formats()
    data["rows"][0]["implementation"] = "[red]sleb[/nothing]"
    assert "[red]sleb[/nothing], bfloat16" in run(data, data).output


def serve(rate: float, first: float, label: str | None = None) -> dict[str, Any]:
    """A level with a first token after so many seconds; one of its three requests fails."""
    row = {
        "level": "8 at once",
        "label": label,
        "output_throughput": rate,
        "ttfts": [first, 0.0, 3 * first],
        "itls": [[0.01, 0.03], [], [0.02]],
        "latencies": [1.0, 0.0, 1.0],
        "errors": ["", "HTTP 503", ""],
    }
    return {"kind": "serve", "rows": [row]}


def test_levels_of_serving_are_compared_by_rate_and_latency() -> None:
    rows = by_name(compared(serve(100.0, 0.1), serve(110.0, 0.05)))
    assert {name: round(row.ratio, 6) for name, row in rows.items()} == {
        "8 at once, tokens/s": 1.1,
        "8 at once, TTFT": 2.0,
        "8 at once, ITL": 1.0,
    }
    assert rows["8 at once, TTFT"].a == pytest.approx(
        200.0
    )  # of 0.1 and 0.3 s: the failed one does not count
    assert rows["8 at once, tokens/s"].overlap is None  # one stretch of time is one sample


def test_rounds_of_two_servers_are_samples() -> None:
    data = serve(120.0, 0.1, "A")
    data["rows"] += serve(150.0, 0.1, "B")["rows"]
    rounds = {
        "a_samples": [100.0, 120.0, 140.0, 110.0, 120.0, 130.0],
        "b_samples": [150.0, 151.0, 150.0, 151.0, 150.0],
        "speedup": 1.25,
    }
    data["comparisons"] = [{"level": "8 at once", "metric": "output_throughput"} | rounds]
    found = measures(Result.of(data, "it"))
    first, second = found["A, 8 at once, tokens/s"], found["B, 8 at once, tokens/s"]
    assert (first.value, first.interval, first.speedup) == (120.0, (100.0, 140.0), None)
    assert (second.value, second.interval, second.speedup) == (
        150.0,
        None,
        1.25,
    )  # five rounds say too little


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (8, 1), (9, 2), (20, 6), (40, 14), (100, 40)])
def test_the_interval_of_a_median(count: int, rank: int) -> None:
    """The ranks of tables of the sign test, as Hollander & Wolfe's: 95 %, two-sided."""
    assert sample_interval(range(count, 0, -1)) == (rank, count + 1 - rank)


def test_the_interval_of_many_samples_is_nearly_that_of_the_exact_ranks() -> None:
    low, high = sample_interval(range(1, 1002)) or (0, 0)
    assert low + high == 1002
    assert 469 <= low <= 471  # 470 by the binomial distribution


def test_few_samples_have_no_interval() -> None:
    assert sample_interval([]) is None
    assert sample_interval(None) is None
    assert sample_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
