"""What the scripts share: a command from options, and texts as `sleb prune` reads them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import typer
from torch import Tensor

from sleb.benchmarks.environment import describe_machine, shown_command
from sleb.benchmarks.record import Measurement, Result
from sleb.cli.options import OptionsCommand, with_options
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import SlebError
from sleb.options import option_of
from sleb.pruning.options import PruneOptions
from sleb.pruning.tokens import gather_tokens


def run(function: Callable[..., None]) -> None:
    """Runs `function`, of a model and options, as a command: an error that a user can mend is a line and status 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=OptionsCommand)(with_options(function))
    try:
        app()
    except SlebError as error:
        typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        sys.exit(2)


def say(text: str) -> None:
    """What is done meanwhile, on standard error."""
    typer.echo(text, err=True)


@dataclass(frozen=True)
class TextOptions:
    """The text that choices are made on, and how they are computed."""

    calibration: str = option_of(PruneOptions, "calibration")
    seqlen: int = option_of(PruneOptions, "seqlen", 1024)
    windows: int = option_of(PruneOptions, "windows", 8)
    dtype: str = option_of(PruneOptions, "dtype")
    device: str = option_of(PruneOptions, "device")

    def pruning(self, **more: Any) -> PruneOptions:
        """As `sleb prune` would be asked."""
        return PruneOptions(**{each.name: getattr(self, each.name) for each in fields(TextOptions)}, **more)


def text_windows(model: str, scorer: DecoderScorer, asked: PruneOptions) -> list[Tensor]:
    """Windows [W, L] of the calibration text, and of each held-out one. Raises ConfigError."""
    tokens, held_out = gather_tokens(model, scorer, asked, note=say, on_generate=lambda share: None)
    return [each.windows for each in (tokens, *held_out)]


def scoring_result(
    kind: str, model: str, scorer: DecoderScorer, options: Any, found: list[Measurement], complete: bool
) -> Result:
    """The result of a script that computes losses."""
    environment = describe_machine(scorer.device, scorer.dtype, "torch", shown_command(sys.argv, model))
    shown = {name: value for name, value in vars(options).items() if name not in ("calibration", "held_out")}
    settings = {"model": scorer.model_name, **shown}
    return Result(kind, environment, settings, found, complete=complete)
