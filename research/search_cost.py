"""How long a search takes, beside the authors' algorithm on the same kernels, and how often fast modes agree.

    python research/search_cost.py MODEL --calibration FILE

All run in one process and take turns round by round, in a shuffled order, so that what slows the machine down meets
them alike. "reference" is the authors' loop (github.com/jiwonsong-dev/SLEB, sleb.py): for each candidate the whole
model without it, over all windows, nothing shared and nothing abandoned; blocks only, in the first draw. Agreement is
counted over several draws of the calibration windows, each of which is searched exactly and in every fast mode.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from common import TextOptions, run, say, scoring_result, text_windows
from torch import Tensor

from sleb.benchmarks.record import Measurement
from sleb.benchmarks.stats import paired_ratio
from sleb.cli.bench.shared import OutputOptions
from sleb.cli.options import Model
from sleb.engine.model.scoring import DecoderScorer
from sleb.layer_map.units import Unit
from sleb.options import option, option_of
from sleb.pruning.options import PruneOptions
from sleb.pruning.search import (
    MODES,
    ScoringModel,
    SearchResult,
    SearchSettings,
    check_num_remove,
    search_rounds,
    total_loss,
)


@dataclass(frozen=True)
class Options(TextOptions):
    """What to search for, as sleb prune, and in how many draws of the windows."""

    remove: int = option(6, "How many units.", minimum=1)
    units: str = option_of(PruneOptions, "units")
    draws: int = option(5, "Draws of the windows, each searched exactly and fast.", minimum=1)
    seed: int = option(0, "Of the first draw, and of the order of the runs.")

    def of_draw(self, draw: int) -> PruneOptions:
        """The search of a draw as `sleb prune` would be asked for it."""
        return self.pruning(units=self.units, seed=self.seed + draw)

    def check(self) -> None:
        """ConfigError for what can be seen before the model is loaded."""
        self.of_draw(0).check()


@dataclass
class Run:
    """One search of one draw: how it goes on, its seconds, what it has found."""

    step: Callable[[], SearchResult]
    seconds: float = 0.0
    result: SearchResult = field(default_factory=SearchResult)


def reference(model: ScoringModel, windows: Tensor) -> Callable[[], SearchResult]:
    """The authors' loop over whole blocks: no state but what is removed."""
    removed: list[Unit] = []
    found: list[float] = []

    def step() -> SearchResult:
        alive = [unit for unit in map(Unit, range(model.num_blocks)) if unit not in removed]
        losses = {unit: total_loss(model, windows, "blocks", [*removed, unit]) for unit in alive[1:-1]}
        removed.append(min(losses, key=lambda unit: (losses[unit], unit)))
        found.append(losses[removed[-1]])
        return SearchResult(tuple(removed), tuple(found))

    return step


def run_draw(scorer: ScoringModel, windows: Tensor, options: Options, draw: int) -> dict[str, Run]:
    """One round of every search after the other, in a shuffled order, until all are done."""
    runs: dict[str, Run] = {}
    if not draw and options.units == "blocks":
        runs["reference"] = Run(reference(scorer, windows))
    for mode in MODES:
        settings = SearchSettings(units=options.units, mode=mode)
        rounds = search_rounds(scorer, windows, num_remove=options.remove, settings=settings)
        runs[mode] = Run(rounds.__next__)
    rng = random.Random(options.seed + draw)
    for number in range(options.remove):
        for mode in rng.sample(list(runs), len(runs)):
            say(f"draw {draw + 1} of {options.draws}, round {number + 1} of {options.remove}, {mode}")
            started = time.perf_counter()
            runs[mode].result = runs[mode].step()
            runs[mode].seconds += time.perf_counter() - started
    return runs


def measurements(draws: Sequence[dict[str, Run]]) -> list[Measurement]:
    """By mode: seconds of a search, the ratio over the reference in the same draws, and agreement with exact."""
    found = []
    for mode in dict.fromkeys(mode for runs in draws for mode in runs):
        own = [runs for runs in draws if mode in runs]
        seconds = [runs[mode].seconds for runs in own]
        pairs = [(runs[mode].result, runs["exact"].result) for runs in own]
        num_rounds = sum(len(exact.removed) for _, exact in pairs)
        same_round = sum(
            a == b for one, exact in pairs for a, b in zip(one.removed, exact.removed, strict=True)
        )
        same_set = sum(len(set(one.removed) & set(exact.removed)) for one, exact in pairs)
        facts = {
            "over exact": median(runs["exact"].seconds / runs[mode].seconds for runs in own),
            "same round": same_round / num_rounds,
            "same blocks": same_set / num_rounds,
            "loss over exact's": median(one.losses[-1] / exact.losses[-1] for one, exact in pairs),
            "removed": [list(map(str, one.removed)) for one, _ in pairs],
        }
        ratios = [runs["reference"].seconds / runs[mode].seconds for runs in own if "reference" in runs]
        ratio = paired_ratio(ratios) if ratios and mode != "reference" else None
        spread = (min(seconds), max(seconds))
        found.append(Measurement("search", mode, "seconds", median(seconds), spread, ratio, facts))
    return found


def main(model: Model, options: Options, output: OutputOptions) -> None:
    """Measure the search, exact and fast, beside the authors' algorithm. Ctrl-C reports the draws that are complete."""
    scorer = DecoderScorer.load(model, dtype=options.dtype, device=options.device)
    check_num_remove(options.remove, scorer.num_blocks, options.units)
    draws: list[dict[str, Run]] = []
    complete = True
    try:
        for draw in range(options.draws):
            [windows] = text_windows(model, scorer, options.of_draw(draw))
            draws.append(run_draw(scorer, windows, options, draw))
    except KeyboardInterrupt:
        complete = False
    output.show(scoring_result("search", model, scorer, options, measurements(draws), complete))


if __name__ == "__main__":
    run(main)
