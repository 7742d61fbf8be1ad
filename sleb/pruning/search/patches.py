"""The model without a unit: what runs then, and the patch where it ran, fitted before the candidate is judged.

A removal makes one patch, for the run of removed sublayers that it makes or joins; patches of other runs stay, so that
a depth's patches are those of the depth before but for one. On windows of their own (`Patching`), the patch is fitted
to what the dense model's states are after the run, from what the pruned model's are before it: all that a candidate
needs is in two trunks, and of a fit only sums over the windows are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Sublayer, Unit, place_of, sublayer_at
from sleb.pruning.search.model import PatchFit, ScoringModel
from sleb.pruning.search.trunk import Item, Trunk, fitting_stride

Fit = Callable[[tuple[Sublayer, Sublayer], int], PatchFit]


@dataclass(frozen=True)
class Variant:
    """A model that runs `rest` from position `position` of the present one on."""

    position: int
    rest: tuple[Item, ...]


def in_order(units: Iterable[Unit], patches: Iterable[Patch]) -> list[Item]:
    """What runs, from the bottom up."""
    return sorted([*units, *patches], key=lambda item: _span(item)[0])


class Patching:
    """Fits patches to windows of its own, and keeps those of all depths.

    Attributes:
        patches: of all depths so far, by the place of their runs.
        batches, num_windows: what patches are fitted on.
    """

    def __init__(
        self,
        model: ScoringModel,
        batches: Sequence[Tensor],
        fit: Fit,
        dense: Sequence[Unit],
        items: Sequence[Item],
        patches: Iterable[Patch],
        depth: int,
        bounds: tuple[int, int],
        count: Callable[[Unit, int], None],
    ) -> None:
        """items: what runs now, at `depth`. dense: what runs at depth 0. bounds: bytes of hidden states of all these
        windows at one position, and most bytes to keep; count: as `Trunk`'s."""
        self.batches, self.num_windows = batches, sum(map(len, batches))
        self.patches = list(patches)
        self._fit, self._dense_units, self._depth = fit, list(dense), depth
        state_bytes, trunk_bound = bounds
        stride = fitting_stride(state_bytes, len(dense), trunk_bound // 2)
        self._dense = Trunk(model, batches, dense, stride, count)
        self._pruned = Trunk(model, batches, items, stride, count)
        self._fitted: dict[Unit, Patch] = {}

    def without(self, items: Sequence[Item], unit: Unit) -> Variant:
        """What runs of `items` without `unit`: its patch is fitted unless it is known."""
        low, high = _run_around(items, unit)
        position = next(at for at, item in enumerate(items) if _span(item)[0] >= low)
        if unit not in self._fitted:
            fit = self._fit((sublayer_at(low), sublayer_at(high)), self._depth + 1)
            end = sum(_span(each)[1] <= high for each in self._dense_units)
            for index in range(len(self.batches)):
                fit.add(self._pruned.at(position, index), self._dense.at(end, index))
            self._fitted[unit] = fit.patch()
        above = (item for item in items if _span(item)[0] > high)
        return Variant(position, (self._fitted[unit], *above))

    def remove(self, items: Sequence[Item], unit: Unit) -> Variant:
        """What runs without `unit`, for good: a depth more."""
        variant = self.without(items, unit)
        new, kept = self._fitted[unit], [*items[: variant.position], *variant.rest]
        self.patches = [
            patch if patch in kept or patch not in items else replace(patch, last_depth=self._depth)
            for patch in self.patches
        ]
        self.patches = sorted([*self.patches, new], key=lambda patch: (patch.first, patch.first_depth))
        self._depth += 1
        self._pruned.replace(variant.position, variant.rest)
        # What is fitted from states below the new patch, and does not join it, would be fitted the same again.
        below = _span(new)[0] - 1
        self._fitted = {
            other: replace(patch, first_depth=self._depth + 1)
            for other, patch in self._fitted.items()
            if _span(patch)[1] < below
        }
        return variant


def _span(item: Item) -> tuple[int, int]:
    """The places of the first and the last sublayer that a unit is, or a patch stands for."""
    first, last = (
        (item.first, item.last) if isinstance(item, Patch) else (item.sublayers[0], item.sublayers[-1])
    )
    return place_of(first), place_of(last)


def _run_around(items: Sequence[Item], unit: Unit) -> tuple[int, int]:
    """The places of the run of removed sublayers that `unit`'s removal makes or joins."""
    alive = {place for item in items if isinstance(item, Unit) for place in _span(item)} - {*_span(unit)}
    low, high = _span(unit)
    while low > 0 and low - 1 not in alive:
        low -= 1
    top = max(alive)
    while high < top and high + 1 not in alive:
        high += 1
    return low, high
