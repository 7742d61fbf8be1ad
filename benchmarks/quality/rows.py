"""The results of `sleb eval`: a row for each depth, and how scores of tokens become its numbers.

Perplexity is exp of the mean negative log-likelihood of the predicted tokens, those of all texts together. Every number
about texts has its interval (`quality_interval`); what is compared with the dense model is so on the same tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sleb.benchmarks.quality.answers import GenerationQuality
from sleb.benchmarks.quality.interval import Estimate, Interval, choose_num_batches, estimate
from sleb.benchmarks.quality.scores import TextScores, TokenScores
from sleb.benchmarks.quality.tasks import Scores


@dataclass
class QualityRow:
    """One depth. What was not measured is None; what is compared is compared with the dense model on the same tokens.

    Attributes:
        removed: the units that it lacks. tokens: that were predicted.
        perplexity, ratio (over the dense one's), agreement (share of equal next tokens), kl (dense ‖ this, nats): each
            with its 95 % interval, None where the text is too short for one.
        word_perplexity, byte_perplexity, bits_per_byte: as lm-eval defines them, of texts that are whole.
        texts: perplexity and ratio of each text, where there are several.
        generation, tasks: see those modules.
    """

    depth: int
    removed: list[str]
    tokens: int | None = None
    perplexity: float | None = None
    perplexity_interval: Interval | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None
    agreement: float | None = None
    agreement_interval: Interval | None = None
    kl: float | None = None
    kl_interval: Interval | None = None
    word_perplexity: float | None = None
    byte_perplexity: float | None = None
    bits_per_byte: float | None = None
    texts: list[dict[str, Any]] = field(default_factory=list)
    generation: GenerationQuality | None = None
    tasks: Scores | None = None


@dataclass
class QualityReport:
    """All that a run found. complete: whether nothing was cut short. problem: why, where it was not an interrupt."""

    environment: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    rows: list[QualityRow]
    complete: bool = True
    problem: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it ended before anything was complete."""
        return all(row.tokens is None and row.generation is None and row.tasks is None for row in self.rows)

    def to_json(self) -> str:
        """One object: its kind, and the names of the attributes as keys; ends with a newline."""
        return (
            json.dumps({"kind": "quality"} | asdict(self), indent=1, allow_nan=False, ensure_ascii=False)
            + "\n"
        )


def fill_rows(rows: Sequence[QualityRow], found: Sequence[TextScores]) -> int:
    """Summarises the scores of texts into the rows, which have the depths of the scores.

    Returns into how many stretches the text was cut for the intervals.
    """
    by_depth = [TokenScores.join([scores.at(place) for scores in found]) for place in range(len(rows))]
    dense = by_depth[0]
    num_batches = choose_num_batches(dense.losses)
    for place, (row, scores) in enumerate(zip(rows, by_depth, strict=True)):
        row.tokens = len(scores.losses)
        _set(row, "perplexity", estimate(scores.losses, num_batches).exp())
        if place:
            differences = scores.losses.double() - dense.losses.double()
            _set(row, "ratio", estimate(differences, num_batches).exp())
            _set(row, "agreement", estimate(scores.agreed, num_batches).clamped(0.0, 1.0))
            _set(row, "kl", estimate(scores.divergences, num_batches).clamped(0.0, math.inf))
        if len(found) > 1:
            row.texts = [_one_text(each, place) for each in found]
        if all(each.is_whole for each in found):
            total = float(scores.losses.double().sum())
            num_bytes = sum(each.text.text.num_bytes for each in found)
            num_words = sum(each.text.text.num_words for each in found)
            row.word_perplexity = _finite(Estimate(total / num_words, None).exp().value)
            row.byte_perplexity = _finite(Estimate(total / num_bytes, None).exp().value)
            row.bits_per_byte = _finite(total / num_bytes / math.log(2))
    return num_batches


def _set(row: QualityRow, name: str, found: Estimate) -> None:
    """A number that is not finite stands as None: JSON has none."""
    value, interval = _finite(found.value), found.interval
    setattr(row, name, value)
    if value is not None and interval is not None and all(map(math.isfinite, interval)):
        setattr(row, f"{name}_interval", interval)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _one_text(scores: TextScores, place: int) -> dict[str, Any]:
    losses, dense = (scores.at(each).losses.double() for each in (place, 0))
    return {
        "name": scores.text.text.name,
        "tokens": len(losses),
        "perplexity": _finite(Estimate(float(losses.mean()), None).exp().value),
        "ratio": _finite(Estimate(float((losses - dense).mean()), None).exp().value) if place else None,
    }
