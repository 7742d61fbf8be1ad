"""`sleb batch`: many requests from a file, answered into a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn

from sleb.batch.folder import OutFolder
from sleb.batch.lines import LineReader
from sleb.batch.options import BatchOptions
from sleb.batch.plan import Plan, make_plan
from sleb.batch.pool import PoolJob, answer_in_pool, import_ray
from sleb.batch.progress import Progress, Stopped
from sleb.batch.sources import Block, Source, open_source
from sleb.cli.options import Model, with_options
from sleb.cli.progress import Bar, load_engine
from sleb.engine.config import EngineConfig
from sleb.errors import SlebError
from sleb.server.names import planned_names
from sleb.terminal import Console, tell

if TYPE_CHECKING:
    from sleb.engine.requests.tier import Tier

_SECONDS_BETWEEN_LINES = 30.0  # about progress, in a log
# What answers depend on, beside the lines, the tiers and the options of the batch.
_OF_ANSWERS = (
    *("model", "dtype", "weights", "kv_dtype", "chat_template", "load_format", "max_model_len", "seed"),
    *("generation_config", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("default_max_tokens", "end_loops"),
)


@with_options
def batch(
    model: Model,
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="JSON lines, or a Parquet file with --column.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder for the answers; it may be there.", show_default=False),
    ],
    *,
    engine: EngineConfig,
    options: BatchOptions,
) -> None:
    """Answer many requests from a file: OpenAI's batch lines, bodies of one endpoint, or a column of texts.

    The answers are rows of OpenAI's batch output, byte for byte what `sleb serve` would answer, in files of OUT:
    `cat OUT/*.jsonl` is in the order of IN. A request that fails is a row too. Ctrl-C stops; the same command again
    does what is missing.
    """
    names = planned_names(engine, options.names)
    lines = open_source(source, options)
    if options.workers is not None:
        import_ray()
    plan = _look_through(lines, options, list(names))
    with OutFolder(out, _job(engine, options, names)) as folder:
        for line in folder.tidy(plan.blocks):
            tell(line, "yellow")
        missing = [block for block in plan.blocks if not folder.has(block)]
        _introduce(plan, missing, out)
        if missing:
            _answer(engine, options, source, lines, missing, out)
    tell(f"All {plan.num_lines} lines are answered; in their order: cat {out}/*.jsonl")


def _job(engine: EngineConfig, options: BatchOptions, names: dict[str, Tier]) -> dict[str, str]:
    """What is noted in OUT: answers of two jobs do not go together."""
    job = {name: str(getattr(engine, name)) for name in _OF_ANSWERS}
    job |= {f"model {name}": tier.digest for name, tier in names.items()}
    shown = ("endpoint", "column", "body", "score", "max_line_mb", "block_size", "tool_format")
    return job | {name: str(getattr(options, name)) for name in shown}


def _look_through(source: Source, options: BatchOptions, names: list[str]) -> Plan:
    with Bar() as bar:
        reader = LineReader(options)
        return make_plan(
            source, reader, options.block_size, names, lambda done: bar.show(f"reading line {done}", 0, None)
        )


def _introduce(plan: Plan, missing: list[Block], out: Path) -> None:
    num_missing = sum(block.num_lines for block in missing)
    if num_missing < plan.num_lines:
        tell(f"{plan.num_lines - num_missing} of {plan.num_lines} lines are answered in {out} already.")
    if plan.num_refused:
        tell(f"{plan.num_refused} lines cannot be asked, and get an error: {plan.refusal}", "yellow")


def _answer(
    config: EngineConfig, options: BatchOptions, path: Path, source: Source, missing: list[Block], out: Path
) -> None:
    with BatchBar(sum(block.num_lines for block in missing)) as bar:
        try:
            if options.workers is None:
                _answer_here(config, options, source, missing, out, bar)
            else:
                job = PoolJob(config, options, path.resolve(), out.resolve())
                answer_in_pool(job, options.workers, missing, bar.advance)
        except (Stopped, SlebError) as error:
            done = [block for block in missing if (out / block.name).is_file()]
            tell(
                f"Stopped: {len(done)} of {len(missing)} files are done, {sum(each.num_lines for each in done)} "
                f"lines, in {out}; the same command does the rest."
            )
            if isinstance(error, Stopped):
                raise typer.Exit(128 + error.number) from None
            raise
    tell(bar.summary)


def _answer_here(
    config: EngineConfig,
    options: BatchOptions,
    source: Source,
    missing: list[Block],
    out: Path,
    bar: BatchBar,
) -> None:
    from sleb.batch.job import answer_all

    begin = time.monotonic()
    engine = load_engine(config)
    tell(f"Loaded in {time.monotonic() - begin:.1f} s. Computing with {engine.description}.")
    bar.begin()
    answer_all(engine, config.max_num_seqs, options, source, missing, out, bar.advance)


class BatchBar(Bar):
    """Of lines; where nobody sees a bar, a line every half minute."""

    def __init__(self, num_lines: int) -> None:
        super().__init__(BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._is_log = not Console(stderr=True).is_terminal
        self._num_lines, self._done = num_lines, Progress(0, 0, 0)
        self.begin()

    def begin(self) -> None:
        """From now on time counts."""
        self._begin = self._told = time.monotonic()

    def advance(self, progress: Progress) -> None:
        """Shows what is done now."""
        now, self._done = time.monotonic(), progress
        what = f"answered{self._errors}, {self._rate(now)}"
        self.show(what, progress.num_lines, self._num_lines)
        if self._is_log and now - self._told > _SECONDS_BETWEEN_LINES:
            self._told = now
            tell(f"{progress.num_lines} of {self._num_lines} lines {what}")

    @property
    def summary(self) -> str:
        """What was done, and how fast."""
        now = time.monotonic()
        return f"Answered {self._done.num_lines} lines{self._errors} in {now - self._begin:.1f} s, {self._rate(now)}."

    @property
    def _errors(self) -> str:
        return f" ({self._done.num_errors} errors)" if self._done.num_errors else ""

    def _rate(self, now: float) -> str:
        return f"{self._done.num_tokens / max(now - self._begin, 1e-9):.0f} tokens/s"
