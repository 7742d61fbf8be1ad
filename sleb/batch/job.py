"""A batch in one process: two blocks under way at a time, so that the engine's own batch does not run empty."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sleb.batch.answering import Answerer, open_answerer
from sleb.batch.folder import write_block
from sleb.batch.lines import Ask, LineReader
from sleb.batch.options import BatchOptions
from sleb.batch.sources import Block, Source, read_block
from sleb.errors import SlebError

if TYPE_CHECKING:
    from sleb.engine.engine import Engine

NUM_UNDER_WAY = 2  # blocks
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

OnRow = Callable[[Answerer], None]


class Stopped(Exception):  # noqa: N818
    """A signal ended the job; `number` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def answer_all(
    engine: Engine,
    max_num_seqs: int,
    options: BatchOptions,
    source: Source,
    blocks: Sequence[Block],
    folder: Path,
    on_row: OnRow,
) -> None:
    """Answers `blocks` into files of `folder`.

    on_row: called when a row is answered. Raises Stopped on SIGINT or SIGTERM, EngineDeadError, and ConfigError for an
    input that changed or a disk that refuses.
    """

    async def run() -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        stopped: list[int] = []

        def stop(number: int) -> None:
            stopped.append(number)
            for each in _SIGNALS:
                loop.remove_signal_handler(each)  # a second one ends the process at once
            task.cancel()

        for number in _SIGNALS:
            loop.add_signal_handler(number, stop, number)
        try:
            async with open_answerer(engine, max_num_seqs, options) as answerer:
                await _answer_blocks(answerer, source, LineReader(options), blocks, folder, on_row)
        except* SlebError as errors:
            raise _first(errors) from None
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
            if stopped:
                raise Stopped(stopped[0])

    asyncio.run(run())


async def _answer_blocks(
    answerer: Answerer,
    source: Source,
    reader: LineReader,
    blocks: Sequence[Block],
    folder: Path,
    on_row: OnRow,
) -> None:
    waiting = iter(blocks)
    lock = asyncio.Lock()  # a source is read from one place at a time

    async def lane() -> None:
        for block in waiting:
            async with lock:
                asks = await asyncio.to_thread(read_asks, source, reader, block)
            rows = await answerer.answer(block, asks, lambda: on_row(answerer))
            await asyncio.to_thread(write_block, folder, block, rows)

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_UNDER_WAY):
            group.create_task(lane())


def read_asks(source: Source, reader: LineReader, block: Block) -> list[Ask]:
    """What the lines of a block ask. Raises ConfigError if they are not those any more."""
    return [reader.read(row.number, row.text) for row in read_block(source, block)]


def _first(errors: BaseExceptionGroup[SlebError]) -> SlebError:
    """One of those that ended the job, out of the groups of its tasks."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SlebError)
    return error
