"""Which depth of an order to recommend: the front of quality against speed, and targets on both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap, Unit
from sleb.pruning.cost_model import CostModel


@dataclass(frozen=True)
class FrontPoint:
    """A depth and what it gives: perplexities (None where not known) and the predicted speedup (None without one).

    held_out: the perplexity of each held-out text.
    """

    depth: int
    removed: Unit | None
    perplexity: float | None
    held_out: tuple[float | None, ...]
    speedup: float | None


def front(layer_map: LayerMap, cost_model: CostModel | None) -> list[FrontPoint]:
    """One point a depth, the dense model first."""
    return [
        FrontPoint(
            depth=depth,
            removed=layer_map.removed[depth - 1] if depth else None,
            perplexity=layer_map.perplexity(depth),
            held_out=tuple(text.perplexity(depth) for text in layer_map.held_out),
            speedup=(
                None
                if cost_model is None
                else cost_model.speedup(layer_map.removed[:depth], layer_map.num_patch_parameters(depth))
            ),
        )
        for depth in range(layer_map.max_depth + 1)
    ]


@dataclass(frozen=True)
class Target:
    """speedup: at least. increase: of the perplexity, a share, at most. Either may be None; not both."""

    speedup: float | None
    increase: float | None

    def is_fast_enough(self, point: FrontPoint) -> bool:
        return self.speedup is not None and point.speedup is not None and point.speedup >= self.speedup

    def is_good_enough(self, point: FrontPoint, dense: FrontPoint) -> bool:
        if self.increase is None:
            return True
        pairs = [pair for pair in zip(point.held_out, dense.held_out, strict=True) if None not in pair]
        for now, before in pairs or [(point.perplexity, dense.perplexity)]:
            assert now is not None and before is not None
            if not (math.isfinite(now) and now <= before * (1 + self.increase)):
                return False
        return True

    def is_decided(self, points: Sequence[FrontPoint]) -> bool:
        """Whether removing more cannot change the choice."""
        last = points[-1]
        return self.is_fast_enough(last) or not self.is_good_enough(last, points[0])

    def choose(self, points: Sequence[FrontPoint]) -> int:
        """The recommended depth: the shallowest that is fast enough; without one, the deepest that is good enough.

        A depth past the first that is not good enough is never chosen.
        """
        within = list(points)
        for index, point in enumerate(points):
            if not self.is_good_enough(point, points[0]):
                within = list(points[:index])
                break
        fast = [point.depth for point in within if self.is_fast_enough(point)]
        return fast[0] if fast else within[-1].depth

    def shortfall(self, points: Sequence[FrontPoint], depth: int) -> str | None:
        """Where the chosen depth misses the speedup, in words; None where it does not."""
        point = points[depth]
        if self.speedup is None or self.is_fast_enough(point):
            return None
        found = "no speedup is known" if point.speedup is None else f"{point.speedup:.2f} times"
        return (
            f"a speedup of {self.speedup:g} cannot be had within these limits: depth {depth} gives {found}; "
            "allow a larger perplexity increase, or more removals"
        )


def check_reachable(cost_model: CostModel, candidates: Sequence[Unit], speedup: float) -> None:
    """ConfigError when even the removal of every candidate would not be fast enough."""
    most = cost_model.speedup(candidates)
    if most < speedup:
        raise ConfigError(
            f"target speedup {speedup:g} is out of reach: without all {len(candidates)} units that may be removed "
            f"a step would be {most:.2f} times as fast on this machine; ask for less"
        )
