"""The numbers of one row of a benchmark: medians, spreads, and speedups paired within repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sleb.benchmarks.stats import Verdict, ratio_interval, verdict

# A row whose half spread is above this share of its median is called noisy.
NOISY = 0.10


@dataclass(frozen=True)
class Row:
    """One workload for one variant. Samples are in the order of the repetitions.

    Attributes:
        depth: None for a mixed batch. baseline_depth: the depth that speedup and ideal_speedup refer to.
        tokens_per_second: median; _low and _high are the slowest and fastest repetition.
        relative_spread: (high − low) / 2 over the median; None for a single repetition.
        seconds: median time of a run.
        speedup: estimated from the ratios of the baseline's time over this variant's, both of one repetition; of a
            mixed batch, of the time expected from its depths alone over its own. _low and _high: its interval of
            confidence speedup_level; where that is None, the least and the greatest ratio. See `intervals`.
        ideal_speedup: modelled, see `sleb.benchmarks.ideal`.
        ideal_gain_share: (speedup − 1) / (ideal_speedup − 1); None where no gain is to be had.
        weight_bytes: that this depth uses. kv_bytes: K and V of the whole batch at its longest. Of a mixed batch
            weight_bytes and num_blocks_kept are of its fullest depth, kv_bytes_per_token is the mean of its requests.
        roofline_share: the least time that the ceilings measured in the same run allow over the median time; None
            where it is not known.
        variant: "depth 6", "control" (the baseline a second time) or "mixed". depths: those of a mixed batch.
        verdict: what the interval shows. stopped: why there were no more repetitions: "interval", "repetitions",
            "time" or "interrupt".
    """

    test: str
    depth: int | None
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
    speedup_level: float | None
    speedup_samples: list[float]
    ideal_speedup: float
    ideal_gain_share: float | None
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    roofline_share: float | None = None
    variant: str = ""
    verdict: Verdict = "no difference"
    depths: list[int] | None = None
    stopped: str | None = None

    @property
    def noisy(self) -> bool:
        return self.relative_spread is not None and self.relative_spread > NOISY

    @property
    def is_pruned(self) -> bool:
        """Whether it is a depth that is compared with the baseline, and neither that itself nor a control nor mixed."""
        return self.depth is not None and self.depth != self.baseline_depth

    @property
    def half_width(self) -> float | None:
        """Half the width of the speedup's interval, as a share of it; None without a level."""
        if self.speedup_level is None:
            return None
        return (self.speedup_high - self.speedup_low) / 2 / self.speedup


def make_row(
    seconds: Sequence[float],
    ratios: Sequence[float],
    *,
    counted_tokens: int,
    ideal_speedup: float,
    is_baseline: bool = False,
    floor_seconds: float | None = None,
    **facts: Any,
) -> Row:
    """The statistics of a variant's times and of their ratios to what they are compared with, a repetition each.

    counted_tokens: those of tokens/s. floor_seconds: the least time that the ceilings allow; None where it is not
    known. facts: the remaining fields of Row, unchanged.
    """
    rates = [counted_tokens / time for time in seconds]
    rate, found = median(rates), ratio_interval(ratios)
    gains = abs(ideal_speedup - 1) > 1e-9
    return Row(
        repetitions=len(seconds),
        tokens_per_second=rate,
        tokens_per_second_low=min(rates),
        tokens_per_second_high=max(rates),
        relative_spread=(max(rates) - min(rates)) / (2 * rate) if len(rates) > 1 else None,
        tokens_per_second_samples=rates,
        seconds=median(seconds),
        seconds_samples=list(seconds),
        speedup=found.estimate,
        speedup_low=found.low,
        speedup_high=found.high,
        speedup_level=found.level,
        speedup_samples=list(ratios),
        ideal_speedup=ideal_speedup,
        ideal_gain_share=(found.estimate - 1) / (ideal_speedup - 1) if gains else None,
        roofline_share=None if floor_seconds is None else floor_seconds / median(seconds),
        verdict="baseline" if is_baseline else verdict(found),
        **facts,
    )


def rows_below(rows: Sequence[Row], bound: float) -> list[Row]:
    """The rows of pruned depths whose estimated speedup is below `bound`."""
    return [row for row in rows if row.is_pruned and row.speedup < bound]
