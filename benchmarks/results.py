"""The numbers of one row of a benchmark: medians, spreads, and speedups paired within repetitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

# A row whose half spread is above this share of its median is called noisy.
NOISY = 0.10


@dataclass(frozen=True)
class Row:
    """One workload at one depth. Samples are in the order of the repetitions.

    Attributes:
        baseline_depth: the depth that speedup and ideal_speedup refer to.
        tokens_per_second: median; _low and _high are the slowest and fastest repetition.
        relative_spread: (high − low) / 2 over the median; None for a single repetition.
        seconds: median time of a run.
        speedup: median over repetitions of the baseline's time over this depth's, both of one repetition.
        ideal_speedup: modelled, see `sleb.benchmarks.ideal`.
        ideal_gain_share: (speedup − 1) / (ideal_speedup − 1); None where no gain is to be had.
        weight_bytes: that this depth uses. kv_bytes: K and V of the whole batch at its longest.
        roofline_share: the least time that the ceilings measured in the same run allow over the median time: of
            "prompt" by its operations, of "decode" by its bytes; None for "generate", which is both.
    """

    test: str
    depth: int
    baseline_depth: int
    num_blocks_kept: int
    batch: int
    prompt_tokens: int
    output_tokens: int
    repetitions: int
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    relative_spread: float | None
    tokens_per_second_samples: list[float]
    seconds: float
    seconds_samples: list[float]
    speedup: float
    speedup_low: float
    speedup_high: float
    speedup_samples: list[float]
    ideal_speedup: float
    ideal_gain_share: float | None
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    roofline_share: float | None = None

    @property
    def noisy(self) -> bool:
        return self.relative_spread is not None and self.relative_spread > NOISY


def make_row(
    test: str,
    depth: int,
    baseline_depth: int,
    repetitions: Sequence[Mapping[int, float]],
    *,
    counted_tokens: int,
    ideal_speedup: float,
    floor_seconds: float | None = None,
    **facts: int,
) -> Row:
    """The statistics of `repetitions`, each seconds by depth; `counted_tokens` are those of tokens/s.

    floor_seconds: the least time that the ceilings allow; None where it is not known.
    facts: the remaining fields of Row, unchanged.
    """
    seconds = [times[depth] for times in repetitions]
    rates = [counted_tokens / time for time in seconds]
    speedups = [times[baseline_depth] / times[depth] for times in repetitions]
    rate, speedup = median(rates), median(speedups)
    gain_share = (speedup - 1) / (ideal_speedup - 1) if abs(ideal_speedup - 1) > 1e-9 else None
    return Row(
        test=test,
        depth=depth,
        baseline_depth=baseline_depth,
        repetitions=len(repetitions),
        tokens_per_second=rate,
        tokens_per_second_low=min(rates),
        tokens_per_second_high=max(rates),
        relative_spread=(max(rates) - min(rates)) / (2 * rate) if len(rates) > 1 else None,
        tokens_per_second_samples=rates,
        seconds=median(seconds),
        seconds_samples=seconds,
        speedup=speedup,
        speedup_low=min(speedups),
        speedup_high=max(speedups),
        speedup_samples=speedups,
        ideal_speedup=ideal_speedup,
        ideal_gain_share=gain_share,
        roofline_share=None if floor_seconds is None else floor_seconds / median(seconds),
        **facts,
    )
