"""What `prune` can be asked, and what is wrong with it before any work is done."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from pathlib import Path

import torch

from sleb.errors import ConfigError
from sleb.pruning.calibration import check_options
from sleb.pruning.search import check_units

DTYPES = ("float32", "bfloat16", "float16")
PRUNE_MODES = ("exact", "fast")
SCREENS = ("race", "gradient")
COSTS = ("params", "latency", "kv")
DEFAULT_REMOVE = "20%"


@dataclass(frozen=True)
class PruneOptions:
    """What to search for, on what, and where it goes.

    Attributes:
        remove: a number of units, or a share of them like "20%"; None: what the targets need, or 20% without any.
        target_speedup: recommend the shallowest depth whose predicted speedup is at least that (`cost_model`).
        max_perplexity_increase: recommend the deepest depth, up to the target, that raises the perplexity (of the
            held-out text, if there is one) by no more than that: "5%" or 0.05.
        calibration: "wikitext2", "c4", a text file, a column of a table ("data.jsonl:text"), "self" (text that the
            model writes), or a mix ("wiki.txt=0.7,self=0.3"); `sampler` is "packed" or "rows" (`calibration`).
        output: file that gets the map after each round; None: nowhere.
        depth: the depth that the map recommends; None: all that `remove` asks for.
        seqlen: tokens a window; None: 2,048, or the model's context if that is shorter.
        windows: how many windows; None: up to 128. seed: shuffles them; 0 for the rows sampler and "self".
        dtype, device: of the model while searching.
        held_out: a source, as `calibration`, that takes no part in the search; its loss is told for every depth.
        cost: weigh the loss that a removal adds by what it saves: "params", "latency" or "kv"; None: not at all.
        speedup: whether to predict the speedup of each depth also where nothing depends on it.
        speedup_batch: requests at once in the steps that the cost model is fitted to.
        units: "blocks", "sublayers" or "attention"; what `remove` counts.
        mode: "exact" is the paper's algorithm; "fast" looks at fewer candidates.
        screen: how a fast search finds them: "race" or "gradient".
        batch_windows: windows that run at once; None: as many as fit the search's memory bound.
        resume: continue the map in `output`. force: replace it.
    """

    remove: int | str | None = None
    calibration: str | Path = "wikitext2"
    output: str | os.PathLike[str] | None = None
    depth: int | None = None
    sampler: str = "packed"
    seqlen: int | None = None
    windows: int | None = None
    seed: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    held_out: str | Path | None = None
    target_speedup: float | None = None
    max_perplexity_increase: float | str | None = None
    cost: str | None = None
    speedup: bool = False
    speedup_batch: int = 1
    units: str = "blocks"
    mode: str = "exact"
    screen: str = "race"
    batch_windows: int | None = None
    resume: bool = False
    force: bool = False

    def check(self) -> None:
        """ConfigError for what can be seen without the model: a slip must not cost the time to load it."""
        if self.remove is not None:
            parse_remove(self.remove, 10**6)
        check_options(self.calibration, self.sampler, self.seqlen, self.windows, self.seed)
        if self.held_out is not None:
            check_options(self.held_out, "packed", self.seqlen, None, None)
        check_units(self.units)
        self._check_targets()
        if self.cost is not None and self.cost not in COSTS:
            raise ConfigError(
                f"cost {self.cost!r} does not exist: choose {', '.join(COSTS)}, or leave it out"
            )
        if self.cost == "kv" and self.units == "sublayers":
            raise ConfigError(
                "cost kv weighs by the KV cache, of which an MLP has none: "
                "take --units blocks or attention, or --cost latency"
            )
        for name, value, allowed in (("mode", self.mode, PRUNE_MODES), ("screen", self.screen, SCREENS)):
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} does not exist: choose {' or '.join(allowed)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} does not exist: choose {', '.join(DTYPES)}")
        if self.resume and self.output is None:
            raise ConfigError("resume needs the output file that it continues")

    def _check_targets(self) -> None:
        speedup = self.target_speedup
        if speedup is not None and not (math.isfinite(speedup) and speedup > 1):
            raise ConfigError(f"target speedup {speedup} must be a number above 1, like 1.25")
        if self.max_perplexity_increase is not None:
            parse_increase(self.max_perplexity_increase)
        if self.speedup_batch < 1:
            raise ConfigError(f"speedup batch {self.speedup_batch} must be 1 or more")
        if self.depth is not None and self.has_target:
            raise ConfigError(
                "a depth to recommend and a target (speedup, perplexity) contradict each other: leave one out"
            )

    @property
    def has_target(self) -> bool:
        """Whether the recommended depth is chosen by a target."""
        return self.target_speedup is not None or self.max_perplexity_increase is not None

    @property
    def predicts_speedup(self) -> bool:
        """Whether a cost model is fitted."""
        return self.speedup or self.target_speedup is not None or self.cost == "latency"

    @property
    def search_mode(self) -> str:
        """The mode of `sleb.pruning.search`: "exact", or the screen of a fast search."""
        return "exact" if self.mode == "exact" else self.screen


def parse_remove(remove: int | str, num_blocks: int) -> int:
    """How many blocks `6`, `"6"` or `"20%"` of `num_blocks` are.

    A share is rounded to the nearest block, halves up, and is one block at least.
    """
    text = str(remove).strip()
    try:
        amount = Decimal(text.removesuffix("%"))
    except InvalidOperation:
        amount = Decimal("NaN")
    share = text.endswith("%")
    whole = amount.is_finite() and (share or amount == amount.to_integral_value())
    if not whole or amount <= 0 or isinstance(remove, bool):
        raise ConfigError(
            f"remove {remove!r} must be a number of blocks, like 6, or a share of them, like 20%"
        )
    if not share:
        return int(amount)
    if amount > 100:
        raise ConfigError(f"remove {remove!r} is more than the whole model: a share is at most 100%")
    return max(1, int((num_blocks * amount / 100).to_integral_value(ROUND_HALF_UP)))


def parse_increase(increase: float | str) -> float:
    """A share of 0 or more: 0.05, "0.05" or "5%"."""
    text = str(increase).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not (math.isfinite(share) and share >= 0):
        raise ConfigError(f"perplexity increase {increase!r} must be a share of 0 or more, like 5% or 0.05")
    return share


def set_threads(num_threads: int | None) -> None:
    """Let torch use `num_threads` threads (None: its own choice)."""
    if num_threads is not None:
        if num_threads < 1:
            raise ConfigError(f"threads {num_threads} must be 1 or more")
        torch.set_num_threads(num_threads)
