"""Result files that are not what they should be, and folders that cannot be: one line, and nothing half written."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result as Outcome
from rich.console import Console
from typer.testing import CliRunner

from sleb.benchmarks.reports import check_report, write, write_report
from sleb.benchmarks.reports.kinds import Result
from sleb.cli.bench.diff import diff
from sleb.cli.bench.report import report
from sleb.errors import ConfigError


def speed(**others: Any) -> dict[str, Any]:
    row = {
        "test": "generate",
        "depth": 0,
        "baseline_depth": 0,
        "batch": 8,
        "prompt_tokens": 64,
        "output_tokens": 128,
        "repetitions": 6,
        "tokens_per_second": 100.0,
        "tokens_per_second_samples": [99.0, 100.0, 100.0, 100.0, 100.0, 101.0],
        "speedup": 1.0,
    }
    return {"kind": "throughput", "model": {"name": "tiny"}, "rows": [row], **others}


def with_row(**others: Any) -> dict[str, Any]:
    data = speed()
    data["rows"][0] |= others
    return data


FAULTS = [
    speed(environment={"ceilings": {}}),
    speed(environment={"ceilings": "fast"}),
    speed(environment={"memory_bytes": "16 GiB"}),
    with_row(tokens_per_second="100"),
]
OF_REPORTS = [speed(conditions=[1]), speed(failures=["vllm"]), with_row(depth=6, speedup="1.2")]
OF_DIFFERENCES = [
    with_row(speedup="1.2"),
    with_row(tokens_per_second_samples=["99", "100", "100", "100", "100", "101"]),
    with_row(tokens_per_second_samples=7),
    with_row(tokens_per_second=10**400),
    speed(server={"url": 1, "memory_bytes": []}),
    speed(model={"name": "tiny", "removed": 6}),
]


def run(command: Any, *arguments: str) -> Outcome:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*arguments])


def check_line(done: Outcome, name: str) -> None:
    """One line that names the file."""
    assert isinstance(done.exception, ConfigError), done.exception
    message = str(done.exception)
    assert name in message and "\n" not in message
    assert "no whole throughput result" in message


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "draw_figures", lambda *arguments: [])
    monkeypatch.setattr(write, "draw_tradeoffs", lambda *arguments: None)


@pytest.mark.parametrize("data", [*FAULTS, *OF_REPORTS], ids=lambda data: str(data)[-90:])
def test_a_report_of_a_malformed_file_is_one_line(data: dict[str, Any], tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(speed()), "utf-8")
    bad.write_text(json.dumps(data), "utf-8")
    check_line(run(report, str(tmp_path / "report"), str(good), str(bad)), "bad.json")
    assert not (tmp_path / "report").exists() or not list((tmp_path / "report").iterdir())


@pytest.mark.parametrize("data", [*FAULTS, *OF_DIFFERENCES], ids=lambda data: str(data)[-90:])
def test_a_difference_to_a_malformed_file_is_one_line(data: dict[str, Any], tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(speed()), "utf-8")
    bad.write_text(json.dumps(data), "utf-8")
    for files in ((good, bad), (bad, good)):
        check_line(run(diff, *map(str, files)), "bad.json")


@pytest.mark.parametrize("figure", ["1e999", "-1e999"])
def test_a_number_that_no_float_can_be_is_one_line(figure: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(speed()), "utf-8")
    bad.write_text(json.dumps(speed()).replace("100.0", figure), "utf-8")
    for done in (
        run(report, str(tmp_path / "report"), str(good), str(bad)),
        run(diff, str(good), str(bad)),
    ):
        assert isinstance(done.exception, ConfigError)
        assert f"bad.json is not JSON ({figure} is too large" in str(done.exception)


def test_a_folder_with_too_long_a_name_is_one_line(tmp_path: Path) -> None:
    """The system does not even say whether it is there, so `Path.is_file` raises."""
    for folder in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "below"):
        with pytest.raises(ConfigError, match=r"xxx.*cannot be made \(File name too long\)"):
            check_report(folder)


def test_plots_of_two_long_names_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names differ only behind what is left of them in the name of a file."""
    stems: list[str] = []

    def keep(result: Result, folder: Path, name: str) -> list[Any]:
        stems.append(name)
        return []

    monkeypatch.setattr(write, "draw_figures", keep)
    long = "a" * 70
    results = [speed(model={"name": f"{long}{end}"}) for end in ("1", "2", "2")]
    write_report(tmp_path, results, Console(file=StringIO()))
    assert len(stems) == len(set(stems)) == 3


def test_tradeoffs_of_two_speeds_and_two_qualities_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stems: list[str] = []
    monkeypatch.setattr(write, "draw_tradeoffs", lambda speed, quality, stem: stems.append(stem.name))
    quality = {"kind": "quality", "model": {"name": "tiny"}, "rows": [{"depth": 0, "perplexity": 20.0}]}
    write_report(tmp_path, [speed(), speed(), quality, quality], Console(file=StringIO()))
    assert len(stems) == len(set(stems)) == 4
