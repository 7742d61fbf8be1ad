"""What plots show: data put in the right place, labels that are said, files that stay small."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sleb.benchmarks import plots
from sleb.benchmarks.plots import plot_groups, plot_lines
from sleb.benchmarks.reports import drawings
from sleb.benchmarks.reports.figures import draw_figures, draw_tradeoffs, slug
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.shown import spaced
from sleb.errors import ConfigError


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every figure, kept as they were when they were written."""
    kept: list[Any] = []

    @contextmanager
    def kept_figure(*arguments: Any, **options: Any) -> Iterator[Any]:
        with original(*arguments, **options) as axes:
            yield axes
            kept.append(axes)

    original = plots.figure
    monkeypatch.setattr(plots, "figure", kept_figure)
    monkeypatch.setattr(drawings, "figure", kept_figure)
    return kept


def speed(depths: Sequence[int], batches: Sequence[int] = (1, 8)) -> Result:
    rows = [
        {
            "test": "generate",
            "depth": depth,
            "variant": f"depth {depth}",
            "baseline_depth": 0,
            "batch": batch,
            "prompt_tokens": 64,
            "output_tokens": 128,
            "tokens_per_second": 100.0 * batch + depth,
            "speedup": 1 + depth * batch / 100,
            "roofline_share": 0.5 + depth / 100,
        }
        for batch in batches
        for depth in depths
    ]
    control = rows[0] | {
        "variant": "control",
        "speedup": 7.0,
        "tokens_per_second": 9999.0,
        "roofline_share": 0.1,
    }
    data = {"kind": "throughput", "model": {"name": "tiny"}, "rows": [*rows, control]}
    return Result.of(data, "speed")


def quality(perplexities: dict[int, float]) -> Result:
    rows = [{"depth": depth, "perplexity": value} for depth, value in perplexities.items()]
    return Result.of({"kind": "quality", "model": {"name": "tiny"}, "rows": rows}, "quality")


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """By the name in the legend: a line's points."""
    handles, labels = axes.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle[0] if hasattr(handle, "lines") else handle  # of error bars the first
        found[label] = list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))
    return found


def test_the_tradeoff_joins_depths_that_both_have(drawn: list[Any], tmp_path: Path) -> None:
    found = draw_tradeoffs(
        speed([0, 2, 4, 6]), quality({0: 20.0, 4: 30.0, 6: 45.0, 9: 99.0}), tmp_path / "tradeoff"
    )
    assert found is not None and found.stem == "tradeoff"
    [axes] = drawn
    shown = lines(axes)
    assert list(shown) == ["generate 1 × 128 after 64", "generate 8 × 128 after 64"]
    assert shown["generate 8 × 128 after 64"] == [(1.0, 20.0), (1.32, 30.0), (1.48, 45.0)]
    # A label a depth, not a point: at the fastest test.
    assert [(text.get_text(), text.xy) for text in axes.texts] == [
        ("0", (1.0, 20.0)), ("4", (1.32, 30.0)), ("6", (1.48, 45.0)),
    ]  # fmt: skip


def test_no_tradeoff_without_common_depths(tmp_path: Path) -> None:
    assert draw_tradeoffs(speed([0, 2]), quality({0: 20.0, 4: 30.0}), tmp_path / "tradeoff") is None
    assert list(tmp_path.iterdir()) == []


def test_throughput_by_batch_draws_few_depths_and_no_control(drawn: list[Any], tmp_path: Path) -> None:
    found = draw_figures(speed(range(11)), tmp_path, "it")
    by_stem = {figure.stem: figure.caption for figure in found}
    assert list(by_stem) == ["it-speedup", "it-batch-generate", "it-roofline"]
    assert "6 of 11 depths are drawn" in by_stem["it-batch-generate"]
    axes = drawn[0]
    assert lines(axes)["depth 10"] == [(1.0, 110.0), (8.0, 810.0)]
    assert list(lines(axes)) == [f"depth {depth}" for depth in (0, 2, 4, 6, 8, 10)]
    assert axes.get_ylim()[0] == 0
    bars = drawn[1]
    widths = [patch.get_width() for patch in bars.patches]
    assert widths == pytest.approx([0.5, 0.53, 0.57, 0.6] * 2)
    assert [tick.get_text() for tick in bars.get_yticklabels()] == [
        "depth 0",
        "depth 3",
        "depth 7",
        "depth 10",
    ] * 2


def test_one_batch_gives_no_plot_by_batch(tmp_path: Path) -> None:
    assert [figure.stem for figure in draw_figures(speed([0, 6], [8]), tmp_path, "it")] == [
        "it-speedup",
        "it-roofline",
    ]


def sweep(test: str, shapes: Sequence[tuple[int, int, int]]) -> Result:
    """Depths 0 and 6 of one test, for each batch, prompt tokens and output tokens."""
    rows = [
        {
            "test": test,
            "depth": depth,
            "baseline_depth": 0,
            "batch": batch,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "tokens_per_second": 1000.0 * batch + prompt_tokens + depth,
            "speedup": 1.0,
        }
        for batch, prompt_tokens, output_tokens in shapes
        for depth in (0, 6)
    ]
    return Result.of({"kind": "throughput", "model": {"name": "tiny"}, "rows": rows}, "sweep")


def test_each_length_has_a_plot_by_batch_of_its_own(drawn: list[Any], tmp_path: Path) -> None:
    shapes = [(batch, tokens, 128) for tokens in (128, 512) for batch in (8, 1)]
    _, *found = draw_figures(sweep("generate", shapes), tmp_path, "it")
    assert [figure.stem for figure in found] == ["it-batch-generate-128-128", "it-batch-generate-512-128"]
    assert ["128 tokens after 512" in figure.caption for figure in found] == [False, True]
    assert [lines(axes)["depth 6"] for axes in drawn] == [
        [(1.0, 1134.0), (8.0, 8134.0)],
        [(1.0, 1518.0), (8.0, 8518.0)],
    ]


def test_a_sweep_over_contexts_is_drawn_against_them(drawn: list[Any], tmp_path: Path) -> None:
    shapes = [(batch, tokens, 128) for tokens in (4096, 1, 512) for batch in (1, 8)]
    _, *found = draw_figures(sweep("decode", shapes), tmp_path, "it")
    assert [figure.stem for figure in found] == ["it-context-decode-1-128", "it-context-decode-8-128"]
    assert "8 requests of 127 tokens" in found[1].caption and "context" in found[1].caption
    assert lines(drawn[0])["depth 0"] == [(1.0, 1001.0), (512.0, 1512.0), (4096.0, 5096.0)]
    assert [axes.get_xlabel() for axes in drawn] == ["tokens of context"] * 2
    drawn.clear()
    assert len(draw_figures(sweep("decode", shapes[::2]), tmp_path, "one")) == 2  # one batch will do
    assert lines(drawn[0])["depth 6"] == [(1.0, 1007.0), (512.0, 1518.0), (4096.0, 5102.0)]


@pytest.mark.parametrize(("level", "ends"), [(0.95, "95 % interval"), (None, "the least and the greatest")])
def test_whiskers_of_engines_are_called_what_they_are(level: float | None, ends: str, tmp_path: Path) -> None:
    row = {
        "test": "decode-1",
        "weight_format": "bf16",
        "peer": "vllm",
        "ratio": 2.0,
        "ratio_low": 1.9,
        "ratio_high": 2.1,
        "ratio_level": level,
    }
    [figure] = draw_figures(
        Result.of({"kind": "peers", "model": "tiny", "rows": [row]}, "it"), tmp_path, "it"
    )
    assert ends in figure.caption
    assert ("median of the ratios" in figure.caption) is (level is None)


def test_an_axis_that_does_not_start_at_zero_says_so(drawn: list[Any], tmp_path: Path) -> None:
    def draw(points: list[tuple[float, float]]) -> Any:
        plot_lines(tmp_path / "it", {"one": points}, title="t", x_label="x", y_label="y")
        return drawn.pop()

    axes = draw([(0, 102.0), (10, 109.0)])
    start = axes.get_ylim()[0]
    assert 90 < start <= 102
    assert axes.get_ylabel() == f"y; starts at {start:g}"
    assert axes.get_xlabel() == "x"  # from below zero
    assert draw([(0, -1.0), (10, 9.0)]).get_ylabel() == "y"


def test_panels_share_their_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = drawings.label_panels
    monkeypatch.setattr(
        drawings, "label_panels", lambda found, *labels: (kept.extend(found), original(found, *labels))
    )
    draw_figures(speed(range(4), [1, 2, 4]), tmp_path, "it")
    assert [axes.get_title() for axes in kept] == [f"generate {batch} × 128 after 64" for batch in (1, 2, 4)]
    assert len({axes.get_ylim() for axes in kept}) == 1
    assert {axes.get_ylabel() for axes in kept} == {f"speedup; starts at {kept[0].get_ylim()[0]:g}", ""}
    assert lines(kept[0])["measured, with its interval"] == [(depth, 1 + depth / 100) for depth in range(4)]


def test_distributions_are_whole_and_their_files_small(drawn: list[Any], tmp_path: Path) -> None:
    rng = random.Random(0)
    samples = [rng.lognormvariate(3, 0.5) for _ in range(50_000)]
    drawings.draw_distributions(tmp_path / "it", {"many": samples, "few": [5.0, 1.0, 3.0]}, "t", "ms")
    shown = lines(drawn[0])
    assert shown["few (3)"] == [
        (1.0, 0.0),
        (1.0, pytest.approx(1 / 3)),
        (3.0, pytest.approx(2 / 3)),
        (5.0, 1.0),
    ]
    many = shown["many (50,000)"]
    assert many[0] == (min(samples), 0) and many[-1] == (max(samples), 1)
    assert len(many) < 1000
    ordered = sorted(samples)
    for value, share in many[1:]:
        assert ordered.index(value) + 1 == round(share * len(samples))
    assert (tmp_path / "it.svg").stat().st_size < 200_000


def test_groups_have_whiskers_and_values(drawn: list[Any], tmp_path: Path) -> None:
    groups = {"1 stream": [("vllm", 2.58, 2.23, 3.08)], "8 streams": [("vllm", 0.9, 0.8, 1.1)]}
    plot_groups(tmp_path / "it", groups, title="t", x_label="x", form=".2f", mark=1.0, mark_label="as fast")
    [axes] = drawn
    texts = [text.get_text().strip() for text in axes.texts]
    assert texts == ["1 stream", "2.58", "8 streams", "0.90"]
    segments = [segment for bars in axes.collections for segment in bars.get_segments()]
    ends = [[float(x) for x, _ in segment] for segment in segments]
    assert ends == [pytest.approx([2.23, 3.08]), pytest.approx([0.8, 1.1])]
    assert axes.get_xlim()[0] == 0


def test_unwritable_plots_are_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        plot_lines(tmp_path / "none" / "it", {"one": [(0, 1)]}, title="t", x_label="x", y_label="y")


def test_names_are_no_formulas(drawn: list[Any], tmp_path: Path) -> None:
    name = r"a$\frac{$b"
    plot_lines(tmp_path / "it", {name: [(0, 1)], "two": [(0, 1)]}, title=name, x_label=name, y_label=name)
    assert (tmp_path / "it.svg").read_text("utf-8").count(name) == 4


def test_slugs_are_plain_names() -> None:
    assert slug("Throughput: org/Model_1, bf16 (2)") == "throughput-org-model-1-bf16-2"
    assert slug("../../etc/<x>") == "etc-x"
    assert slug("…") == "result"


def test_spaced_keeps_the_ends() -> None:
    assert spaced(range(11), 4) == [0, 3, 7, 10]
    assert spaced([1, 2], 4) == [1, 2]
