"""What takes turns in a workload of `sleb bench throughput`, and what each is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sleb.benchmarks.workloads import Workload

# A depth, the baseline a second time, or a batch of all depths.
Variant = int | str
CONTROL, MIXED = "control", "mixed"


@dataclass(frozen=True)
class Variants:
    """What takes turns: the depths, in the order asked, and what is measured against them.

    baseline: the depth that speedups refer to. control, mixed: as in ThroughputOptions.
    """

    depths: tuple[int, ...]
    baseline: int
    control: bool = True
    mixed: bool = True

    def of(self, workload: Workload) -> list[Variant]:
        """The variants of a workload."""
        variants: list[Variant] = list(self.depths)
        if self.control:
            variants.append(CONTROL)
        if self.mixes(workload) and workload.batch >= len(self.depths):
            variants.append(MIXED)
        return variants

    def mixes(self, workload: Workload) -> bool:
        """Whether a mixed batch is asked for, whether or not the batch is large enough for it."""
        return self.mixed and workload.test == "generate" and len(self.depths) > 1

    def request_depths(self, variant: Variant, batch: int) -> list[int]:
        """The depth of each of `batch` requests."""
        if variant == MIXED:
            return depths_in_turns(self.depths, batch)
        return [variant if isinstance(variant, int) else self.baseline] * batch

    def ratio(self, variant: Variant, workload: Workload, times: Mapping[Variant, float]) -> float:
        """How much faster than expected: the baseline's time over this one's, both of one repetition.

        Of the mixed batch the expected time is the mean over its requests of the times that their depths take alone.
        """
        if variant != MIXED:
            return times[self.baseline] / times[variant]
        alone = [times[depth] for depth in self.request_depths(MIXED, workload.batch)]
        return sum(alone) / len(alone) / times[MIXED]

    def ratios(self, workload: Workload, times: Mapping[Variant, float]) -> list[float]:
        """Of all variants but the baseline."""
        return [
            self.ratio(variant, workload, times) for variant in self.of(workload) if variant != self.baseline
        ]


def depths_in_turns(depths: Sequence[int], batch: int) -> list[int]:
    """The depths of a mixed batch, each as often as the others or once more."""
    return [depths[number % len(depths)] for number in range(batch)]
