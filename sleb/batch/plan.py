"""The input looked through once, before anything is loaded: its blocks, and what is wrong with it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from sleb.batch.lines import Ask, LineError, LineReader
from sleb.batch.sources import Block, Source, cut
from sleb.errors import ConfigError
from sleb.server.errors import shorten


@dataclass(frozen=True)
class Plan:
    """Blocks in the input's order. num_refused: lines that cannot be asked, of which `refusal` is the first."""

    blocks: tuple[Block, ...]
    num_lines: int
    num_refused: int
    refusal: str | None


def make_plan(
    source: Source,
    reader: LineReader,
    block_size: int,
    names: Collection[str],
    on_progress: Callable[[int], None] = lambda num_lines: None,
) -> Plan:
    """Cuts the input into blocks of at most `block_size` lines.

    names: those of the served tiers. on_progress: called with the lines that are read, a block at a time.

    Raises ConfigError for an id that is given twice, and for an input of which no line can be asked.
    """
    known = {name.lower() for name in names}
    blocks, num_lines, num_refused, refusal = list[Block](), 0, 0, None
    digests = array("Q")
    for block, rows in cut(source.rows(), block_size):
        blocks.append(block)
        num_lines += len(rows)
        for row in rows:
            ask = reader.read(row.number, row.text)
            if ask.custom_id is not None:
                digests.append(_digest(ask.custom_id))
            if (error := ask.error or _unknown_model(ask, known, names)) is not None:
                num_refused += 1
                refusal = refusal or f"line {row.number}: {error}"
        on_progress(num_lines)
    if not num_lines:
        raise ConfigError("the input has no line; write one request a line")
    if num_refused == num_lines:
        raise ConfigError(f"no line of the input can be answered; {refusal}")
    _check_ids(digests, source, reader)
    return Plan(tuple(blocks), num_lines, num_refused, refusal)


def _unknown_model(ask: Ask, known: Collection[str], names: Collection[str]) -> LineError | None:
    """Such a line gets the server's own answer, an error; it is looked for here because a whole file may have it."""
    if ask.model is None or ask.model.lower() in known:
        return None
    return LineError(
        "model_not_found", f"the model {shorten(ask.model)} does not exist; served models: {', '.join(names)}"
    )


def _digest(custom_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest(), "little")


def _check_ids(digests: array[int], source: Source, reader: LineReader) -> None:
    """Eight bytes an id; only where two of them agree are ids looked at, in a second pass."""
    values, counts = np.unique(np.frombuffer(digests, dtype=np.uint64), return_counts=True)
    doubtful = set(values[counts > 1].tolist())
    if not doubtful:
        return
    seen: dict[str, int] = {}
    for row in source.rows():
        custom_id = reader.read(row.number, row.text).custom_id
        if custom_id is None or _digest(custom_id) not in doubtful:
            continue
        if custom_id in seen:
            raise ConfigError(
                f"lines {seen[custom_id]} and {row.number} have the same custom_id, {shorten(custom_id)}; give each "
                "line its own, by which its answer is known"
            )
        seen[custom_id] = row.number
