"""A batch in one process: two blocks under way at a time, so that the engine's own batch does not run empty."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sleb.batch.answering import Answerer, open_answerer
from sleb.batch.folder import write_block
from sleb.batch.lines import LineReader, read_asks
from sleb.batch.options import BatchOptions
from sleb.batch.progress import NUM_UNDER_WAY, SIGNALS, OnProgress, Progress, Stopped, first_error
from sleb.batch.sources import Block, Source
from sleb.errors import SlebError

if TYPE_CHECKING:
    from sleb.engine.engine import Engine


def answer_all(
    engine: Engine,
    max_num_seqs: int,
    options: BatchOptions,
    source: Source,
    blocks: Sequence[Block],
    folder: Path,
    on_progress: OnProgress,
) -> None:
    """Answers `blocks` into files of `folder`.

    on_progress: called when a line is answered. Raises Stopped on SIGINT or SIGTERM, EngineDeadError, and ConfigError
    for an input that changed or a disk that refuses.
    """

    async def run() -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        stopped: list[int] = []

        def stop(number: int) -> None:
            stopped.append(number)
            for each in SIGNALS:
                loop.remove_signal_handler(each)  # a second one ends the process at once
            task.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)
        try:
            async with open_answerer(engine, max_num_seqs, options) as answerer:
                await _answer_blocks(answerer, source, LineReader(options), blocks, folder, on_progress)
        except* SlebError as errors:
            raise first_error(errors) from None
        finally:
            for number in SIGNALS:
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
    on_progress: OnProgress,
) -> None:
    waiting = iter(blocks)
    num_lines = itertools.count(1)
    lock = asyncio.Lock()  # a source is read from one place at a time

    def tell() -> None:
        tokens = answerer.num_output_tokens
        on_progress(Progress(next(num_lines), answerer.num_errors, tokens))

    async def lane() -> None:
        for block in waiting:
            async with lock:
                asks = await asyncio.to_thread(read_asks, source, reader, block)
            rows = await answerer.answer(block, asks, tell)
            await asyncio.to_thread(write_block, folder, block, rows)

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_UNDER_WAY):
            group.create_task(lane())
