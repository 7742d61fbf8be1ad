"""Reports of results: what they say against figures computed by hand, and what their files are made of."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from html import unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from sleb.benchmarks.reports import check_report, write, write_report
from sleb.benchmarks.reports.kinds import Result, read_result
from sleb.cli.bench.report import report
from sleb.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "benchmarks/results").glob("*.json"))
KINDS = {
    "http-overhead-smollm2": "http-overhead",
    "mixed-smollm2": "mixed",
    "peers-smollm2": "peers",
    "prune-smollm2": "prune",
    "quality-cpu-smollm2": "weight-formats",
    "search-smollm2-4x512": "search",
    "search-smollm2-8x512": "search",
    "throughput-smollm2-cpu": "throughput",
}
EVIL = '<script>alert(1)</script>|*_a_* `x` & "b" $c$ [d](http://e) ~~f~~'

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "sleb": "0.1.0",
    "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
    "cpu": "A processor",
    "cpu_flags": ["avx2", "avx512f"],
    "memory_bytes": 3 * 2**30,
    "gpu": None,
    "threads": 2,
    "dtype": "bfloat16",
    "command": "sleb bench throughput tiny --depths 0,6",
}


def speed_row(
    test: str, batch: int, variant: str, rate: float, speedup: float, **others: Any
) -> dict[str, Any]:
    depth = {"mixed": None, "control": 0}.get(
        variant, int(variant.removeprefix("depth ") or 0) if variant[0] == "d" else 0
    )
    row = {
        "test": test,
        "variant": variant,
        "depth": depth,
        "baseline_depth": 0,
        "batch": batch,
        "prompt_tokens": 2048 if test == "prompt" else 64,
        "output_tokens": 1 if test == "prompt" else 128,
        "repetitions": 7,
        "tokens_per_second": rate,
        "tokens_per_second_low": 0.98 * rate,
        "tokens_per_second_high": 1.02 * rate,
        "tokens_per_second_samples": [0.98 * rate, rate, 1.02 * rate],
        "relative_spread": 0.02,
        "seconds": 2.0,
        "speedup": speedup,
        "speedup_low": speedup - 0.011,
        "speedup_high": speedup + 0.011,
        "speedup_level": 0.95,
        "ideal_speedup": 1.25,
        "ideal_gain_share": 0.96,
        "roofline_share": 0.8,
        "verdict": "baseline" if variant == "depth 0" else "faster",
        "weight_bytes": 3 * 2**20,
        "kv_bytes": 2**30,
    }
    return row | others


def make_speed() -> dict[str, Any]:
    """Two depths of a model of 30 blocks, with a control and a mixed batch."""
    return {
        "kind": "throughput",
        "environment": ENVIRONMENT,
        "model": {"name": "tiny", "num_blocks": 30, "removed": ["17", "5", "18", "16", "15", "14"]},
        "settings": {"weights": "auto"},
        "rows": [
            speed_row("prompt", 1, "depth 0", 1000.0, 1.0),
            speed_row("prompt", 1, "depth 6", 1250.0, 1.25),
            speed_row("generate", 8, "depth 0", 500.0, 1.0),
            speed_row("generate", 8, "depth 6", 600.0, 1.2),
            speed_row("generate", 8, "control", 501.0, 1.002, verdict="no difference"),
            speed_row("generate", 8, "mixed", 540.0, 0.99, verdict="no difference", depths=[0, 6]),
            speed_row("generate", 1, "depth 0", 100.0, 1.0),
            speed_row("generate", 1, "depth 6", 101.0, 1.01, verdict="no difference"),
        ],
        "conditions": {
            "notices": ["The room was warm."],
            "others_share": {"median": 0.004, "high": 0.07},
            "clock": {"unit": "MHz", "median": 3412.4, "low": 3390.0, "high": 3420.0, "drift": 0.009},
        },
        "complete": True,
    }


def make_quality() -> dict[str, Any]:
    rows = [
        {"depth": 0, "perplexity": 24.94, "perplexity_interval": [24.0, 26.0], "tokens": 4096},
        {
            "depth": 6,
            "perplexity": 51.23,
            "perplexity_interval": [50.0, 52.5],
            "ratio": 2.0541,
            "agreement": 0.613,
            "agreement_interval": [0.6, 0.62],
            "tokens": 4096,
        },
    ]
    return {
        "kind": "quality",
        "environment": ENVIRONMENT | {"command": "sleb eval tiny --text wikitext2"},
        "model": {"name": "tiny", "num_blocks": 30, "removed": ["17"]},
        "settings": {"weights": "auto", "dataset": "wikitext2", "seqlen": 2048},
        "rows": rows,
        "complete": True,
    }


def serve_row(concurrency: int, num_failed: int = 0) -> dict[str, Any]:
    answered = 4 - num_failed
    return {
        "level": f"{concurrency} at once",
        "label": None,
        "request_rate": "inf",
        "max_concurrency": concurrency,
        "completed": answered,
        "failed": num_failed,
        "request_throughput": 2.5,
        "request_goodput": None,
        "output_throughput": 100.0 * concurrency,
        "median_ttft_ms": 25.0,
        "p99_ttft_ms": 40.0,
        "median_itl_ms": 8.0,
        "p99_itl_ms": 11.0,
        "median_e2el_ms": 700.0,
        "p99_e2el_ms": 900.0,
        "ttfts": [0.02, 0.03, 0.025, 0.04][:answered] + [0.0] * num_failed,
        "itls": [[0.008, 0.009]] * answered + [[]] * num_failed,
        "latencies": [0.7] * answered + [0.0] * num_failed,
        "errors": [""] * answered + ["HTTP 503: <b>busy</b>"] * num_failed,
    }


def make_serving() -> dict[str, Any]:
    return {
        "kind": "serve",
        "environment": ENVIRONMENT | {"command": "sleb bench serve --url http://127.0.0.1:8000/v1"},
        "server": {"url": "http://127.0.0.1:8000/v1", "version": "0.1.0"},
        "model": {"name": "tiny:sleb-6"},
        "settings": {},
        "rows": [serve_row(1), serve_row(8, num_failed=1)],
        "complete": False,
    }


def kernels() -> dict[str, Any]:
    row = {"op": "add_norm", "shape": "4 × 64", "num_bytes": 1, "flops": 1, "bound": "bytes"}
    return {
        "kind": "kernels",
        "environment": ENVIRONMENT,
        "settings": {},
        "rows": [
            row
            | {
                "backend": "torch",
                "microseconds": 12.5,
                "microseconds_low": 12.0,
                "microseconds_high": 13.0,
                "gb_per_second": 250.0,
                "tflops": None,
                "roofline_share": 0.5,
                "timing": "clock",
            },
            row | {"backend": "triton", "reason": "it needs a card", "microseconds": None},
        ],
        "complete": True,
    }


def methods() -> dict[str, Any]:
    def row(method: str, seed: int | None, count: int, perplexity: float | None) -> dict[str, Any]:
        found = {
            "method": method,
            "seed": seed,
            "count": count,
            "removed": list(range(count)),
            "answers": None,
        }
        return found | {"perplexity": perplexity, "held_out_perplexity": perplexity}

    return {
        "kind": "methods",
        "environment": ENVIRONMENT,
        "model": "tiny",
        "settings": {},
        "rows": [
            row("dense", None, 0, 20.0),
            row("last", None, 2, None),
            row("random", 0, 2, 60.0),
            row("random", 1, 2, 50.0),
            row("random", 2, 2, 90.0),
            row("sleb", None, 2, 25.0),
        ],
        "complete": True,
    }


@pytest.fixture
def speed() -> dict[str, Any]:
    return make_speed()


@pytest.fixture
def quality() -> dict[str, Any]:
    return make_quality()


@pytest.fixture
def serving() -> dict[str, Any]:
    return make_serving()


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at text alone: plots take time."""
    monkeypatch.setattr(write, "draw_figures", lambda *arguments: [])
    monkeypatch.setattr(write, "draw_tradeoffs", lambda *arguments: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report of all that has plots."""
    folder = tmp_path_factory.mktemp("report")
    said = written(folder, make_speed(), make_serving(), make_quality())
    (folder.parent / "said").write_text(said)
    return folder


def written(folder: Path, *results: Mapping[str, Any]) -> str:
    """Writes a report and returns what it said."""
    said = StringIO()
    write_report(folder, results, Console(file=said, width=200))
    return said.getvalue()


def markdown_table(folder: Path, first_heading: str) -> list[list[str]]:
    """The first table whose heading begins so, as an independent reader of Markdown sees it: cells by row."""
    reader = MarkdownIt("commonmark").enable("table")
    rows: list[list[str]] = []
    for token in reader.parse((folder / "report.md").read_text("utf-8")):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level >= 4:
            rows[-1].append("".join(child.content for child in token.children or ()))
        elif token.type == "table_open":
            rows = []
        elif token.type == "table_close" and rows[0][0].startswith(first_heading):
            return rows
    raise AssertionError(f"no table begins with {first_heading}")


class Page(HTMLParser):
    """What a page is made of; fails where elements do not close in their order."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.usefixtures("no_plots")
def test_the_summary_tells_speed_and_quality_in_one_sentence(
    speed: dict[str, Any], quality: dict[str, Any], tmp_path: Path
) -> None:
    written(tmp_path, quality, speed)
    text = (tmp_path / "report.md").read_text("utf-8")
    expected = (
        "- Depth 6 of 30 blocks: 1.25 (1.24–1.26) times as fast for a prompt of 2,048 tokens, 1.20 (1.19–1.21) for "
        "8 streams, no measurable difference for 1 stream; perplexity of wikitext2 rises from 24.9 to 51.2."
    )
    assert expected in text.splitlines()
    assert re.findall(r"^- (Depth \d+)", text, re.MULTILINE) == ["Depth 6"]


@pytest.mark.usefixtures("no_plots")
def test_the_table_of_throughput(speed: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path, speed)
    heading, *rows = markdown_table(tmp_path, "test")
    assert heading[:9] == [
        "test", "depth", "tokens/s", "low–high", "time", "speedup", "95% interval", "verdict", "ideal",
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["0", "6", "0", "6", "0 again", "0 + 6", "0", "6"]
    assert rows[1] == [
        "", "6", "1,250", "1,225–1,275", "2 s", "1.250", "1.239–1.261", "faster", "1.250", "96%", "80%", "3 MiB",
        "1 GiB",
    ]  # fmt: skip
    assert rows[0][5:9] == ["1", "", "", "1"]  # the baseline's speedup is no measurement
    assert rows[2][0] == "generate 8 × 128 after 64"


@pytest.mark.usefixtures("no_plots")
def test_conditions_and_environment_are_told(
    speed: dict[str, Any], serving: dict[str, Any], tmp_path: Path
) -> None:
    written(tmp_path, speed, serving)
    text = (tmp_path / "report.md").read_text("utf-8")
    for line in (
        "- The room was warm.",
        "- Other processes took 0.4% of the processors in the median repetition, 7.0% in the worst.",
        "- The processor's clock was 3,412 MHz in the median (3,390 to 3,420 MHz).",
        "- Interrupted: only what was complete by then is shown.",
    ):
        assert line in text.splitlines()
    facts = dict(markdown_table(tmp_path, "environment")[1:])
    assert facts["processor"] == "A processor"
    assert facts["instruction sets"] == "avx2, avx512f"
    assert facts["memory"] == "3 GiB"
    assert facts["commit"] == "0123456789ab-dirty"
    assert "GPU" not in facts


@pytest.mark.usefixtures("no_plots")
def test_facts_that_differ_are_told_by_result(
    speed: dict[str, Any], quality: dict[str, Any], tmp_path: Path
) -> None:
    quality["environment"] = quality["environment"] | {"threads": 8}
    del quality["environment"]["cpu_flags"]
    written(tmp_path, speed, quality)
    assert "threads" not in dict(markdown_table(tmp_path, "environment")[1:])
    assert markdown_table(tmp_path, "result") == [
        ["result", "instruction sets", "threads"],
        ["Throughput: tiny, bfloat16", "avx2, avx512f", "2"],
        ["Quality: tiny, bfloat16", "", "8"],
    ]


@pytest.mark.usefixtures("no_plots")
def test_commands_stand_as_they_were_typed(speed: dict[str, Any], tmp_path: Path) -> None:
    speed["environment"] = ENVIRONMENT | {"command": "sleb bench throughput a*b_c|d --tests `x` <y>"}
    written(tmp_path, speed)
    assert "\n    sleb bench throughput a*b_c|d --tests `x` <y>\n" in (tmp_path / "report.md").read_text(
        "utf-8"
    )
    assert "sleb bench throughput a*b_c|d --tests `x` <y>" in Page(tmp_path / "report.html").text


@pytest.mark.usefixtures("no_plots")
def test_the_table_of_serving(serving: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path, serving)
    latencies = ("TTFT median", "TTFT p99", "ITL median", "ITL p99", "E2EL median", "E2EL p99")
    assert markdown_table(tmp_path, "level") == [
        [*("level", "answers", "tokens/s", "requests/s"), *latencies],
        ["1 at once", "4", "100", "2.5", "25", "40", "8", "11", "700", "900"],
        ["8 at once", "3 (1 failed)", "800", "2.5", "25", "40", "8", "11", "700", "900"],
    ]  # fmt: skip


@pytest.mark.usefixtures("no_plots")
def test_two_servers_are_compared(serving: dict[str, Any], tmp_path: Path) -> None:
    serving["servers"] = {"A": {"url": "http://127.0.0.1:1/v1"}, "B": {"url": "http://127.0.0.1:2/v1"}}
    del serving["server"]
    compared = {"level": "8 at once", "a": 100.0, "b": 125.0, "speedup": 1.25, "speedup_low": 1.2}
    compared |= {"speedup_high": 1.3, "speedup_level": 0.95, "verdict": "faster"}
    serving["comparisons"] = [
        compared | {"metric": "output_throughput"},
        compared | {"metric": "median_ttft_ms", "speedup_level": None, "verdict": "no difference"},
    ]
    for row, label in zip(serving["rows"], "AB", strict=True):
        row |= {"level": "8 at once", "label": label}
    written(tmp_path, serving)
    tables = (tmp_path / "report.md").read_text("utf-8").split("\n\n")
    [table] = [each for each in tables if "B over A" in each and each.startswith("|")]
    assert table.splitlines()[2:] == [
        "| 8 at once | tokens/s | 100 | 125 | 1.250 | 1.200–1.300 | faster |",
        "| | median TTFT, ms | 100 | 125 | 1.250 | 1.200–1.300 | |",
    ]
    assert (
        "- Tokens/s of server B over server A's: 1.25 (1.20–1.30) with 8 at once." in tables[1].splitlines()
    )
    assert "Server B: url http://127.0.0.1:2/v1." in tables


@pytest.mark.usefixtures("no_plots")
def test_few_repetitions_show_no_difference_and_no_verdict(speed: dict[str, Any], tmp_path: Path) -> None:
    for row in speed["rows"]:
        row |= {"speedup_level": None, "verdict": "no difference"}
    written(tmp_path, speed)
    assert "verdict" not in markdown_table(tmp_path, "test")[0]
    assert "no measurable difference" not in (tmp_path / "report.md").read_text("utf-8")


@pytest.mark.usefixtures("no_plots")
def test_kernels_that_did_not_run_say_why(tmp_path: Path) -> None:
    written(tmp_path, kernels())
    _, first, second = markdown_table(tmp_path, "operator")
    assert first == ["add_norm", "4 × 64", "torch", "12.5", "12–13", "250", "", "bytes", "50%", "clock"]
    assert second[2:] == ["triton", "", "", "", "", "", "", "not run: it needs a card"]


@pytest.mark.usefixtures("no_plots")
def test_methods_are_ranked_by_the_held_out_text(tmp_path: Path) -> None:
    written(tmp_path, methods())
    assert [row[1] for row in markdown_table(tmp_path, "blocks")[1:]] == [
        "dense", "sleb", "random 1", "random 0", "random 2", "last",
    ]  # fmt: skip
    sentence = "Of 2 blocks removed, sleb costs least: held-out perplexity 25, then random with 60."
    assert f"- {sentence}" in (tmp_path / "report.md").read_text("utf-8").splitlines()


def test_what_comes_from_data_is_escaped(
    speed: dict[str, Any], quality: dict[str, Any], tmp_path: Path
) -> None:
    speed["model"]["name"] = quality["model"]["name"] = EVIL
    speed["conditions"]["notices"] = [f"# {EVIL}"]
    speed["rows"] = speed["rows"][:2]
    quality["environment"] = quality["environment"] | {"threads": 8}
    written(tmp_path, speed, quality)
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 8
    shown = MarkdownIt("commonmark").enable("table").render((tmp_path / "report.md").read_text("utf-8"))
    assert "<script" not in shown
    assert 'href="http://e"' not in shown
    headings = [unescape(found) for found in re.findall(r"<h\d>(.*?)</h\d>", shown)]
    assert headings == [
        f"Benchmark report: {EVIL}", f"Throughput: {EVIL}, bfloat16", f"Quality: {EVIL}, bfloat16", "Environment",
        "Commands",
    ]  # fmt: skip
    assert markdown_table(tmp_path, "result")[1] == [f"Throughput: {EVIL}, bfloat16", "2"]


def test_the_page_needs_nothing_else(whole: Path) -> None:
    page = Page(whole / "report.html")
    assert not {"script", "link", "iframe", "img", "object", "image", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith(("on", "xmlns")), name
        assert "://" not in value, (name, value)
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#"), value
    source = (whole / "report.html").read_text("utf-8")
    assert "@import" not in source
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", source))
    assert "prefers-color-scheme: dark" in source
    assert 'name="viewport"' in source


def test_plots_in_the_page_share_no_names(whole: Path) -> None:
    page = Page(whole / "report.html")
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    assert page.tags.count("svg") == len(list(whole.glob("*.svg"))) == 8
    used = {value[1:] for name, value in page.attributes if name == "href"}
    used |= set(re.findall(r"url\(#([^)]*)\)", (whole / "report.html").read_text("utf-8")))
    assert used
    assert used <= set(names)


def test_every_plot_is_there_as_png_and_svg(whole: Path) -> None:
    shown = MarkdownIt("commonmark").render((whole / "report.md").read_text("utf-8"))
    stems = re.findall(r'src="([\w-]+)\.png"', shown)
    assert len(stems) == len(set(stems))
    assert {path.stem for path in whole.glob("*.png")} == set(stems)
    assert set(stems) == {
        "tradeoff-throughput-tiny-bfloat16",
        "throughput-tiny-bfloat16-speedup",
        "throughput-tiny-bfloat16-batch-generate",
        "throughput-tiny-bfloat16-roofline",
        "serving-tiny-sleb-6-bfloat16-concurrency",
        "serving-tiny-sleb-6-bfloat16-ttft",
        "serving-tiny-sleb-6-bfloat16-itl",
        "quality-tiny-bfloat16-by-depth",
    }
    for stem in stems:
        with Image.open(whole / f"{stem}.png") as image:
            assert image.width > 500
            assert len(image.convert("L").getcolors() or ()) > 10  # more than an empty sheet
        ElementTree.parse(whole / f"{stem}.svg")


def test_it_says_what_it_wrote_where(whole: Path) -> None:
    said = (whole.parent / "said").read_text("utf-8")
    assert (
        said
        == f"Report of 3 results in {whole}: report.html, report.md, results.json and 8 plots (.png, .svg).\n"
    )


def test_the_same_results_give_the_same_files(whole: Path, tmp_path: Path) -> None:
    written(tmp_path, make_speed(), make_serving(), make_quality())
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.usefixtures("no_plots")
def test_results_are_kept_whole(speed: dict[str, Any], quality: dict[str, Any], tmp_path: Path) -> None:
    before = copy.deepcopy([quality, speed])
    written(tmp_path, quality, speed)
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == before == [quality, speed]


def test_two_results_of_a_kind_have_files_of_their_own(
    speed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(write, "draw_figures", lambda result, folder, name: names.append(name) or [])
    other = copy.deepcopy(speed) | {"settings": {"weights": "int8"}}
    written(tmp_path, speed, other, copy.deepcopy(speed))
    text = (tmp_path / "report.md").read_text("utf-8")
    titles = re.findall(r"^## (Throughput.*)$", text, re.MULTILINE)
    assert titles == [
        "Throughput: tiny, bfloat16", "Throughput: tiny, int8", "Throughput: tiny, bfloat16 (2)",
    ]  # fmt: skip
    assert names == ["throughput-tiny-bfloat16", "throughput-tiny-int8", "throughput-tiny-bfloat16-2"]
    assert "- tiny, int8, depth 6 of 30 blocks: 1.25" in text


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_render(path: Path, tmp_path: Path) -> None:
    result = read_result(path)
    assert result.kind == KINDS.get(path.stem[11:], result.kind)
    written(tmp_path, result.data)
    Page(tmp_path / "report.html")
    assert (tmp_path / "report.md").stat().st_size > 500


def test_committed_results_render_together(tmp_path: Path) -> None:
    done = CliRunner().invoke(_app(), [str(tmp_path / "new" / "report"), *map(str, COMMITTED)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "new/report/report.md").read_text("utf-8")
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == len(COMMITTED) + 2


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(report)
    return app


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "is not JSON"),
        (b'{"rows": [NaN]}', "is not JSON"),
        (b"\xff\xfe", "is no text in UTF-8"),
        (b"[1, 2]", "holds no result"),
        (b"{}", "is of no known kind"),
        (b'{"kind": "weather"}', 'is of the kind "weather"'),
        (b'{"kind": ["serve"]}', "is of the kind"),
        (b'{"kind": "throughput", "rows": [{"test": "prompt", "batch": 1}]}', "it lacks 'depth'"),
        (b'{"kind": "throughput", "rows": "many"}', "is no whole throughput result"),
        (b'{"kind": "search", "summary": [], "settings": {}}', "is no whole search result"),
        (None, "cannot be read (No such file"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_and_leaves_no_report(
    content: bytes | None, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    done = CliRunner().invoke(_app(), [str(tmp_path / "report"), str(COMMITTED[0]), str(path)])
    assert isinstance(done.exception, ConfigError)
    message = str(done.exception)
    assert complaint in message
    assert "bad.json" in message and "\n" not in message
    assert not list((tmp_path / "report").glob("*"))


def test_a_folder_that_cannot_be_is_one_line(speed: dict[str, Any], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    for folder in (taken, taken / "below"):
        with pytest.raises(ConfigError, match="taken"):
            check_report(folder)
        with pytest.raises(ConfigError, match="taken"):
            write_report(folder, [speed], Console(file=StringIO()))
    check_report(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.usefixtures("no_plots")
def test_no_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no result is given"):
        write_report(tmp_path, [], Console(file=StringIO()))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_kind_that_is_told_goes_before_its_signs(path: Path) -> None:
    data = json.loads(path.read_text("utf-8"))
    kind = Result.of(data, "it").kind
    assert Result.of(data | {"kind": kind}, "it").kind == kind
    with pytest.raises(ConfigError, match="it is of the kind"):
        Result.of(data | {"kind": "diff"}, "it")


@pytest.mark.usefixtures("no_plots")
def test_what_the_benchmark_writes_today_renders(
    tiny_model_dir: Path, tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results above are written by hand: this one is not."""
    from sleb.benchmarks import ceilings
    from sleb.benchmarks.throughput import run_throughput
    from sleb.benchmarks.workloads import ThroughputOptions

    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings, "_READ_BYTES", 1 << 16, raising=False)
    monkeypatch.setattr(ceilings, "_MATRIX_SIZE", {"cpu": 16})
    options = ThroughputOptions(
        model=str(tiny_model_dir), layer_map=tiny_chain, depths=(0, 3), batches=(2,), prompt_tokens=20,
        output_tokens=4, repetitions=1, max_repetitions=1,
    )  # fmt: skip
    found = run_throughput(options, ["sleb", "bench", "throughput", "tiny"])
    written(tmp_path, json.loads(found.to_json()))
    depths = [row[1] for row in markdown_table(tmp_path, "test")[1:]]
    assert depths == ["0", "3", "0 again", "0", "3", "0 again", "0 + 3"]
    assert "\n    sleb bench throughput tiny\n" in (tmp_path / "report.md").read_text("utf-8")
    assert dict(markdown_table(tmp_path, "environment")[1:])["ceilings"].count("/s") >= 2
