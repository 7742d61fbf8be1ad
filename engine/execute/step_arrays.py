"""A step's integers in one array, so that they reach the device in one copy.

    section         length          of
    token_ids       T               tokens; 0 where the token is pending
    positions       T               tokens
    slots           T               tokens: where K and V go
    sources         T               tokens: the place in what was sampled last of a pending token, else −1
    query_starts    S + 1           sequences
    context_lens    S               sequences
    token_counts    U               units: how many tokens run it
    row_counts      U               units: how many sequences do
    page_table      S × width       sequences

T tokens, S sequences, U units of the plan. All sections but the last have their size from the layout, so one layout
for all decode steps keeps every section where a captured graph has seen it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sleb.engine.execute.executor import LastSampled
from sleb.engine.requests.request import Request
from sleb.engine.schedule.step import Step

Array = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class StepLayout:
    """How many tokens, sequences and units there is room for."""

    num_tokens: int
    num_sequences: int
    num_units: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the sections before the page table."""
        tokens, sequences, units = self.num_tokens, self.num_sequences, self.num_units
        return (tokens, tokens, tokens, tokens, sequences + 1, sequences, units, units)

    @property
    def size(self) -> int:
        """Length of all of them."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> StepTensors:
        """The sections of a flat int32 tensor, as views."""
        return StepTensors(*flat[: self.size].split(self.sizes))


@dataclass(frozen=True)
class StepTensors:
    """The sections on the device; see the module's table."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sources: Tensor
    query_starts: Tensor
    context_lens: Tensor
    token_counts: Tensor
    row_counts: Tensor


class StepPacker:
    """Fills arrays for steps. removed_at: of each unit of the plan, the depth from which it is left out.

    padding_page: a page that belongs to nobody, for tokens and sequences that the layout has and the step has not.
    """

    def __init__(self, removed_at: Sequence[int], page_size: int, padding_page: int) -> None:
        self._removed_at = tuple(removed_at)
        self._page_size = page_size
        self._padding_page = padding_page

    def pack(self, step: Step, layout: StepLayout, last: LastSampled | None) -> tuple[Array, int]:
        """The flat array, and the width of its page table: the most pages of any sequence of the step."""
        rows = step.rows
        width = max(len(row.request.pages) for row in rows)
        flat = np.zeros(layout.size + len(rows) * width, dtype=np.int32)
        sections = np.split(flat[: layout.size], np.cumsum(layout.sizes)[:-1])
        token_ids, positions, slots, sources, query_starts, context_lens, token_counts, row_counts = sections
        table = flat[layout.size :].reshape(len(rows), width)
        num_rows, num_tokens = len(rows), step.num_tokens
        lens = np.fromiter((row.num_tokens for row in rows), dtype=np.int32, count=num_rows)
        starts = np.fromiter((row.start for row in rows), dtype=np.int32, count=num_rows)
        query_starts[1 : num_rows + 1] = np.cumsum(lens)
        query_starts[num_rows + 1 :] = np.arange(
            num_tokens + 1, num_tokens + 1 + layout.num_sequences - num_rows
        )
        context_lens[:num_rows] = starts + lens
        context_lens[num_rows:] = 1
        sources[:] = -1
        self._fill_tokens(step, token_ids, sources, last)
        for index, row in enumerate(rows):
            ids = _page_ids(row.request)
            table[index, : len(ids)] = ids
        owner = np.repeat(np.arange(num_rows), lens)
        own_positions = np.arange(num_tokens) - np.repeat(query_starts[:num_rows], lens) + starts[owner]
        positions[:num_tokens] = own_positions
        pages = table[owner, own_positions // self._page_size]
        slots[:num_tokens] = pages * self._page_size + own_positions % self._page_size
        slots[num_tokens:] = self._padding_page * self._page_size
        depths = [row.request.tier.depth for row in rows]
        row_counts[:] = [bisect_left(depths, removed_at) for removed_at in self._removed_at]
        token_counts[:] = query_starts[row_counts]
        return flat, width

    @staticmethod
    def _fill_tokens(step: Step, token_ids: Array, sources: Array, last: LastSampled | None) -> None:
        at = 0
        for row in step.rows:
            if row.pending:
                assert last is not None, "a pending token, and nothing was sampled"
                sources[at] = last.rows[row.request]
            elif row.num_tokens == 1:
                token_ids[at] = row.request.tokens[row.start]
            else:
                token_ids[at : at + row.num_tokens] = row.request.tokens[row.start : row.end]
            at += row.num_tokens


def _page_ids(request: Request) -> Array:
    """The request's pages, converted once each: a list of thousands takes long to convert at every step."""
    known = request.page_ids
    if len(known) < len(request.pages):
        known.extend(request.pages[len(known) :])
    return np.frombuffer(known, dtype=np.int32)
