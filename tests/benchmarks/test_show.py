"""Tables, reports and plots: figures stand where they belong, what comes from data is escaped, every result renders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from sleb.benchmarks import show
from sleb.benchmarks.old import load
from sleb.benchmarks.plots import check_plots, draw_front, draw_result
from sleb.benchmarks.record import Measurement, Ratio, Result
from sleb.cli.bench.report import report
from sleb.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks/results").glob("*.json"))
EVIL = "<script>alert(1)</script>|&\"'"


def speed(name: str = "tiny", depths: tuple[int, ...] = (0, 3, 6)) -> Result:
    found = [
        Measurement(
            case,
            f"depth {depth}",
            "tokens/s",
            1000.0 + 10 * depth,
            (900.0, 1100.0),
            Ratio(1 + depth / 100, 1 + depth / 200, 1 + depth / 50) if depth else None,
            {"depth": depth, "batch": 8, "ideal_speedup": 1 + depth / 90, "weight": 7},
        )
        for case in ("prompt 1 × 2048", "generate 8 × 128 after 64")
        for depth in depths
    ]
    environment = {
        "cpu": "A processor",
        "dtype": "bfloat16",
        "threads": 2,
        "sleb": "0.1",
        "command": f"sleb {name}",
    }
    return Result("throughput", environment, {"model": {"name": name}, "weights": "int8"}, found, ["A note."])


def test_a_row_a_subject_a_column_a_metric() -> None:
    heads, rows = show.table(speed().measurements)
    assert heads == ["case", "", "tokens/s", "tokens/s ×", "ideal ×", "weight"]
    assert rows[0] == ["prompt 1 × 2048", "depth 0", "1,000 (900–1,100)", "", "1", "7"]
    assert rows[2] == ["", "depth 6", "1,060 (900–1,100)", "1.06 (1.03–1.12)", "1.067", "7"]
    assert rows[3][0] == "generate 8 × 128 after 64"


def test_a_ratio_stands_beside_its_metric_and_a_failure_says_why() -> None:
    found = [
        Measurement("a", "x", "tokens/s", 2.0),
        Measurement("a", "x", "seconds", 0.5),
        Measurement("a", "y", "tokens/s", 3.0, None, Ratio(1.5)),
        Measurement("a", "y", "seconds", None, facts={"failed": "out of memory"}),
    ]
    heads, rows = show.table(found)
    assert heads == ["case", "", "tokens/s", "tokens/s ×", "seconds", "failed"]
    assert rows == [["a", "x", "2", "", "0.5", ""], ["", "y", "3", "1.50", "failed", "out of memory"]]


def test_cases_of_other_metrics_have_a_table_of_their_own() -> None:
    found = [Measurement(case, "x", metric, 1.0) for case, metric in (("a", "m"), ("b", "n"), ("c", "m"))]
    tables = show.tables(found)
    assert [[row[0] for row in rows] for _, rows in tables] == [["a", "c"], ["b"]]


def test_markdown_keeps_its_columns() -> None:
    text = show.markdown(["case", "", "a|b"], [["x\ny", EVIL, "1"]])
    lines = text.splitlines()
    assert lines[1] == "| --- | --- | ---: |"
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}


def test_the_terminal_shows_figures_notes_and_what_was_measured() -> None:
    console = Console(record=True, width=40)
    result = speed("[red]tiny[/nothing]")
    result.complete = False
    show.print_result(result, console)
    text = console.export_text()
    assert "[red]tiny[/nothing], bfloat16, int8 weights, A processor, threads: 2, sleb 0.1" in text
    assert "1.06 (1.03–1.12)" in text
    assert "A note." in text and "Interrupted" in text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of all committed results, as the command writes it."""
    folder = tmp_path_factory.mktemp("all") / "new/report"
    app = typer.Typer()
    app.command()(report)
    done = CliRunner().invoke(app, [str(folder), *map(str, COMMITTED)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert set(done.output.split()) == set(map(str, folder.iterdir()))
    return folder


def test_every_committed_result_is_in_the_report(whole: Path) -> None:
    text = (whole / "report.md").read_text("utf-8")
    assert text.count("\n## ") == len(COMMITTED)
    for path in COMMITTED:
        result = load(path)
        for each in result.measurements:
            shown = show.number(each.value)
            assert shown in text, (path.name, each)
    plots = {path.name for path in whole.glob("*.png")}
    assert set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)) == plots
    kinds = {re.sub(r"-\d", "", name.removesuffix(".png")) for name in plots}
    assert kinds == {"throughput-speed", "serve-load", "eval-quality", "prune-quality"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in whole.glob("*.png"))


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        show.write_report(tmp_path / name, [speed()])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_plots_only_of_curves(tmp_path: Path) -> None:
    assert [path.name for path in draw_result(speed(), tmp_path / "x")] == ["x-speed.png"]
    assert draw_result(speed(depths=(0,)), tmp_path / "y") == []
    assert draw_result(Result("search", {}), tmp_path / "z") == []


def test_a_plot_shows_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.errorbar
    monkeypatch.setattr(
        Axes,
        "errorbar",
        lambda self, x, y, **more: (drawn.append((x, y, more["yerr"])), original(self, x, y, **more))[1],
    )
    draw_result(speed(), tmp_path / "x")
    assert len(drawn) == 4  # in each panel the measured line, and the ideal
    assert drawn[1][:2] == ([0, 3, 6], pytest.approx([1, 1 + 3 / 90, 1 + 6 / 90]))
    x, y, (below, above) = drawn[0]
    assert (x, y) == ([0, 3, 6], [1.0, 1.03, 1.06])
    assert below == pytest.approx([0, 0.015, 0.03])
    assert above == pytest.approx([0, 0.03, 0.06])


def test_a_front_is_a_png_and_an_svg_whose_names_are_no_formulas(tmp_path: Path) -> None:
    texts = {"a $x_1$ text": [(0, 20.0, None), (1, 22.0, None)]}
    draw_front(tmp_path / "front", "t", texts, [(0, 1.0, None), (1, 1.1, None)])
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "a $x_1$ text" in (tmp_path / "front.svg").read_text("utf-8")


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"report folder .*file"):
        show.write_report(tmp_path / "file", [speed()])
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_result(speed(), tmp_path / "none" / "x")


def test_a_missing_matplotlib_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_plots("--plot") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"^--plot draws with matplotlib, .*: pip install 'sleb\[plots\]'$"):
        check_plots("--plot")
    with pytest.raises(ConfigError, match=r"sleb\[plots\]"):
        show.check_report(tmp_path / "report")
    assert str(check_plots("--plot", refuse=False)).startswith("There will be no plot: --plot draws")
