"""What `prune` can be asked, and what is wrong with it before any work is done: importing this takes no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from pathlib import Path

from sleb.engine.config import EngineConfig
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.patches import Form
from sleb.options import check_values, option, option_of

DTYPES = ("float32", "bfloat16", "float16")
RUNTIMES = ("engine", "transformers")
DEFAULT_REMOVE = "20%"
DEFAULT_RANK = 64
_WHAT, _TEXT, _HOW, _COMPUTE, _PATCH = "What to remove", "Calibration", "Search", "Compute", "Patches"


class TextOptions:
    """What options that name texts have in common."""

    calibration: str | Path
    sampler: str
    seqlen: int | None
    windows: int | None
    seed: int | None
    dtype: str
    device: str
    held_out: Sequence[str | Path]

    def __post_init__(self) -> None:
        if self.held_out is None or isinstance(
            self.held_out, str | Path
        ):  # one text need not be a list in Python
            object.__setattr__(self, "held_out", () if self.held_out is None else (self.held_out,))

    def check_texts(self) -> None:
        """ConfigError for what can be seen of them before a model is loaded."""
        from sleb.pruning.calibration import check_options  # imports torch: last

        check_options(self.calibration, self.sampler, self.seqlen, self.windows, self.seed)
        for text in self.held_out:
            check_options(text, "packed", self.seqlen, None, None)


@dataclass(frozen=True)
class PruneOptions(TextOptions):
    """What to search for, on what, and where it goes: the arguments of `prune`, and of `sleb prune`.

    Attributes:
        output: file that gets the map after each round; None: nowhere.
        batch_windows: windows that run at once; None: as many as fit the search's memory bound.
    """

    remove: int | str | None = option(
        None,
        "How many units: 6, or a share like 20%.",
        unset="20%; with a target, as many as it needs",
        metavar="N",
        group=_WHAT,
    )
    calibration: str | Path = option(
        "wikitext2",
        "wikitext2, c4, a text file, a column of texts or conversations (data.jsonl:text, data.parquet:messages), self "
        "(the model writes it), or a mix with weights (wiki.txt=0.7,self=0.3).",
        group=_TEXT,
    )
    output: str | os.PathLike[str] | None = None
    depth: int | None = option(
        None, "Depth that the map recommends.", unset="all removed", minimum=0, group=_WHAT
    )
    sampler: str = option(
        "packed",
        "packed: the text cut into windows; rows: the paper's.",
        choices=("packed", "rows"),
        group=_TEXT,
    )
    seqlen: int | None = option(
        None, "Tokens a window.", unset="2048, or the model's context", minimum=2, group=_TEXT
    )
    windows: int | None = option(None, "Number of windows.", unset="up to 128", minimum=1, group=_TEXT)
    seed: int | None = option(
        None,
        "Shuffle the windows, or the rows.",
        unset="not shuffled; rows, self: 0",
        minimum=0,
        group=_TEXT,
    )
    dtype: str = option_of(
        EngineConfig, "dtype", "float32", help="Of the search.", choices=DTYPES, aliases=(), group=_COMPUTE
    )
    device: str = option_of(EngineConfig, "device", group=_COMPUTE)
    patch: str | None = option(
        None,
        "What stands where units were removed, fitted to every second calibration window before a candidate is judged "
        "on the others: nothing (the paper), a scale of each channel, or a linear map, of rank R (64) or full.",
        metavar="none|scale|low-rank[=R]|full",
        unset="full; with --runtime transformers, none",
        group=_HOW,
    )
    objective: str | None = option(
        None,
        "What a candidate is judged by: the loss (the paper), or the divergence from the dense model's distributions.",
        choices=("loss", "kl"),
        unset="loss; with patches, kl",
        group=_HOW,
    )
    held_out: Sequence[str | Path] = option(
        (),
        "Another text: its loss is told too, since the calibration text flatters; repeatable.",
        unset="none",
        group=_TEXT,
    )
    target_speedup: float | None = option(
        None,
        "Recommend the shallowest depth that is predicted to be so many times as fast, as 1.25.",
        unset="none",
        above=1,
        group=_WHAT,
    )
    max_perplexity_increase: float | str | None = option(
        None,
        "Recommend the deepest depth, up to the target, that raises the perplexity (of every held-out text, if there "
        "are any) by no more than 5% or 0.05.",
        unset="any",
        metavar="X",
        group=_WHAT,
    )
    cost: str | None = option(
        None,
        "Weigh the added loss by what a removal saves.",
        choices=("params", "latency", "kv"),
        unset="not weighed",
        group=_HOW,
    )
    speedup: bool = option(False, "Measure this machine and predict the speedup of every depth.", group=_HOW)
    speedup_batch: int = option(1, "Requests at once, for the predicted speedup.", minimum=1, group=_HOW)
    units: str = option(
        "blocks",
        "sublayers: attention and MLP apart; attention: alone.",
        choices=("blocks", "sublayers", "attention"),
        group=_WHAT,
    )
    mode: str = option(
        "exact",
        "exact: the paper's algorithm; fast: fewer candidates.",
        choices=("exact", "fast"),
        group=_HOW,
    )
    screen: str = option("race", "How fast finds its candidates.", choices=("race", "gradient"), group=_HOW)
    batch_windows: int | None = None
    resume: bool = option(False, "Go on with the map in --output.")
    force: bool = option(False, "Replace the map in --output.")
    threads: int | None = option_of(EngineConfig, "threads", unset="torch's choice", group=_COMPUTE)
    runtime: str = option(
        "engine",
        "What runs the model: sleb's engine, or transformers' own modules, for architectures that the engine does not "
        "know; such a map is for `sleb export`.",
        choices=RUNTIMES,
        group=_COMPUTE,
    )

    def check(self) -> None:
        """ConfigError for what can be seen without the model: a slip must not cost the time to load it."""
        check_values(self)
        EngineConfig("", device=self.device).check()
        if self.runtime == "transformers":
            self._check_transformers()
        if self.remove is not None:
            parse_remove(self.remove, 10**6)
        if self.max_perplexity_increase is not None:
            parse_increase(self.max_perplexity_increase)
        if self.depth is not None and self.has_target:
            raise ConfigError(
                "a depth to recommend and a target (speedup, perplexity) contradict each other: leave one out"
            )
        if self.cost == "kv" and self.units == "sublayers":
            raise ConfigError(
                "cost kv weighs by the KV cache, of which an MLP has none: "
                "take --units blocks or attention, or --cost latency"
            )
        patch = self.patch_form
        if self.search_mode == "gradient" and (self.search_objective != "loss" or patch is not None):
            raise ConfigError(
                "screen gradient says nothing of patches, nor of the divergence, which is flat at the dense model: "
                "take --screen race, or --patch none --objective loss"
            )
        if patch is not None and self.windows == 1:
            raise ConfigError(
                "patches are fitted on every second window and judged on the others: take --windows 2 or more, or "
                "--patch none"
            )
        if self.resume and self.output is None:
            raise ConfigError("resume needs the output file that it continues")
        self.check_texts()

    def _check_transformers(self) -> None:
        """ConfigError for what takes the engine."""
        from sleb.pruning.calibration import GENERATED, is_generated  # imports torch: last

        refused = {
            "--units other than blocks": self.units != "blocks",
            "patches, which the checkpoint that is exported from the map could not hold": self.patch_form
            is not None,
            "predicted speedups, which are the engine's": self.target_speedup is not None
            or self.cost == "latency",
            "--cost kv, since blocks of such models need not have a KV cache": self.cost == "kv",
            f"calibration {GENERATED}, which the engine writes": is_generated(self.calibration)
            or any(map(is_generated, self.held_out)),
        }
        for what, asked in refused.items():
            if asked:
                raise ConfigError(f"--runtime transformers does without {what}: leave that out")

    @property
    def has_target(self) -> bool:
        """Whether the recommended depth is chosen by a target."""
        return self.target_speedup is not None or self.max_perplexity_increase is not None

    @property
    def predicts_speedup(self) -> bool:
        """Whether a cost model is fitted."""
        asked = self.speedup or self.target_speedup is not None or self.cost == "latency"
        return asked and self.runtime == "engine"

    @property
    def search_objective(self) -> str:
        """What candidates are judged by: "loss" or "kl"."""
        return self.objective or ("loss" if self.patch_form is None else "kl")

    @property
    def patch_form(self) -> PatchForm | None:
        """Of the patches that the search fits; None: of none."""
        unset = "none" if self.runtime == "transformers" else "full"
        return parse_patch(unset if self.patch is None else self.patch)

    @property
    def search_mode(self) -> str:
        """The mode of `sleb.pruning.search`: "exact", or the screen of a fast search."""
        return "exact" if self.mode == "exact" else self.screen


@dataclass(frozen=True)
class PatchOptions(TextOptions):
    """Which patches to fit to a map, on what, and where it goes: the arguments of `patch`, and of `sleb patch`.

    Attributes:
        layer_map: the map, or its file. output: file that gets the map with its patches; None: nowhere.
    """

    layer_map: LayerMap | str | os.PathLike[str]
    patch: str = option(
        "full",
        f"scale: of each channel; low-rank=R, or low-rank (of {DEFAULT_RANK}); full: a matrix a run of removed units.",
        metavar="FORM",
        group=_PATCH,
    )
    depths: Sequence[int] | None = option(
        None,
        "Depths that get patches.",
        unset="all",
        minimum=1,
        group=_PATCH,
    )
    calibration: str | Path = option_of(PruneOptions, "calibration")
    output: str | os.PathLike[str] | None = None
    sampler: str = option_of(PruneOptions, "sampler")
    seqlen: int | None = option_of(PruneOptions, "seqlen")
    windows: int | None = option_of(PruneOptions, "windows")
    seed: int | None = option_of(PruneOptions, "seed")
    held_out: Sequence[str | Path] = option_of(PruneOptions, "held_out")
    dtype: str = option_of(PruneOptions, "dtype", help="Of the fit.")
    device: str = option_of(PruneOptions, "device")
    threads: int | None = option_of(PruneOptions, "threads")
    losses: bool = option(
        True,
        "Measure every depth with its patches and without, which takes longer than the fit.",
        group=_PATCH,
    )
    force: bool = option_of(PruneOptions, "force")

    def check(self) -> None:
        """ConfigError for what can be seen without the model."""
        if self.held_out and not self.losses:
            raise ConfigError(
                "held_out names a text to measure the losses of, which are not wanted: leave it out"
            )
        check_values(self)
        EngineConfig("", device=self.device).check()
        if parse_patch(self.patch) is None:
            raise ConfigError("patch none leaves nothing to fit: choose scale, low-rank, low-rank=R or full")
        self.check_texts()


@dataclass(frozen=True)
class PatchForm:
    """Of the patches that are fitted; rank: of low-rank ones."""

    form: Form
    rank: int | None = None

    def __str__(self) -> str:
        return self.form if self.rank is None else f"{self.form}={self.rank}"


def parse_patch(patch: str) -> PatchForm | None:
    """ "none", "scale", "full", "low-rank" (of `DEFAULT_RANK`) or "low-rank=16". Raises ConfigError for others."""
    form, equals, rank = str(patch).partition("=")
    if form == "low-rank" and (
        not equals or (rank.isascii() and rank.isdigit() and len(rank) < 8 and int(rank))
    ):
        return PatchForm("low-rank", int(rank) if equals else DEFAULT_RANK)
    forms: dict[str, PatchForm | None] = {
        "none": None,
        "full": PatchForm("full"),
        "scale": PatchForm("scale"),
    }
    if patch in forms:
        return forms[patch]
    raise ConfigError(f"patch {patch!r} is not known; choose none, scale, low-rank, low-rank=R or full")


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
        import torch

        torch.set_num_threads(num_threads)
