"""Hidden states that many candidates share, kept as far as memory allows.

All candidates of a round share what runs before them, and most of that is the same in the next round: removing the unit
at a position changes nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sleb.layer_map.units import Unit
from sleb.pruning.search.model import ScoringModel


class Trunk:
    """Hidden states before each position of a list of units, over some batches of windows; computed when asked for.

    Args:
        alive: the units that run, in order.
        stride: every how many positions a state is kept; between them, states are computed again.
        count: told of each unit that runs and over how many windows.
    """

    def __init__(
        self,
        model: ScoringModel,
        batches: Sequence[Tensor],
        alive: Sequence[Unit],
        stride: int,
        count: Callable[[Unit, int], None],
    ) -> None:
        self.batches = batches
        self.stride = stride
        self._model = model
        self._alive = list(alive)
        self._count = count
        self._kept: list[dict[int, Tensor]] = [{} for _ in batches]

    def at(self, position: int, index: int) -> Tensor:
        """Hidden states [W, L, H] of batch `index` before the unit at `position`; the end is len(alive)."""
        kept = self._kept[index]
        if not kept:
            kept[0] = self._model.embed(self.batches[index])
        start = max(each for each in kept if each <= position)
        hidden = kept[start]
        for number in range(start, position):
            hidden = self.run(self._alive[number], hidden)
            if (number + 1) % self.stride == 0 and number + 1 < len(self._alive):
                kept[number + 1] = hidden
        return hidden

    def after(self, position: int, index: int) -> Tensor:
        """Hidden states at the end, had the unit at `position` not run."""
        hidden = self.at(position, index)
        for unit in self._alive[position + 1 :]:
            hidden = self.run(unit, hidden)
        return hidden

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        self._count(unit, len(hidden))
        return self._model.run(unit, hidden)

    def remove(self, position: int) -> None:
        """Takes a unit out for good; what does not depend on it stays."""
        del self._alive[position]
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
