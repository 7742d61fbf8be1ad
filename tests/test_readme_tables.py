"""The README's tables of measurements are those of the result files, and `scripts/readme-tables` notices if not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sleb.benchmarks.reports.readme import RESULTS, TABLES, NotMeasuredError, fill, newest, outdated
from sleb.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def is_measured(name: str) -> bool:
    """Whether a table has its result files."""
    try:
        TABLES[name](ROOT / RESULTS)
    except NotMeasuredError:
        return False
    return True


MEASURED = [name for name in TABLES if is_measured(name)]
EMPTY = "".join(f"<!-- table: {name} -->\n<!-- end of table -->\n" for name in MEASURED)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/readme-tables"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the result files."""
    return Path(shutil.copytree(ROOT / RESULTS, tmp_path / "results"))


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    """A README whose tables are up to date."""
    path = tmp_path / "README.md"
    path.write_text(f"Before.\n\n{fill(EMPTY, ROOT / RESULTS)}\nAfter.\n", "utf-8")
    return path


def test_the_readme_is_up_to_date() -> None:
    done = run("--check")
    assert done.returncode == 0, done.stderr


def test_an_unchanged_readme_stays_as_it_is(readme: Path, results: Path) -> None:
    before = readme.read_bytes()
    assert run("--check", "--readme", str(readme), "--results", str(results)).returncode == 0
    assert run("--readme", str(readme), "--results", str(results)).returncode == 0
    assert readme.read_bytes() == before


@pytest.mark.parametrize("name", MEASURED)
def test_a_changed_figure_is_caught_and_mended(name: str, readme: Path) -> None:
    before = readme.read_text("utf-8")
    start = before.index(f"<!-- table: {name} -->")
    inside = before[start : before.index("<!-- end", start)]
    figure = list(re.finditer(r"\d+\.\d+", inside.rpartition("\nFrom")[0]))[-1]
    changed = before[: start + figure.start()] + "99.99" + before[start + figure.end() :]
    readme.write_text(changed, "utf-8")
    done = run("--check", "--readme", str(readme))
    assert done.returncode == 1
    assert done.stderr == f"README.md: table '{name}' is not what {RESULTS} says; run scripts/readme-tables\n"
    assert readme.read_text("utf-8") == changed  # a check mends nothing
    assert run("--readme", str(readme)).stdout == f"README.md: {name} changed\n"
    assert readme.read_text("utf-8") == before


def test_a_changed_result_is_caught(readme: Path, results: Path) -> None:
    path = max(results.glob("*-throughput-smollm2-cpu.json"))
    data = json.loads(path.read_text("utf-8"))
    next(row for row in data["rows"] if row["depth"] == 6)["speedup"] = 1.5
    path.write_text(json.dumps(data), "utf-8")
    done = run("--check", "--readme", str(readme), "--results", str(results))
    assert done.returncode == 1
    assert re.findall(r"table '([\w-]+)'", done.stderr) == ["throughput"]


def test_the_newest_file_is_taken(readme: Path, results: Path) -> None:
    path = next(results.glob("*-quality-cpu-smollm2.json"))
    data = json.loads(path.read_text("utf-8"))
    data["rows"][2]["perplexity"] = 31.25
    for name in (
        "2031-01-02-quality-cpu-smollm2.json", "2020-01-02-quality-cpu-smollm2.json",
        "2032-01-02-other-quality-cpu-smollm2.json", "2033-01-02-quality-cpu-smollm2-7b.json",
    ):  # fmt: skip
        (results / name).write_text(json.dumps(data), "utf-8")
    assert newest(results, "quality-cpu-smollm2").name == str(results / "2031-01-02-quality-cpu-smollm2.json")
    assert outdated(readme.read_text("utf-8"), results) == ["weight-formats"]
    after = fill(readme.read_text("utf-8"), results)
    assert "31.250" in after
    assert (
        f"From [2031-01-02-quality-cpu-smollm2.json]({RESULTS}/2031-01-02-quality-cpu-smollm2.json)." in after
    )


def test_what_is_no_table_stays(readme: Path) -> None:
    text = readme.read_text("utf-8")
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")


def test_a_table_that_is_missing_is_caught(readme: Path) -> None:
    text = readme.read_text("utf-8").replace("table: peers", "table: depths")
    assert outdated(fill(text, ROOT / RESULTS), ROOT / RESULTS) == ["peers"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<!-- table: peers -->\n| a |\n", "no partner"),
        ("| a |\n<!-- end of table -->\n", "no partner"),
        ("<!-- table: peers -->\n<!-- table: depths -->\n<!-- end of table -->\n", "no partner"),
        ("<!-- table: weather -->\n<!-- end of table -->\n", "'weather', which is not known"),
    ],
)
def test_a_bad_marker_is_an_error(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(text, "utf-8")
    for arguments in ((), ("--check",)):
        done = run(*arguments, "--readme", str(path))
        assert done.returncode == 2
        assert complaint in done.stderr
        assert done.stderr.count("\n") == 1
    assert path.read_text("utf-8") == text


def test_a_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no DATE-peers-smollm2-depths\.json"):
        fill(EMPTY, tmp_path)


def test_depths_by_hand(tmp_path: Path) -> None:
    """The search's losses are sums over 2 windows of 4 tokens, so perplexity is exp of an eighth of each."""
    found = {"losses": [8.0, 16.0, 24.0, 32.0, 40.0, 48.0], "removed": [3, 1, 2, 4, 5]}
    found["calibration"] = {"windows": 2, "seqlen": 4}
    (tmp_path / "2026-01-02-prune-smollm2.json").write_text(json.dumps(found), "utf-8")
    lines = TABLES["depths"](tmp_path).splitlines()
    assert lines[0] == "| depth | 0 | 1 | 2 | 3 | 4 |"
    assert lines[2] == "| perplexity | 2.7 | 7.4 | 20.1 | 54.6 | 148 |"


def test_throughput_by_hand(tmp_path: Path) -> None:
    def row(depth: int, rate: float, speedup: float, **others: Any) -> dict[str, Any]:
        shape = {
            "test": "generate",
            "batch": 8,
            "prompt_tokens": 64,
            "output_tokens": 128,
            "baseline_depth": 0,
        }
        found = {"depth": depth, "tokens_per_second": rate, "speedup": speedup, "ideal_speedup": 1.25}
        ends = {"speedup_low": speedup - 0.02, "speedup_high": speedup + 0.02, "speedup_level": 0.95}
        return shape | found | ends | others

    rows = [row(0, 1000.0, 1.0), row(6, 1240.0, 1.24), row(0, 990.0, 0.99, variant="control")]
    (tmp_path / "2026-01-02-throughput-smollm2-cpu.json").write_text(
        json.dumps({"kind": "throughput", "rows": rows})
    )
    lines = TABLES["throughput"](tmp_path).splitlines()
    assert lines[0] == "| test | depth 0, tokens/s | depth 6, tokens/s | speedup (95 % interval) | ideal |"
    assert lines[2:4] == [
        "| 8 prompts of 64 tokens, 128 new tokens each | 1,000 | 1,240 | 1.24 (1.22–1.26) | 1.25 |", "",
    ]  # fmt: skip


def test_a_table_without_a_result_need_not_be_there(tmp_path: Path) -> None:
    assert outdated("", tmp_path) == []
    marked = "<!-- table: compare -->\n<!-- end of table -->\n"
    with pytest.raises(NotMeasuredError, match="serve-compare-smollm2"):
        outdated(marked, tmp_path)
    write(tmp_path, "serve-compare-smollm2", compared())
    assert outdated("", tmp_path) == ["compare"]
    assert outdated(marked, tmp_path) == ["compare"]
    assert outdated(fill(marked, tmp_path), tmp_path) == []


def write(results: Path, name: str, data: Any) -> None:
    """A result file of that name."""
    (results / f"2026-01-02-{name}.json").write_text(json.dumps(data), "utf-8")


def table(name: str, results: Path) -> list[list[str]]:
    """The cells of a table, without the rule below its headings."""
    lines = TABLES[name](results).split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_peers_by_hand(tmp_path: Path) -> None:
    """A row an engine at depth 0, one at each other depth, and of quantised formats those of the same bits."""

    def row(test: str, ours: str, peer: str, ratio: float, **others: Any) -> dict[str, Any]:
        found = {
            "test": test,
            "weight_format": ours,
            "peer": peer,
            "depth": 0,
            "http": False,
            "repetitions": 6,
        }
        ends = {"ratio": ratio, "ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1, "ratio_level": 0.95}
        return found | ends | others

    rows = [
        row("decode-1", "int4", "llamacpp-q4_1", 2.4),
        row("decode-1", "int4:6", "llamacpp-q4_1", 9.0, depth=6),
        row("decode-1", "bf16:6", "vllm", 2.7, depth=6),
        row("decode-1", "bf16", "vllm", 2.3),
        row("decode-1", "bf16-http", "vllm", 9.0, http=True),
        row("decode-1", "bf16", "llamacpp-bf16", 0.9),
        row("decode-8", "int8", "llamacpp-q8_0", 3.2),
        row("decode-8", "int8", "llamacpp-bf16", 9.0),
        row("decode-8", "int4", "llamacpp-q8_0", 9.0),
        row("decode-8", "bf16", "vllm", 1.9, ratio_level=None, repetitions=3),
        row("prompt-512", "bf16:6", "vllm", 1.5, depth=6),
    ]
    versions = {
        "vllm": "0.32.0", "llamacpp-bf16": "b11434", "llamacpp-q8_0": "b11434", "llamacpp-q4_1": "b11434",
    }  # fmt: skip
    engines = {name: {"version": version} for name, version in versions.items()}
    write(tmp_path, "peers-smollm2-depths", {"kind": "peers", "engines": engines, "rows": rows})
    heading, *found = table("peers", tmp_path)
    assert heading[1:] == ["1 stream", "8 streams", "prompt of 512 tokens"]
    assert found == [
        ["vLLM 0.32 (CPU)", "2.30 (2.20–2.40)", "1.90 (1.80–2.00), low–high of 3 runs", ""],
        ["llama.cpp b11434", "0.90 (0.80–1.00)", "", ""],
        ["vLLM 0.32 (CPU), ours at depth 6", "2.70 (2.60–2.80)", "", "1.50 (1.40–1.60)"],
        ["llama.cpp b11434 Q8_0, ours int8", "", "3.20 (3.10–3.30)", ""],
        ["llama.cpp b11434 Q4_1, ours int4", "2.40 (2.30–2.50)", "", ""],
    ]


def test_serving_by_hand(tmp_path: Path) -> None:
    row = {
        "level": "8 at once", "request_throughput": 4.883, "output_throughput": 625.06, "median_ttft_ms": 158.3,
        "p99_ttft_ms": 176.1, "median_tpot_ms": 11.94, "p99_tpot_ms": None,
    }  # fmt: skip
    write(tmp_path, "serve-smollm2", {"kind": "serve", "rows": [row]})
    assert table("serving", tmp_path) == [
        [
            "load", "requests/s", "new tokens/s", "TTFT median, ms", "TTFT p99, ms", "TPOT median, ms",
            "TPOT p99, ms",
        ],
        ["8 at once", "4.88", "625", "158", "176", "11.9", ""],
    ]  # fmt: skip


def compared() -> dict[str, Any]:
    """Two servers: one figure with an interval at one level, two of three rounds at another."""

    def entry(level: str, metric: str, speedup: float, **others: Any) -> dict[str, Any]:
        ends = {"speedup": speedup, "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1}
        rounds = {"speedup_samples": [speedup] * 6, "speedup_level": 0.95, "verdict": "faster"}
        return {"level": level, "metric": metric, "a": 100.0, "b": 150.0} | ends | rounds | others

    few = {"speedup_samples": [1.0] * 3, "speedup_level": None, "verdict": "no difference"}
    return {
        "kind": "serve",
        "model": {"name": "tiny", "models": ["tiny", "tiny:sleb-6"]},
        "servers": {
            "A": {"url": "http://a/v1", "owned_by": "vllm", "version": "0.32.0"},
            "B": {"url": "http://b/v1", "owned_by": "sleb", "version": None},
        },
        "rows": [],
        "comparisons": [
            entry("1 at once", "output_throughput", 1.5),
            entry("1 at once", "median_ttft_ms", 1.0, verdict="no difference"),
            entry("8 at once", "output_throughput", 1.0, **few),
        ],
    }


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    write(tmp_path, "serve-compare-smollm2", compared())
    assert table("compare", tmp_path) == [
        [
            "load", "measured", "A: vllm 0.32.0, tiny", "B: sleb, tiny:sleb-6", "B over A (95 % interval)", "B is",
        ],
        ["1 at once", "tokens/s", "100", "150", "1.50 (1.40–1.60)", "faster"],
        ["", "median TTFT, ms", "100", "150", "1.00 (0.90–1.10)", "no different"],
        ["8 at once", "tokens/s", "100", "150", "1.00 (0.90–1.10), low–high of 3 runs", ""],
    ]  # fmt: skip
