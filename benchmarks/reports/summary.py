"""What pruning gives and costs, in words: throughput and quality of one model told together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.quality import perplexities, quality_sentence
from sleb.benchmarks.reports.shown import spaced, unit_noun
from sleb.benchmarks.reports.speed import is_baseline, is_depth, speed_sentence

_MOST_SENTENCES = 3  # depths of a result that get one


def depth_sentences(results: Sequence[tuple[str, Result]]) -> list[str]:
    """A sentence a depth: its speedups, and the rise of perplexity where a quality result of the model is there.

    Each result comes with what it is called, which sentences begin with where more than one result has some. Raises
    ConfigError.
    """
    speeds = [(name, result) for name, result in results if result.kind == "throughput"]
    qualities = [(name, result) for name, result in results if result.kind == "quality"]
    alone = [
        (name, quality)
        for name, quality in qualities
        if all(speed.model != quality.model for _, speed in speeds)
    ]
    several = len(speeds) + len(alone) > 1

    def beginning(name: str) -> str:
        return f"{name}, depth" if several else "Depth"

    sentences: list[str] = []
    for name, speed in speeds:
        with speed.reading():
            sentences += _of_speed(speed, [quality for _, quality in qualities], beginning(name))
    for name, quality in alone:
        with quality.reading():
            sentences += _of_quality(quality, beginning(name))
    return sentences


def is_about(quality: Result, speed: Result) -> bool:
    """Whether both are of the same model with the same weights: those of another format lose something else."""
    return quality.model == speed.model and quality.weights == speed.weights


def _of_speed(speed: Result, qualities: Sequence[Result], beginning: str) -> Iterator[str]:
    rows = [row for row in speed.rows if is_depth(row) and not is_baseline(row)]
    depths = sorted({row["depth"] for row in rows})
    own = [each for each in qualities if is_about(each, speed)]
    for depth in spaced(depths, _MOST_SENTENCES):
        costs = [quality_sentence(each, depth) for each in own[:1]]
        parts = [speed_sentence(row for row in rows if row["depth"] == depth), *filter(None, costs)]
        yield f"{beginning} {_depth(speed, depth)}: {'; '.join(parts)}."


def _of_quality(quality: Result, beginning: str) -> Iterator[str]:
    for depth in spaced(sorted(depth for depth in perplexities(quality) if depth), _MOST_SENTENCES):
        if cost := quality_sentence(quality, depth):
            yield f"{beginning} {_depth(quality, depth)}: {cost}."


def _depth(result: Result, depth: int) -> str:
    model = result.data.get("model")
    num_blocks = model.get("num_blocks") if isinstance(model, dict) else None
    removed = (model.get("removed") or [])[:depth] if isinstance(model, dict) else []
    # Only where whole blocks were removed is a depth a number of blocks.
    whole = unit_noun(removed) == "block"
    return f"{depth} of {num_blocks} blocks" if num_blocks and whole else str(depth)
