"""`sleb bench search` on a tiny model: the modes, the authors' loop, and what is made of their times."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sleb.benchmarks.search import Run, SearchBenchOptions, run_search_bench, summarise
from sleb.cli.bench import app
from sleb.errors import ConfigError


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


def test_reference_and_exact_find_the_same(tiny_model_dir, text_file):
    options = SearchBenchOptions(
        str(tiny_model_dir), str(text_file), remove=3, seqlen=100, windows=4, draws=2, device="cpu"
    )
    seen = []
    result = run_search_bench(options, on_progress=lambda share, text: seen.append((share, text)))
    runs = {(run["draw"], run["mode"]): run for run in result["runs"]}
    assert set(runs) == {(0, "reference")} | {
        (draw, mode) for draw in (0, 1) for mode in ("exact", "race", "gradient")
    }
    assert runs[0, "reference"]["removed"] == runs[0, "exact"]["removed"]
    assert runs[0, "reference"]["loss"] == pytest.approx(runs[0, "exact"]["loss"], rel=1e-6)
    assert all(len(run["seconds"]) == 3 and min(run["seconds"]) > 0 for run in runs.values())
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)
    assert result["summary"]["exact"]["agreement"] == {"same_round": 1, "same_set": 1, "loss_ratio": 1}
    assert result["complete"] and len(set(result["settings"]["token_hashes"])) == 2
    assert str(text_file.parent) not in json.dumps(result)


def test_ratios_are_within_a_draw_and_agreement_is_counted():
    options = SearchBenchOptions("m", "text", remove=2, seqlen=10, windows=2)
    runs = [
        Run(0, "reference", [40, 40], ["3", "4"], 10.0),
        Run(0, "exact", [10, 10], ["3", "4"], 10.0, 5, 6),
        Run(0, "race", [4, 4], ["4", "3"], 10.0, 5, 4),
        Run(1, "exact", [30, 30], ["1", "2"], 10.0, 5, 6),
        Run(1, "race", [6, 6], ["1", "5"], 12.0, 5, 4),
    ]
    found = summarise(runs, options)
    assert found["exact"]["speedup_over_reference"] == {"median": 4, "low": 4, "high": 4}
    assert found["race"]["speedup_over_reference"]["median"] == 10
    assert found["race"]["speedup_over_exact"] == {"median": 3.75, "low": 2.5, "high": 5}
    assert found["race"]["agreement"] == {"same_round": 0.25, "same_set": 0.75, "loss_ratio": 1.1}
    assert found["exact"]["tokens_per_second"] == pytest.approx((6 / 20 + 6 / 60) / 2 * 20)


def test_the_command_prints_and_writes(tiny_model_dir, text_file, tmp_path):
    path = tmp_path / "search.json"
    done = CliRunner(env={"COLUMNS": "160"}).invoke(
        app,
        ["search", str(tiny_model_dir), "--calibration", str(text_file), "--remove", "2", "--seqlen", "64",
         "--windows", "2", "--draws", "1", "--units", "sublayers", "--device", "cpu", "--json", str(path)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "gradient" in done.output and "over exact" in done.output
    assert json.loads(path.read_text())["summary"]["race"]["speedup_over_reference"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "0 draws"),
        ({"reference_draws": 9}, "9 of the reference"),
        ({"dtype": "int8"}, "'int8'"),
        ({"units": "heads"}, "'heads'"),
        ({"windows": 0}, "windows 0"),
    ],
)
def test_options_that_are_no_use(options, message, text_file):
    with pytest.raises(ConfigError, match=message):
        SearchBenchOptions("m", str(text_file), **options).check()
