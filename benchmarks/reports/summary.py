"""What pruning gives and costs, in words: throughput and quality of one model told together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.quality import perplexities, quality_sentence
from sleb.benchmarks.reports.shown import spaced
from sleb.benchmarks.reports.speed import is_baseline, is_depth, speed_sentence

_MOST_SENTENCES = 3  # depths of a result that get one


def depth_sentences(results: Sequence[Result]) -> list[str]:
    """A sentence a depth: its speedups, and the rise of perplexity where a quality result of the model is there."""
    speeds = [result for result in results if result.kind == "throughput"]
    qualities = [result for result in results if result.kind == "quality"]
    sentences: list[str] = []
    for speed in speeds:
        with speed.reading():
            sentences += _of_speed(speed, qualities, with_name=len(speeds) > 1)
    for quality in qualities:
        with quality.reading():
            if all(speed.model != quality.model for speed in speeds):
                sentences += _of_quality(quality)
    return sentences


def is_about(quality: Result, speed: Result) -> bool:
    """Whether both are of the same model with the same weights: those of another format lose something else."""
    return quality.model == speed.model and quality.weights == speed.weights


def _of_speed(speed: Result, qualities: Sequence[Result], with_name: bool) -> Iterator[str]:
    rows = [row for row in speed.rows if is_depth(row) and not is_baseline(row)]
    depths = sorted({row["depth"] for row in rows})
    own = [each for each in qualities if is_about(each, speed)]
    for depth in spaced(depths, _MOST_SENTENCES):
        costs = [quality_sentence(each, depth) for each in own[:1]]
        parts = [speed_sentence(row for row in rows if row["depth"] == depth), *filter(None, costs)]
        name = f"{speed.model}, {speed.weights}, depth" if with_name else "Depth"
        yield f"{name} {_depth(speed, depth)}: {'; '.join(parts)}."


def _of_quality(quality: Result) -> Iterator[str]:
    for depth in spaced(sorted(depth for depth in perplexities(quality) if depth), _MOST_SENTENCES):
        if cost := quality_sentence(quality, depth):
            yield f"Depth {_depth(quality, depth)}: {cost}."


def _depth(result: Result, depth: int) -> str:
    model = result.data.get("model")
    num_blocks = model.get("num_blocks") if isinstance(model, dict) else None
    removed = (model.get("removed") or [])[:depth] if isinstance(model, dict) else []
    # Only where whole blocks were removed is a depth a number of blocks.
    whole = bool(removed) and all("." not in str(unit) for unit in removed)
    return f"{depth} of {num_blocks} blocks" if num_blocks and whole else str(depth)
