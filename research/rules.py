"""Published rules for which blocks to leave out, and ReplaceMe's repair, written from their formulas.

They choose on the same calibration windows [W, L] as the search does, and look at the whole model alone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleb.errors import ConfigError
from sleb.layer_map.units import Unit
from sleb.pruning.search import ScoringModel

Choice = Callable[[int], list[Unit]]  # how many blocks -> which


def _states(model: ScoringModel, window: Tensor) -> Iterator[Tensor]:
    """Hidden states [1, L, E] in float32 before each block of the whole model, and at the end."""
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


@torch.no_grad()
def replace_me(model: ScoringModel, windows: Tensor, run: list[Unit]) -> Tensor:
    """ReplaceMe's map T [E, E] float64 for a run of blocks (Shopkhoev et al., arXiv:2505.02819, equation 5).

    Least squares of T over all tokens, without an intercept or a ridge, as published: M·T ≈ L − Y, where M is what the
    MLP before the run adds, Y the residual that it adds to, and L the residual after the run, all of the whole model.
    Raises ConfigError for a run that begins with the first block.
    """
    before, size = run[0].block - 1, model.embed(windows[:1, :1]).shape[-1]
    if before < 0:
        raise ConfigError(
            "ReplaceMe needs a block before the run; the first block is in it: give other --counts"
        )
    gram, cross = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    for window in torch.split(windows, 1):
        hidden = model.embed(window)
        for block in range(before):
            hidden = model.run(Unit(block), hidden)
        residual = model.run(Unit(before, "attention"), hidden)
        hidden = model.run(Unit(before, "mlp"), residual)
        added = (hidden.float() - residual.float()).double().flatten(0, 1).cpu()
        for unit in run:
            hidden = model.run(unit, hidden)
        wanted = (hidden.float() - residual.float()).double().flatten(0, 1).cpu()
        gram += added.T @ added
        cross += added.T @ wanted
    solved: Tensor = torch.linalg.solve(gram, cross)
    return solved


def write_replaced(folder: Path, into: Path, block: int, transform: Tensor) -> None:
    """A copy of the checkpoint in `folder` whose block's down projection is followed by T. Raises ConfigError."""
    into.mkdir()
    name, found = f"model.layers.{block}.mlp.down_proj.weight", False
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, into)
            continue
        tensors = load_file(path)
        if name in tensors:
            found, weight = True, tensors[name]
            tensors[name] = (transform.T @ weight.double()).to(weight.dtype).contiguous()
        save_file(tensors, into / path.name, {"format": "pt"})
    if not found:
        names = json.dumps(name)
        raise ConfigError(f"{folder} has no {names} in its safetensors files, so ReplaceMe cannot change it")
