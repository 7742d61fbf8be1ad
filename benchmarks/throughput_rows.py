"""The rows of `sleb bench throughput`: what was measured beside what could be at best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleb.benchmarks.ceilings import Ceilings
from sleb.benchmarks.ideal import (
    DepthCost,
    decode_bytes,
    decode_flops,
    ideal_decode_speedup,
    ideal_prompt_speedup,
    prompt_bytes,
    prompt_flops,
)
from sleb.benchmarks.results import Row, make_row
from sleb.benchmarks.variants import MIXED, Variant, Variants
from sleb.benchmarks.workloads import Workload, describe_workload
from sleb.engine.engine import Engine


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of samples. stops: why each workload was not repeated further, "interrupt" where it is missing."""

    engine: Engine
    variants: Variants
    ceilings: Ceilings | None
    stops: Mapping[Workload, str]

    def rows(self, samples: Mapping[Workload, Sequence[Mapping[Variant, float]]]) -> list[Row]:
        """One row a workload and variant."""
        costs = {depth: DepthCost.of(self.engine, depth) for depth in self.variants.depths}
        return [
            self._row(workload, variant, repetitions, costs)
            for workload, repetitions in samples.items()
            for variant in self.variants.of(workload)
        ]

    def _row(
        self,
        workload: Workload,
        variant: Variant,
        repetitions: Sequence[Mapping[Variant, float]],
        costs: Mapping[int, DepthCost],
    ) -> Row:
        depths = self.variants.request_depths(variant, workload.batch)
        mixed = variant == MIXED
        floor, ideal = None, 1.0
        if not mixed:
            cost = costs[depths[0]]
            floor = None if self.ceilings is None else floor_seconds(workload, cost, self.ceilings)
            ideal = ideal_speedup(workload, costs[self.variants.baseline], cost)
        return make_row(
            [times[variant] for times in repetitions],
            [self.variants.ratio(variant, workload, times) for times in repetitions],
            counted_tokens=workload.counted_tokens,
            ideal_speedup=ideal,
            is_baseline=variant == self.variants.baseline,
            floor_seconds=floor,
            test=workload.test,
            batch=workload.batch,
            prompt_tokens=workload.prompt_tokens,
            output_tokens=workload.output_tokens,
            depth=None if mixed else depths[0],
            depths=list(self.variants.depths) if mixed else None,
            variant=f"depth {variant}" if isinstance(variant, int) else variant,
            baseline_depth=self.variants.baseline,
            stopped=self.stops.get(workload, "interrupt"),
            **self._sizes(workload, depths, costs),
        )

    def _sizes(
        self, workload: Workload, depths: Sequence[int], costs: Mapping[int, DepthCost]
    ) -> dict[str, Any]:
        """Blocks and bytes of requests at `depths`, one each."""
        fullest = min(depths)
        kv_bytes_per_token = [costs[depth].kv_bytes_per_token for depth in depths]
        return {
            "num_blocks_kept": self.engine.tier(fullest).num_blocks_kept,
            "weight_bytes": costs[fullest].weight_bytes,
            "kv_bytes_per_token": round(sum(kv_bytes_per_token) / len(depths)),
            # The last new token is never fed back, so its K and V are never there.
            "kv_bytes": (workload.context - 1) * sum(kv_bytes_per_token),
        }


def ideal_speedup(workload: Workload, baseline: DepthCost, cost: DepthCost) -> float:
    """How much faster than `baseline` a depth would be at best: a prompt by its operations, the others by bytes."""
    if workload.test == "prompt":
        return ideal_prompt_speedup(baseline, cost, workload.batch, workload.prompt_tokens)
    shape = (workload.batch, workload.prompt_tokens, workload.output_tokens)
    return ideal_decode_speedup(baseline, cost, *shape)


def floor_seconds(workload: Workload, cost: DepthCost, ceilings: Ceilings) -> float:
    """The least time of a workload at the ceilings.

    That of the prompts and that of the decode steps, each the larger of what their bytes and what their operations
    take; "generate" is the sum of both.
    """
    batch, prompt_tokens, output_tokens = workload.batch, workload.prompt_tokens, workload.output_tokens
    prompt = ceilings.floor_seconds(prompt_bytes(cost, batch), prompt_flops(cost, batch, prompt_tokens))
    if workload.test == "prompt":
        return prompt
    shape = (batch, prompt_tokens, output_tokens)
    decode = ceilings.floor_seconds(decode_bytes(cost, *shape), decode_flops(cost, *shape))
    return decode if workload.test == "decode" else prompt + decode


def control_notices(rows: Sequence[Row], bound: float, until_narrow: bool = False) -> list[str]:
    """What to say about controls that came out different from what they are a copy of.

    bound: the half width that intervals were to have; a smaller error is told as the size of what cannot be trusted.
    until_narrow: whether a workload may be repeated until its intervals have it, which makes such errors more frequent.
    """
    notices = []
    for row in rows:
        if row.variant != "control" or row.verdict == "no difference":
            continue
        error = abs(row.speedup - 1)
        workload = describe_workload(row.test, row.batch, row.prompt_tokens, row.output_tokens)
        found = (
            f"{workload}: depth {row.depth} measured a second time, as a control, came out {error:.1%} {row.verdict} "
            f"than itself ({row.speedup_low:.3f}–{row.speedup_high:.3f})."
        )
        if error > bound:
            found += (
                " This run cannot be trusted: something met one of two equal variants more than the other. Measure "
                "again, on a quiet machine and with more --repetitions."
            )
        else:
            chance = "one control in twenty errs by chance"
            if until_narrow and row.stopped == "interval":
                chance = "repeated until intervals are narrow, about one control in twelve errs by chance"
            found += f" Differences of {error:.1%} and less mean nothing here; {chance}."
        notices.append(found)
    return notices
