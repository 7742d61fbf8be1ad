"""What reports say in words: whose a figure is, of which lengths, and how far it is to be trusted."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sleb.benchmarks.reports import write, write_report
from sleb.benchmarks.reports.document import Bullets
from sleb.benchmarks.reports.engines import kernels_section, peers_section
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.quality import prune_section
from sleb.benchmarks.reports.serving import serve_section
from sleb.benchmarks.reports.shown import estimate, unit_noun
from sleb.benchmarks.reports.speed import mixed_section, speed_sentence, throughput_section, without_parts


def row(test: str, batch: int, prompt_tokens: int, speedup: float, **others: Any) -> dict[str, Any]:
    """A row of depth 6 in seven repetitions, with an interval of 95 %."""
    found = {
        "test": test,
        "depth": 6,
        "baseline_depth": 0,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": 1 if test == "prompt" else 128,
        "repetitions": 7,
        "tokens_per_second": 100.0,
        "speedup": speedup,
        "speedup_low": speedup - 0.01,
        "speedup_high": speedup + 0.01,
        "speedup_level": 0.95,
        "verdict": "faster",
    }
    return found | others


def throughput(*rows: dict[str, Any], **others: Any) -> Result:
    data = {
        "kind": "throughput",
        "model": {"name": "tiny"},
        "settings": {"interval": 0.01},
        "rows": list(rows),
    }
    return Result.of(data | others, "speed.json")


def notes(section: Any) -> list[str]:
    """The items of its lists."""
    return [item for block in section.blocks if isinstance(block, Bullets) for item in block.items]


def summary(folder: Path, *results: dict[str, Any]) -> list[str]:
    """The sentences at the top of a report."""
    write_report(folder, results, Console(file=StringIO()))
    top = (folder / "report.md").read_text("utf-8").split("\n\n")[1]
    return [line.removeprefix("- ") for line in top.splitlines()]


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "draw_figures", lambda *arguments: [])
    monkeypatch.setattr(write, "draw_tradeoffs", lambda *arguments: None)


def test_lengths_are_named_where_they_differ() -> None:
    same = [row("prompt", 1, 2048, 1.25), row("generate", 8, 64, 1.2), row("generate", 1, 64, 1.1)]
    assert speed_sentence(same) == (
        "1.25 (1.24–1.26) times as fast for a prompt of 2,048 tokens, 1.20 (1.19–1.21) for 8 streams, "
        "1.10 (1.09–1.11) for 1 stream"
    )
    assert speed_sentence([row("generate", 8, 64, 1.2), row("generate", 8, 4096, 1.18)]) == (
        "1.20 (1.19–1.21) times as fast for 8 streams of 128 tokens after 64, "
        "1.18 (1.17–1.19) for 8 streams of 128 tokens after 4,096"
    )
    # Decoding counts the new tokens from the second on.
    assert speed_sentence([row("generate", 8, 64, 1.2), row("decode", 8, 512, 1.3)]) == (
        "1.20 (1.19–1.21) times as fast for 8 streams of 128 tokens after 64, "
        "1.30 (1.29–1.31) for 8 streams of 127 tokens after 512 without their prompts"
    )


def test_decoding_is_left_out_only_beside_the_same_generation() -> None:
    generate, decode = row("generate", 8, 64, 1.2), row("decode", 8, 64, 1.3)
    elsewhere = [row("decode", 8, 512, 1.3), row("decode", 1, 64, 1.3), decode | {"output_tokens": 16}]
    assert without_parts([generate, decode, *elsewhere]) == [generate, *elsewhere]
    assert without_parts([decode]) == [decode]


def test_a_range_of_few_runs_is_told_from_an_interval() -> None:
    few = {"speedup_level": None, "repetitions": 3, "verdict": "no difference"}
    assert speed_sentence([row("generate", 8, 64, 1.2, **few)]) == (
        "1.20 (1.19–1.21 of 3 runs) times as fast for 8 streams"
    )
    assert estimate(1.2, 1.2, 1.2, num_runs=1) == "1.20 (1 run)"
    assert estimate(1.2, 1.2, 1.2) == "1.20"
    assert estimate(None, None, None, num_runs=3) == ""
    mixed = {
        "kind": "mixed",
        "ratio": 1.0,
        "ratio_low": 0.97,
        "ratio_high": 1.06,
        "repetitions": [{}] * 5,
        "tokens_per_second": {"mixed": 9.0, "expected": 9.0, "alone": {"0": 8.0, "6": 10.0}},
    }
    assert "reaches 1.00 (0.97–1.06 of 5 runs) of" in mixed_section(Result.of(mixed, "it")).summary[0]


def test_doubts_of_the_terminal_are_in_the_report() -> None:
    said = notes(
        throughput_section(
            throughput(
                row("prompt", 1, 2048, 1.25, speedup_low=1.2, speedup_high=1.3, stopped="time"),
                row("prompt", 1, 2048, 1.25, speedup_low=1.24, speedup_high=1.28, stopped="time"),
                row("generate", 1, 64, 1.2, stopped="interval", speedup_low=1.1, speedup_high=1.3),
                row("generate", 8, 64, 1.2, speedup_level=None, repetitions=2, stopped="interrupt"),
                row("generate", 8, 64, 1.2, roofline_share=1.234, relative_spread=0.11, stopped="interval"),
                settings={"interval": 0.01, "not_mixed": ["generate 1 × 128 after 64"]},
            )
        )
    )
    for line in (
        # Half of 0.1 over 1.25; what stopped because it was narrow enough is not told, nor what has no interval.
        "Intervals wider than ±1.0% (prompt 1 × 2048, the time for it was over: ±4.0%): give --max-repetitions or "
        "--time-budget more.",
        "An interval of 95 % takes 6 repetitions. With fewer, the column has the least and the greatest ratio, and "
        "there is no verdict.",
        "Not mixed, since the batch has fewer requests than there are depths: generate 1 × 128 after 64.",
    ):
        assert line in said
    assert sum("above 100 %" in line for line in said) == 1
    assert sum("Noisy" in line and "±11%" in line for line in said) == 1


def test_a_run_without_doubts_tells_none() -> None:
    said = notes(throughput_section(throughput(row("prompt", 1, 2048, 1.25, stopped="interval"))))
    assert [line.partition(":")[0] for line in said] == ["tokens/s", "speedup", "ideal"]


@pytest.mark.parametrize("device", ["cpu", "cuda:0", None])
def test_kernels_on_a_cpu_may_pass_the_limit(device: str | None) -> None:
    data = {"kind": "kernels", "environment": {"device": device}, "rows": []}
    said = " ".join(notes(kernels_section(Result.of(data, "it"))))
    assert ("caches" in said) is (device == "cpu")
    assert "interpreted" not in said


@pytest.mark.parametrize(
    ("levels", "value", "ends"),
    [
        ([None, None], "the median", "the least and the greatest"),
        ([0.95, 0.95], "Hodges–Lehmann", "95 % interval"),
        (
            [0.95, None],
            "Hodges–Lehmann estimate of the ratios, of fewer than six the median",
            "of fewer than six",
        ),
    ],
)
def test_ratios_of_engines_are_called_what_they_are(
    levels: list[float | None], value: str, ends: str
) -> None:
    rows = [
        {
            "test": f"decode-{number}", "weight_format": "bf16", "peer": "vllm", "rate": 2.0, "peer_rate": 1.0,
            "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1, "ratio_level": level,
        }
        for number, level in enumerate(levels)
    ]  # fmt: skip
    said = notes(peers_section(Result.of({"kind": "peers", "rows": rows}, "it")))
    [line] = [line for line in said if line.startswith("ratio:")]
    assert value in line and ends in line
    assert ("Hodges" in line) is (0.95 in levels)


@pytest.mark.parametrize(
    ("removed", "noun"),
    [
        ([17, "5"], "block"),
        (["1.attention", "5.attention"], "attention sublayer"),
        (["1.mlp"], "MLP"),
        (["1.mlp", "1.attention"], "sublayer"),
        ([3, "1.mlp"], "unit"),
    ],
)
def test_what_is_removed_is_called_what_it_is(removed: list[Any], noun: str) -> None:
    assert unit_noun(removed) == noun
    data = {
        "kind": "prune",
        "losses": [8.0] * (1 + len(removed)),
        "removed": removed,
        "calibration": {"windows": 2, "seqlen": 4},
    }
    count = f"{len(removed)} {noun}{'s' if len(removed) > 1 else ''}"
    [sentence] = prune_section(Result.of(data, "it")).summary
    assert sentence == (
        f"By the search itself, removing {count} raises the perplexity of its calibration text from 2.72 to 2.72."
    )


def serving(model: str, rate: float, **others: Any) -> dict[str, Any]:
    level = {
        "level": "8 at once",
        "label": None,
        "completed": 4,
        "failed": 0,
        "request_throughput": 2.5,
        "output_throughput": rate,
        "median_ttft_ms": 158.3,
        "median_tpot_ms": 11.94,
    }
    return {"kind": "serve", "model": {"name": model}, "rows": [level | others]}


def test_medians_are_the_latencies_alone() -> None:
    def said(**others: Any) -> list[str]:
        return list(serve_section(Result.of(serving("tiny", 625.0, **others), "it")).summary)

    assert said() == [
        "Serving 8 at once gives 625 tokens/s; in the median the first token after 158 ms, then 11.9 ms a token."
    ]
    assert said(median_ttft_ms=None, median_tpot_ms=None) == ["Serving 8 at once gives 625 tokens/s."]


@pytest.mark.usefixtures("no_plots")
def test_sentences_say_whose_they_are_where_a_kind_is_there_twice(tmp_path: Path) -> None:
    first, second = serving("tiny", 625.0), serving("tiny,tiny:sleb-6", 599.0)
    assert summary(tmp_path, first)[0].startswith("Serving 8 at once gives 625")
    assert [line.split(" gives")[0] for line in summary(tmp_path, first, second, first)] == [
        "tiny: Serving 8 at once",
        "tiny,tiny:sleb-6: Serving 8 at once",
        "tiny (2): Serving 8 at once",
    ]


@pytest.mark.usefixtures("no_plots")
def test_depths_say_whose_they_are_where_there_are_several(tmp_path: Path) -> None:
    def quality(model: str) -> dict[str, Any]:
        rows = [{"depth": 0, "perplexity": 20.0}, {"depth": 6, "perplexity": 40.0}]
        return {"kind": "quality", "model": {"name": model}, "settings": {"dataset": "it"}, "rows": rows}

    speed = throughput(row("generate", 8, 64, 1.2)).data
    fast = "1.20 (1.19–1.21) times as fast for 8 streams"
    rises = "perplexity of it rises from 20 to 40"
    assert summary(tmp_path, dict(speed), quality("tiny")) == [f"Depth 6: {fast}; {rises}."]
    assert summary(tmp_path, dict(speed), quality("other")) == [
        f"tiny, depth 6: {fast}.",
        f"other, depth 6: {rises}.",
    ]
    assert summary(tmp_path, quality("tiny"), quality("other")) == [
        f"tiny, depth 6: {rises}.",
        f"other, depth 6: {rises}.",
    ]
    assert summary(tmp_path, dict(speed), dict(speed)) == [
        f"tiny, depth 6: {fast}.",
        f"tiny (2), depth 6: {fast}.",
    ]
