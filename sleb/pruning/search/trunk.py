"""Hidden states that many candidates share, kept as far as memory allows.

All candidates of a round share what runs before them, and most of that is the same in the next round: removing the unit
at a position changes nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Unit
from sleb.pruning.search.model import ScoringModel

Item = Unit | Patch  # what runs
# The trunk, and the input and output of the unit that runs: hidden states of a batch alive at once.
_LIVE_COPIES = 3


class Trunk:
    """Hidden states before each position of a list of units and patches, over some batches of windows; computed when
    asked for.

    Args:
        items: what runs, in order.
        stride: every how many positions a state is kept; between them, states are computed again.
        count: told of each unit that runs and over how many windows.
    """

    def __init__(
        self,
        model: ScoringModel,
        batches: Sequence[Tensor],
        items: Sequence[Item],
        stride: int,
        count: Callable[[Unit, int], None],
    ) -> None:
        self.batches = batches
        self.stride = stride
        self._model = model
        self._items = list(items)
        self._count = count
        self._kept: list[dict[int, Tensor]] = [{} for _ in batches]

    def at(self, position: int, index: int) -> Tensor:
        """Hidden states [W, L, H] of batch `index` before the item at `position`; the end is len(items)."""
        kept = self._kept[index]
        if not kept:
            kept[0] = self._model.embed(self.batches[index])
        start = max(each for each in kept if each <= position)
        hidden = kept[start]
        for number in range(start, position):
            hidden = self.run(self._items[number], hidden)
            if (number + 1) % self.stride == 0 and number + 1 < len(self._items):
                kept[number + 1] = hidden
        return hidden

    def after(self, position: int, rest: Sequence[Item], index: int) -> Tensor:
        """Hidden states at the end, had `rest` run from `position` on."""
        hidden = self.at(position, index)
        for item in rest:
            hidden = self.run(item, hidden)
        return hidden

    def run(self, item: Item, hidden: Tensor) -> Tensor:
        if isinstance(item, Patch):
            return self._model.apply(item, hidden)
        self._count(item, len(hidden))
        return self._model.run(item, hidden)

    def replace(self, position: int, rest: Sequence[Item]) -> None:
        """From now on `rest` runs from `position` on; what does not depend on it stays."""
        self._items[position:] = rest
        for kept in self._kept:
            for number in [each for each in kept if each > position]:
                del kept[number]


def fitting_stride(state_bytes: int, num_positions: int, memory_bound: int) -> int:
    """The smallest stride whose states, of `state_bytes` each, stay within `memory_bound`."""
    num_kept = max(1, memory_bound // max(state_bytes, 1))
    return max(1, -(-num_positions // num_kept))


def state_bytes(model: ScoringModel, windows: Tensor) -> int:
    """Bytes of the hidden states of one window."""
    with torch.no_grad():
        return model.embed(windows[:1]).nbytes


def fitting_batch(model: ScoringModel, windows: Tensor, most: int, memory_bound: int) -> int:
    """How many windows run at once: `most`, or as many as keep the states alive at once within `memory_bound`."""
    return max(1, min(most, memory_bound // (_LIVE_COPIES * state_bytes(model, windows))))
