"""`sleb bench diff`: planted changes are found, equal files are equal, odd ones are an error, in old and new form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result as Outcome
from typer.testing import CliRunner

from sleb.benchmarks import show
from sleb.benchmarks.old import load, read_result
from sleb.benchmarks.record import Measurement, Ratio, Result, write_result
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
PRUNED = "prompt 1 × 2048, depth 6, tokens/s"


def old() -> dict[str, Any]:
    """A prompt and eight streams at depths 0 and 6, as throughput files were."""
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
                    "tokens_per_second_low": 0.97 * rate,
                    "tokens_per_second_high": 1.02 * rate,
                    "speedup": rate / 1000,
                    "verdict": "baseline" if depth == 0 else "faster",
                }
            )
    return {
        "kind": "throughput",
        "environment": dict(ENVIRONMENT),
        "settings": {"weights": "auto"},
        "rows": rows,
    }


def new(factor: float = 1.0) -> dict[str, Any]:
    """The same as files are now, all but the first rate `factor` times as high."""
    result = Result("throughput", dict(ENVIRONMENT), {"weights": "auto"})
    for case in ("prompt 1 × 2048", "generate 8 × 128 after 64"):
        for depth, rate in ((0, 1000.0), (6, 1250.0 * factor)):
            ratio = Ratio(rate / 1000) if depth else None
            spread = (0.97 * rate, 1.02 * rate)
            result.measurements.append(Measurement(case, f"depth {depth}", "tokens/s", rate, spread, ratio))
    return result.document()


def formats() -> dict[str, Any]:
    result = Result("eval", {}, {})
    for subject, perplexity in (("bfloat16", 24.0), ("int8", 25.0)):
        result.measurements.append(Measurement("64 tokens", subject, "perplexity", perplexity))
    return result.document()


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


def ratios(a: Any, b: Any) -> dict[str, float | None]:
    """By case, subject and metric."""
    found = show.diff(read_result(a, "a.json"), read_result(b, "b.json"))
    return {
        f"{m.case}, {m.subject}": None if m.ratio is None else m.ratio.estimate for m in found.measurements
    }


def notes(a: Any, b: Any) -> list[str]:
    return show.diff(read_result(a, "a.json"), read_result(b, "b.json")).notes


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_file_is_as_good_as_itself(path: Path, tmp_path: Path) -> None:
    result = load(path)
    assert result.measurements
    found = show.diff(result, load(path))
    assert {m.ratio.estimate for m in found.measurements if m.ratio} == {1.0}
    assert {m.facts["intervals overlap"] for m in found.measurements} <= {True, None}
    assert found.notes == []
    # And as itself in the form of now.
    write_result(tmp_path / "now.json", result)
    assert load(tmp_path / "now.json") == result


def test_equal_files_do_not_fail(run: Callable[..., Outcome]) -> None:
    done = run(old(), old(), "--fail-below", "1")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("make", [old, new])
def test_a_planted_change_is_found_across_forms(
    make: Callable[[], Any], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    written = tmp_path / "diff.json"
    assert run(make(), new(0.9)).exit_code == 0  # nobody asked it to fail
    done = run(make(), new(0.9), "--fail-below", "0.95", "--json", str(written))
    assert done.exit_code == 1
    assert f"{PRUNED}: 0.900" in done.output
    found = load(written)
    assert found.kind == "diff"
    by_name = {f"{m.case}, {m.subject}": m for m in found.measurements}
    assert by_name[PRUNED].ratio == Ratio(pytest.approx(0.9))
    assert by_name[PRUNED].facts == {"old": 1250.0, "intervals overlap": False}
    assert by_name["prompt 1 × 2048, depth 0, tokens/s"].ratio == Ratio(1.0)
    assert run(make(), new(0.9), "--fail-below", "0.85").exit_code == 0
    assert run(new(0.9), make(), "--fail-below", "1").exit_code == 0


def test_overlap_is_that_of_the_intervals() -> None:
    for factor, overlap in ((0.9, False), (0.99, True)):
        found = show.diff(read_result(old(), "a"), read_result(new(factor), "b"))
        assert found.measurements[1].facts["intervals overlap"] is overlap


def test_a_rate_that_collapses_to_nothing_or_fails_is_below(run: Callable[..., Outcome]) -> None:
    done = run(old(), new(0.0), "--fail-below", "0.5")
    assert done.exit_code == 1
    assert f"{PRUNED}: 0.000" in done.output
    back = run(new(0.0), old(), "--fail-below", "0.5")  # nothing has a ratio to nothing
    assert back.exit_code == 0, back.output
    failed = new()
    failed["rows"][1] |= {"value": None, "failed": "out of memory"}
    done = run(old(), failed, "--fail-below", "0.5")
    assert done.exit_code == 1
    assert f"{PRUNED}: failed" in done.output


def test_other_layer_maps_and_models_are_told() -> None:
    def of(fingerprint: str, *removed: str) -> dict[str, Any]:
        return old() | {"model": {"name": "tiny", "fingerprint": fingerprint, "removed": list(removed)}}

    found = notes(of("sha256:1", "17", "5"), of("sha256:2", "17", "18", "5"))
    assert [line.split(":")[0] for line in found] == ["model fingerprint", "model removed"]
    # Measured to other depths it is the same map.
    assert notes(of("sha256:1", "17", "5"), of("sha256:1", "17", "5", "18")) == []


def test_of_times_and_perplexities_less_is_better() -> None:
    b = formats()
    b["rows"][1]["value"] *= 1.25
    assert ratios(formats(), b)["64 tokens, int8, perplexity"] == pytest.approx(0.8)
    kernels = Result("kernels", {}, {}, [Measurement("add 4", "torch", "µs", 10.0)])
    faster = Result("kernels", {}, {}, [Measurement("add 4", "torch", "µs", 8.0)])
    assert ratios(kernels.document(), faster.document()) == {"add 4, torch, µs": pytest.approx(1.25)}


def test_what_differs_around_it_is_told() -> None:
    b = old()
    b["environment"] |= {"threads": 4, "date": "2027-01-01", "load_average": 7.5}
    b["settings"]["weights"] = "int8"
    assert notes(old(), b) == ["threads: 2, now 4", "weights: auto, now int8"]


def test_rows_of_one_alone_are_listed_and_do_not_fail(run: Callable[..., Outcome]) -> None:
    b = old()
    b["rows"][0] |= {"batch": 77}
    done = run(old(), b, "--fail-below", "0.99")
    assert done.exit_code == 0
    assert "figures only in the old one: 1, as prompt 1 × 2048 / depth 0 / tokens/s" in done.output
    assert "figures only in the new one: 1, as prompt 77 × 2048 / depth 0 / tokens/s" in done.output


def test_what_does_not_compare_is_an_error(run: Callable[..., Outcome]) -> None:
    for a, b in ((old(), formats()), (formats(), old())):
        done = run(a, b)
        assert isinstance(done.exception, ConfigError)
        assert "give two of one kind" in str(done.exception)
    a, b = old(), old()
    a["rows"], b["rows"] = a["rows"][:1], a["rows"][1:]
    done = run(a, b)
    assert isinstance(done.exception, ConfigError)
    assert "no figure in common" in str(done.exception)


@pytest.mark.parametrize("bound", ["0", "-1", "nan", "inf"])
def test_a_bound_that_is_no_ratio_is_an_error(bound: str, run: Callable[..., Outcome]) -> None:
    done = run(old(), old(), "--fail-below", bound)
    assert isinstance(done.exception, ConfigError)
    assert "--fail-below" in str(done.exception)


def test_names_are_not_read_as_markup(run: Callable[..., Outcome]) -> None:
    data = formats()
    data["rows"][0]["subject"] = "[red]bfloat16[/nothing]"
    assert "[red]bfloat16[/nothing]" in run(data, data).output


def without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {
        "kind": data["kind"],
        "rows": [{name: row[name] for name in row if name != key} for row in data["rows"]],
    }


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "{}", '{"rows": []}', '{"kind": "unheard-of", "rows": []}', '{"kind": "throughput"}'),
        *('{"kind": ["throughput"], "rows": []}', '{"kind": "throughput", "rows": {"a": 1}}'),
        json.dumps(old() | {"rows": 3}),
        json.dumps(old() | {"rows": [*old()["rows"], old()["rows"][0]]}),  # one is there twice
        json.dumps(without(old(), "tokens_per_second")),
        json.dumps(old()).replace("1250.0", "1" + 400 * "0"),
        json.dumps(old()).replace("1250.0", "NaN"),
        json.dumps(old()).replace("1250.0", '"fast"'),
        json.dumps(new()).replace("1250.0", "Infinity"),
        json.dumps(new()).replace("1250.0", '"fast"'),
        json.dumps(without(new(), "case")),
    ],
)  # fmt: skip
def test_what_is_no_result_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"some\.json") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"none\.json"):
        load(tmp_path / "none.json")
