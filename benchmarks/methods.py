"""Which blocks to remove: SLEB against simpler rules, at equal counts, on two texts and on answers.

    sleb         Algorithm 1, exact: one block at a time by the loss of the model without it
    one-shot     the same losses, of single removals, without iterating
    shortgpt     Block Influence (arXiv:2403.03853)
    run          the contiguous run of least angular distance (arXiv:2403.17887)
    last         the deepest blocks but the very last
    even         evenly spaced
    random       drawn, with several seeds

All rules see the same calibration windows; perplexity is told on them and on a text that took no part. Answers are
the engine's greedy ones to a few prompts (`sleb.benchmarks.quality.answers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sleb.benchmarks.environment import describe_machine, shown_command
from sleb.benchmarks.plots import plot_lines
from sleb.benchmarks.quality.answers import PROMPTS, GenerationQuality, generate_answers
from sleb.benchmarks.report import widen
from sleb.benchmarks.selection import (
    Choice,
    contiguous_run,
    evenly_spaced,
    last_blocks,
    one_shot,
    random_blocks,
    shortgpt,
)
from sleb.engine.llm import LLM
from sleb.engine.model.resolve import resolve_device
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.units import Unit
from sleb.pruning.options import PruneOptions
from sleb.pruning.search import SearchProgress, check_num_remove, search, total_loss
from sleb.pruning.tokens import gather_tokens

_ANSWER_TOKENS = 64
_MOST_TIMES_DENSE = 10  # of the plot's perplexities


@dataclass(frozen=True)
class MethodsOptions:
    """What to compare. layer_map: SLEB's order, searched for on the calibration windows where it is None."""

    model: str
    calibration: str
    held_out: str
    counts: Sequence[int] = (3, 6)
    layer_map: LayerMap | None = None
    seqlen: int = 1024
    windows: int = 8
    random_seeds: int = 3
    answers: bool = True
    dtype: str = "float32"
    device: str = "auto"

    def pruning(self) -> PruneOptions:
        """The search as `sleb prune` would be asked for it."""
        return PruneOptions(
            calibration=self.calibration,
            held_out=self.held_out,
            seqlen=self.seqlen,
            windows=self.windows,
            dtype=self.dtype,
            device=self.device,
        )

    def check(self) -> None:
        """ConfigError for what can be seen before the model is loaded."""
        self.pruning().check()
        if not self.counts or min(self.counts) < 1 or len(set(self.counts)) != len(self.counts):
            raise ConfigError(
                f"counts {list(self.counts)} must be different numbers of blocks, each 1 or more"
            )
        if self.random_seeds < 1:
            raise ConfigError(f"random seeds {self.random_seeds} must be 1 or more")


@dataclass(frozen=True)
class MethodRow:
    """What a method's choice of `count` blocks gives; seed: of a random one. count 0 is the dense model."""

    method: str
    seed: int | None
    count: int
    removed: list[int]
    perplexity: float | None
    held_out_perplexity: float | None
    answers: GenerationQuality | None = None


def run_methods(
    options: MethodsOptions,
    command: Sequence[str] = (),
    on_progress: Callable[[float, str], None] = lambda share, text: None,
) -> dict[str, Any]:
    """Loads the model, compares, and gives the result file. Raises SlebError; Ctrl-C keeps complete rows."""
    options.check()
    device = resolve_device(options.device)
    scorer = DecoderScorer.load(options.model, dtype=options.dtype, device=options.device)
    for count in options.counts:
        check_num_remove(count, scorer.num_blocks)
    nothing = {"note": lambda message: None, "on_generate": lambda share: None}
    seen, unseen = gather_tokens(options.model, scorer, options.pruning(), **nothing)
    assert unseen is not None
    texts = (seen.windows, unseen.windows)
    rows: list[MethodRow] = []
    complete = True
    try:
        _compare(scorer, options, texts, rows, on_progress)
        if options.answers:
            _answer(options, scorer.num_blocks, rows, on_progress)
    except KeyboardInterrupt:
        complete = False
    dtype: torch.dtype = getattr(torch, options.dtype)
    hidden = ("model", "layer_map", "calibration", "held_out")
    settings = {key: value for key, value in vars(options).items() if key not in hidden}
    return {
        "kind": "methods",
        "environment": describe_machine(device, dtype, "torch", shown_command(command, options.model)),
        "model": scorer.model_name,
        "settings": settings | {"num_windows": [len(each) for each in texts]},
        "rows": [asdict(row) for row in rows],
        "complete": complete,
    }


def _compare(
    scorer: DecoderScorer,
    options: MethodsOptions,
    texts: tuple[Tensor, Tensor],
    rows: list[MethodRow],
    on_progress: Callable[[float, str], None],
) -> None:
    most = max(options.counts)
    order, losses = _sleb_order(scorer, options, texts[0], most, on_progress)
    on_progress(0.5, "other rules")
    choices: list[tuple[str, int | None, Choice]] = [
        ("sleb", None, lambda count: order[:count]),
        ("one-shot", None, one_shot(scorer, texts[0], losses)),
        ("shortgpt", None, shortgpt(scorer, texts[0])),
        ("run", None, contiguous_run(scorer, texts[0])),
        ("last", None, last_blocks(scorer)),
        ("even", None, evenly_spaced(scorer)),
        *(("random", seed, random_blocks(scorer, seed)) for seed in range(options.random_seeds)),
    ]
    nothing: list[Unit] = []
    planned = [("dense", None, 0, nothing)] + [
        (name, seed, count, choose(count)) for count in options.counts for name, seed, choose in choices
    ]
    for done, (name, seed, count, units) in enumerate(planned):
        on_progress(0.6 + 0.2 * done / len(planned), f"{name}, {count} blocks")
        seen, unseen = (_perplexity(scorer, windows, units) for windows in texts)
        rows.append(MethodRow(name, seed, count, sorted(unit.block for unit in units), seen, unseen))


def _sleb_order(
    scorer: DecoderScorer,
    options: MethodsOptions,
    windows: Tensor,
    most: int,
    on_progress: Callable[[float, str], None],
) -> tuple[list[Unit], dict[Unit, float]]:
    """SLEB's order, and what its first round knows of single removals."""
    if options.layer_map is not None:
        options.layer_map.check_model(num_blocks=scorer.num_blocks, fingerprint=scorer.fingerprint)
        order = [unit for unit in options.layer_map.removed if unit.part == "block"]
        if len(order) < most:
            raise ConfigError(
                f"the layer map removes {len(order)} blocks, fewer than {most}: "
                "take a longer one, or leave it out to search"
            )
        return order, {}

    def progress(at: SearchProgress) -> None:
        on_progress(0.5 * at.share, f"search, round {at.round} of {at.num_rounds}")

    result = search(scorer, windows, num_remove=most, progress=progress)
    return list(result.removed), dict(result.candidate_losses[0])


def _perplexity(scorer: DecoderScorer, windows: Tensor, units: Sequence[Unit]) -> float | None:
    mean = total_loss(scorer, windows, "blocks", units) / windows.numel()
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else None


def _answer(
    options: MethodsOptions,
    num_blocks: int,
    rows: list[MethodRow],
    on_progress: Callable[[float, str], None],
) -> None:
    """Adds the answers' quality. Choices are not nested, so each has an engine of its own, with the dense model."""
    for place, row in enumerate(rows):
        on_progress(0.8 + 0.2 * place / len(rows), f"answers, {row.method}, {row.count} blocks")
        removed = tuple(map(Unit, row.removed))
        layer_map = LayerMap("compared", None, num_blocks, removed)
        depths = (0, row.count) if row.count else (0,)
        llm = LLM(options.model, layer_map, depths, dtype=options.dtype, device=options.device)
        *_, quality = generate_answers(llm, PROMPTS, depths, _ANSWER_TOKENS)
        rows[place] = replace(row, answers=quality)


def print_methods(result: Mapping[str, Any], console: Console) -> None:
    """A table, best held-out perplexity first within each count, random ones by their median."""
    widen(console)
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("blocks", "method", "removed"):
        table.add_column(heading)
    answered = any(row["answers"] for row in result["rows"])
    for heading in (
        "calibration",
        "held out",
        *(("loops", "stops early", "same as dense") if answered else ()),
    ):
        table.add_column(heading, justify="right")
    count = 0
    for row in sorted(result["rows"], key=_rank):
        if row["count"] != count:
            table.add_section()
            count = row["count"]
        name = row["method"] if row["seed"] is None else f"{row['method']} {row['seed']}"
        cells = [_number(row[key]) for key in ("perplexity", "held_out_perplexity")]
        if answered:
            answers = row["answers"] or {}
            cells += [_share(answers.get(key)) for key in ("looped", "early", "identical")]
        table.add_row(str(row["count"]), name, ", ".join(map(str, row["removed"])), *cells)
    console.print(table)
    console.print(
        "calibration, held out: perplexity of the two texts. loops: answers that end in a repeated piece; "
        "stops early: empty, or a quarter of the dense answer.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _rank(row: Mapping[str, Any]) -> tuple[int, float]:
    perplexity = row["held_out_perplexity"]
    return row["count"], math.inf if perplexity is None else perplexity


def _number(value: float | None) -> str:
    return "over 1e304" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def plot_methods(result: Mapping[str, Any], stem: Path) -> None:
    """Held-out perplexity against the number of blocks, one line a method; random is its median.

    What is far above the dense model's is left out, and its method's name says so: it would flatten all else.
    """
    rows = result["rows"]
    [dense] = [row["held_out_perplexity"] for row in rows if row["count"] == 0]
    lines: dict[str, list[tuple[float, float]]] = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["count"]):
        points = [(0.0, dense)]
        for count in sorted({row["count"] for row in rows if row["count"]}):
            found = [
                row["held_out_perplexity"]
                for row in rows
                if row["method"] == method and row["count"] == count
            ]
            value = math.inf if None in found else median(found)
            if value <= _MOST_TIMES_DENSE * dense:
                points.append((float(count), value))
        complete = len(points) == 1 + len({row["count"] for row in rows if row["count"]})
        lines[method if complete else f"{method} (leaves the plot)"] = points
    plot_lines(
        stem,
        lines,
        title=f"{result['model']}: which blocks to remove",
        x_label="blocks removed",
        y_label="perplexity of a held-out text (log)",
        log_y=True,
    )
