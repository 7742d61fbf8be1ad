"""How long a search takes, beside the authors' algorithm on the same kernels, and how often fast modes agree.

All run in one process and take turns round by round, in a shuffled order, so that what slows the machine down meets
them alike. "reference" is the authors' loop (github.com/jiwonsong-dev/SLEB, sleb.py): for each candidate the whole
model without it, over all windows, nothing shared and nothing abandoned. Agreement is counted over several draws of
the calibration windows, each of which is searched exactly and in every fast mode.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sleb.benchmarks.environment import describe_machine, shown_command
from sleb.benchmarks.report import widen
from sleb.engine.model.resolve import resolve_device
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError
from sleb.layer_map.units import Unit
from sleb.pruning.calibration import token_hash
from sleb.pruning.options import PruneOptions
from sleb.pruning.search import ScoringModel, SearchResult, SearchSettings, check_num_remove, search_rounds
from sleb.pruning.search.rounds import Evidence
from sleb.pruning.tokens import gather_tokens

FAST_MODES = ("race", "gradient")


@dataclass(frozen=True)
class SearchBenchOptions:
    """What to search: as PruneOptions, and in how many draws of `windows` windows each."""

    model: str
    calibration: str
    remove: int = 6
    units: str = "blocks"
    seqlen: int = 1024
    windows: int = 8
    draws: int = 5
    reference_draws: int = 1
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0

    def pruning(self, draw: int) -> PruneOptions:
        """The search of a draw as `sleb prune` would be asked for it."""
        return PruneOptions(
            calibration=self.calibration,
            units=self.units,
            seqlen=self.seqlen,
            windows=self.windows,
            seed=self.seed + draw,
            dtype=self.dtype,
            device=self.device,
        )

    def check(self) -> None:
        """ConfigError for what can be seen before the model is loaded."""
        self.pruning(0).check()
        if self.draws < 1 or not 0 <= self.reference_draws <= self.draws:
            raise ConfigError(
                f"{self.draws} draws with {self.reference_draws} of the reference cannot be run; "
                "ask for 1 draw or more, and for no more of the reference"
            )


class Steps(Protocol):
    """A search that goes round by round."""

    def step(self) -> None: ...
    @property
    def removed(self) -> tuple[Unit, ...]: ...
    @property
    def loss(self) -> float: ...


class OurSearch:
    """`sleb.pruning.search` in one mode."""

    def __init__(self, model: ScoringModel, windows: Tensor, options: SearchBenchOptions, mode: str) -> None:
        settings = SearchSettings(units=options.units, mode=mode)
        self._rounds = search_rounds(model, windows, num_remove=options.remove, settings=settings)
        self.result = SearchResult()

    def step(self) -> None:
        self.result = next(self._rounds)

    @property
    def removed(self) -> tuple[Unit, ...]:
        return self.result.removed

    @property
    def loss(self) -> float:
        return self.result.losses[-1]


class ReferenceSearch:
    """The authors' loop over whole blocks: no state but what is removed."""

    def __init__(self, model: ScoringModel, windows: Tensor) -> None:
        self._model, self._windows = model, windows
        self.removed: tuple[Unit, ...] = ()
        self.loss = 0.0

    @torch.no_grad()
    def step(self) -> None:
        alive = [unit for unit in map(Unit, range(self._model.num_blocks)) if unit not in self.removed]
        losses = {unit: self._loss([each for each in alive if each != unit]) for unit in alive[1:-1]}
        best = min(losses, key=lambda unit: (losses[unit], unit))
        self.removed, self.loss = (*self.removed, best), losses[best]

    def _loss(self, units: Sequence[Unit]) -> float:
        evidence = Evidence()
        for window in self._windows.split(1):
            hidden = self._model.embed(window)
            for unit in units:
                hidden = self._model.run(unit, hidden)
            evidence.add(self._model.token_losses(hidden, window))
        return evidence.total


@dataclass
class Run:
    """One search of one draw: seconds of each round, and what it found."""

    draw: int
    mode: str
    seconds: list[float] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    loss: float = 0.0
    passes: float | None = None
    evaluations: float | None = None


def run_search_bench(
    options: SearchBenchOptions,
    command: Sequence[str] = (),
    on_progress: Callable[[float, str], None] = lambda share, text: None,
) -> dict[str, Any]:
    """Loads the model, searches, and gives the result file; Ctrl-C keeps complete draws. Raises SlebError."""
    options.check()
    device = resolve_device(options.device)
    scorer = DecoderScorer.load(options.model, dtype=options.dtype, device=options.device)
    check_num_remove(options.remove, scorer.num_blocks, options.units)
    draws = [_windows(scorer, options, draw) for draw in range(options.draws)]
    runs: list[Run] = []
    complete = True
    try:
        for draw, windows in enumerate(draws):
            runs += _run_draw(scorer, windows, options, draw, on_progress)
    except KeyboardInterrupt:
        complete = False
    dtype: torch.dtype = getattr(torch, options.dtype)
    environment = describe_machine(device, dtype, "torch", shown_command(command, options.model))
    settings = {key: value for key, value in asdict(options).items() if key not in ("model", "calibration")}
    return {
        "kind": "search",
        "environment": environment,
        "model": scorer.model_name,
        "settings": settings | {"token_hashes": [token_hash(windows) for windows in draws]},
        "runs": [asdict(run) for run in runs],
        "summary": summarise(runs, options),
        "complete": complete,
    }


def _windows(scorer: DecoderScorer, options: SearchBenchOptions, draw: int) -> Tensor:
    asked = options.pruning(draw)
    nothing = {"note": lambda message: None, "on_generate": lambda share: None}
    return gather_tokens(options.model, scorer, asked, **nothing)[0].windows


def _run_draw(
    scorer: DecoderScorer,
    windows: Tensor,
    options: SearchBenchOptions,
    draw: int,
    on_progress: Callable[[float, str], None],
) -> list[Run]:
    """One round of every search after the other, in a shuffled order, until all are done."""
    searches: dict[str, Steps] = {
        mode: OurSearch(scorer, windows, options, mode) for mode in ("exact", *FAST_MODES)
    }
    if draw < options.reference_draws and options.units == "blocks":
        searches["reference"] = ReferenceSearch(scorer, windows)
    runs = {mode: Run(draw, mode) for mode in searches}
    rng = random.Random(options.seed + draw)
    for number in range(options.remove):
        for mode in rng.sample(list(searches), len(searches)):
            on_progress((draw + number / options.remove) / options.draws, f"draw {draw + 1}, {mode}")
            started = time.perf_counter()
            searches[mode].step()
            runs[mode].seconds.append(time.perf_counter() - started)
    for mode, steps in searches.items():
        runs[mode].removed, runs[mode].loss = list(map(str, steps.removed)), steps.loss
        if isinstance(steps, OurSearch):
            cost = steps.result.cost
            runs[mode].passes, runs[mode].evaluations = cost.num_passes, cost.num_evaluations
    return list(runs.values())


def summarise(runs: Sequence[Run], options: SearchBenchOptions) -> dict[str, Any]:
    """By mode: the speedup over the reference and over exact in the same draws, and agreement with exact."""
    by = {(run.draw, run.mode): run for run in runs}
    found: dict[str, Any] = {}
    for mode in dict.fromkeys(run.mode for run in runs):
        own = [run for run in runs if run.mode == mode]
        entry: dict[str, Any] = {"seconds": median(sum(run.seconds) for run in own)}
        entry["tokens_per_second"] = (
            median(run.evaluations / sum(run.seconds) for run in own if run.evaluations)
            * options.windows * options.seqlen
            if mode != "reference" else None
        )  # fmt: skip
        for base in ("reference", "exact"):
            ratios = [
                sum(by[run.draw, base].seconds) / sum(run.seconds) for run in own if (run.draw, base) in by
            ]
            entry[f"speedup_over_{base}"] = (
                {"median": median(ratios), "low": min(ratios), "high": max(ratios)} if ratios else None
            )
        entry["agreement"] = _agreement(
            [(run, by[run.draw, "exact"]) for run in own if (run.draw, "exact") in by]
        )
        found[mode] = entry
    return found


def _agreement(pairs: Sequence[tuple[Run, Run]]) -> dict[str, float]:
    """Shares over all draws: the same unit in the same round, in the same set; and how much more loss there is."""
    rounds = sum(len(exact.removed) for _, exact in pairs)
    same_round = sum(
        one == other for run, exact in pairs for one, other in zip(run.removed, exact.removed, strict=True)
    )
    same_set = sum(len(set(run.removed) & set(exact.removed)) for run, exact in pairs)
    return {
        "same_round": same_round / rounds,
        "same_set": same_set / rounds,
        "loss_ratio": median(run.loss / exact.loss for run, exact in pairs),
    }


def print_search(result: Mapping[str, Any], console: Console) -> None:
    """The summary as a table, and what its columns mean."""
    widen(console)
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("mode")
    for heading in (
        "seconds", "tokens/s", "over reference", "over exact", "same unit", "same set", "loss / exact",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for mode, found in result["summary"].items():
        rate, agreement = found["tokens_per_second"], found["agreement"]
        table.add_row(
            mode,
            f"{found['seconds']:.1f}",
            "" if rate is None else f"{rate:,.0f}",
            *(_ratio(found[f"speedup_over_{base}"]) for base in ("reference", "exact")),
            f"{agreement['same_round']:.0%}",
            f"{agreement['same_set']:.0%}",
            f"{agreement['loss_ratio']:.4f}",
        )
    console.print(table)
    console.print(
        "tokens/s: of calibration text, times the candidates computed on it. same unit: in the same round as exact; "
        "same set: in any round. loss: after the last round, median over the draws.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _ratio(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    shown = f"{found['median']:.2f}"
    return shown if found["low"] == found["high"] else f"{shown} ({found['low']:.2f}–{found['high']:.2f})"
