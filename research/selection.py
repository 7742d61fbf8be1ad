"""Ways to choose blocks that are not SLEB's, for comparison: each gives the blocks to remove at a count.

Models are those of `sleb.pruning.search.ScoringModel`; windows [W, L] int64.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sleb.layer_map.units import Unit
from sleb.pruning.search import ScoringModel, candidate_units, total_loss

Choice = Callable[[int], list[Unit]]
"""How many blocks -> which."""


def _states(model: ScoringModel, window: Tensor) -> Iterator[Tensor]:
    """Hidden states [1, L, H] in float32 before each block of the whole model, and at the end."""
    hidden = model.embed(window)
    yield hidden.float()
    for block in range(model.num_blocks):
        hidden = model.run(Unit(block), hidden)
        yield hidden.float()


@torch.no_grad()
def block_influence(model: ScoringModel, windows: Tensor) -> list[float]:
    """One less the mean cosine of a block's input and output at each token (ShortGPT, Men et al., arXiv:2403.03853)."""
    totals = torch.zeros(model.num_blocks, dtype=torch.float64)
    for window in torch.split(windows, 1):
        states = list(_states(model, window))
        for block in range(model.num_blocks):
            cosine = F.cosine_similarity(states[block], states[block + 1], dim=-1)
            totals[block] += 1 - cosine.double().mean().item()
    return (totals / len(windows)).tolist()


def shortgpt(model: ScoringModel, windows: Tensor) -> Choice:
    """The blocks of the least influence, all measured once on the whole model; any block may go."""
    influence = block_influence(model, windows)
    order = sorted(range(model.num_blocks), key=lambda block: (influence[block], block))
    return lambda count: [Unit(block) for block in order[:count]]


@torch.no_grad()
def angular_distances(model: ScoringModel, windows: Tensor) -> Tensor:
    """[B + 1, B + 1] float64: mean angle / π between the last token's states before block i and before block j.

    (Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv:2403.17887, equation 8.)
    """
    total = torch.zeros(model.num_blocks + 1, model.num_blocks + 1, dtype=torch.float64)
    for window in torch.split(windows, 1):
        last = torch.cat([state[0, -1:].double() for state in _states(model, window)])
        unit = F.normalize(last, dim=-1)
        total += torch.arccos((unit @ unit.T).clamp(-1, 1)) / math.pi
    return total / len(windows)


def contiguous_run(model: ScoringModel, windows: Tensor) -> Choice:
    """The run of blocks that turns the last token's state the least (arXiv:2403.17887)."""
    distances = angular_distances(model, windows)

    def choose(count: int) -> list[Unit]:
        starts = range(model.num_blocks - count + 1)
        first = min(starts, key=lambda start: (float(distances[start, start + count]), start))
        return [Unit(block) for block in range(first, first + count)]

    return choose


def last_blocks(model: ScoringModel) -> Choice:
    """The deepest blocks but the very last (the simple rule of arXiv:2403.17887, section 4.4)."""
    end = model.num_blocks - 1
    return lambda count: [Unit(block) for block in range(end - count, end)]


def evenly_spaced(model: ScoringModel) -> Choice:
    """Blocks at equal distances between the first and the last."""
    middle = candidate_units("blocks", model.num_blocks)
    return lambda count: [middle[(2 * place + 1) * len(middle) // (2 * count)] for place in range(count)]


def random_blocks(model: ScoringModel, seed: int) -> Choice:
    """Blocks drawn without the first and the last; a longer draw begins with the shorter one."""
    middle = candidate_units("blocks", model.num_blocks)
    order = random.Random(seed).sample(middle, len(middle))
    return lambda count: order[:count]


def one_shot(model: ScoringModel, windows: Tensor, losses: dict[Unit, float] | None = None) -> Choice:
    """The blocks whose removal *alone* costs the least loss: SLEB's criterion without its iteration.

    losses: of the model without each candidate, where they are known already.
    """
    known = losses or {}
    found = {
        unit: known[unit] if unit in known else total_loss(model, windows, "blocks", [unit])
        for unit in candidate_units("blocks", model.num_blocks)
    }
    order = sorted(found, key=lambda unit: (found[unit], unit))
    return lambda count: order[:count]
