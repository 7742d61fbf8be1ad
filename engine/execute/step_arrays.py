"""A step's integers, laid out once for every executor, and the rule by which rows share units."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from sleb.engine.requests.request import Request
from sleb.engine.schedule.step import ScheduledRow

Integers = np.ndarray[Any, np.dtype[np.int32]]

NEVER = 1 << 30  # a depth that no chain reaches: of a unit that always stays
DepthRange = tuple[int, int]  # the first depth, and the one before which it ends


@lru_cache(maxsize=4096)
def unit_rows(depths: tuple[int, ...], unit_depths: tuple[DepthRange, ...]) -> tuple[array[int], array[int]]:
    """The prefix rule: which of a step's rows run each unit of a plan.

    Depths of one chain are nested, so a deeper tier runs a subset of the units of a shallower one. Rows are sorted by
    depth, fullest first; then for every unit the rows that run it are a prefix of the batch, and skipping costs a
    slice: no gather, no scatter, no grouping by model. The rest of the batch skips the unit, and a patch that stands in
    its place is for a range of depths: for a range of rows after that prefix.

    Args:
        depths: of the rows, ascending.
        unit_depths: of each unit, the depths whose rows run it.

    Returns: a unit each, the row where its rows begin, 0 for all but patches, and that before which they end. Both are
    shared with later steps of the same depths, so they must not be changed.
    """
    first, end = (array("i", [bisect_left(depths, each[side]) for each in unit_depths]) for side in (0, 1))
    return first, end


@dataclass(frozen=True)
class StepArrays:
    """The integers of a step, 32 bits each. T tokens, S sequences (rows), U units of the plan.

    Attributes:
        page_size: tokens in a page.
        depths: [S], ascending.
        token_ids: [T]; 0 for a pending token.
        positions: [T], the place of each token in its sequence.
        sources: [T], the place of a pending token in what was sampled last, −1 for a known one; None: none is pending.
        query_starts: [S + 1], where each sequence's tokens begin; the last one is T.
        context_lens: [S], tokens whose K and V are in the cache once this step's are stored.
        pages: those of each sequence, one sequence after another; page_starts: [S], where each one's begin.
        unit_starts, unit_rows: [U], from which to before which sequence run each unit; see `unit_rows`.
        long_context: whether the sequences, all of them, are past the original context: see `RotaryTables`.
    """

    page_size: int
    depths: tuple[int, ...]
    token_ids: array[int]
    positions: array[int]
    sources: array[int] | None
    query_starts: array[int]
    context_lens: array[int]
    pages: array[int]
    page_starts: array[int]
    unit_starts: array[int]
    unit_rows: array[int]
    long_context: bool = False

    @classmethod
    def of(
        cls,
        rows: Sequence[ScheduledRow],
        unit_depths: tuple[DepthRange, ...],
        page_size: int,
        sampled: Mapping[Request, int] | None = None,
    ) -> StepArrays:
        """The integers of `rows`, by ascending depth. sampled: each pending row's place in what was sampled last."""
        token_ids, positions, context_lens = array("i"), array("i"), array("i")
        query_starts, page_starts, pages = array("i", [0]), array("i"), array("i")
        pending: dict[int, int] = {}
        for row in rows:
            request, start, num_tokens = row.request, row.start, row.num_tokens
            if row.pending:
                assert sampled is not None, "a pending token, and nothing was sampled"
                pending[len(token_ids)] = sampled[request]
                token_ids.append(0)
                positions.append(start)
            elif num_tokens == 1:
                token_ids.append(request.tokens[start])
                positions.append(start)
            else:
                token_ids.extend(array("i", request.tokens[start : start + num_tokens]))
                positions.frombytes(np.arange(start, start + num_tokens, dtype=np.int32).tobytes())
            query_starts.append(len(token_ids))
            context_lens.append(start + num_tokens)
            page_starts.append(len(pages))
            # A list of thousands takes long to convert at every step, so each page is converted once.
            page_ids = request.page_ids
            if len(page_ids) < len(request.pages):
                page_ids.extend(request.pages[len(page_ids) :])
            pages.extend(page_ids)
        sources = None
        if pending:
            sources = array("i", [-1]) * len(token_ids)
            for at, place in pending.items():
                sources[at] = place
        depths = tuple([row.request.tier.depth for row in rows])
        return cls(
            page_size,
            depths,
            token_ids,
            positions,
            sources,
            query_starts,
            context_lens,
            pages,
            page_starts,
            *unit_rows(depths, unit_depths),
            rows[0].request.long_context,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.depths)

    @cached_property
    def query_lens(self) -> tuple[int, ...]:
        """[S], new tokens of each sequence."""
        return tuple(np.diff(self.query_starts).tolist())

    @cached_property
    def unit_tokens(self) -> array[int]:
        """[U], before which token those end that run each unit."""
        return array("i", [self.query_starts[end] for end in self.unit_rows])

    @cached_property
    def unit_first_tokens(self) -> array[int]:
        """[U], at which token those begin that run each unit."""
        return array("i", [self.query_starts[start] for start in self.unit_starts])

    @cached_property
    def slots(self) -> Integers:
        """[T], where in the cache K and V of each token go: page · page_size + offset."""
        positions, starts = np.asarray(self.positions), np.asarray(self.page_starts)
        page = np.repeat(starts, self.query_lens) + positions // self.page_size
        slots: Integers = np.asarray(self.pages)[page] * self.page_size + positions % self.page_size
        return slots

    @cached_property
    def page_table(self) -> Integers:
        """[S, most pages of a sequence], each sequence's pages and then zeros."""
        num_pages = np.diff(self.page_starts, append=len(self.pages))
        table = np.zeros((self.num_sequences, num_pages.max()), np.int32)
        table[np.arange(table.shape[1]) < num_pages[:, None]] = self.pages
        return table

    def pack(self, layout: StepLayout, padding_page: int) -> Integers:
        """All of it in one array, so that it reaches a device in one copy: the layout's sections, then `page_table`.

        padding_page: a page that belongs to nobody, for tokens and sequences that the layout has and the step has not.
        """
        flat = np.zeros(layout.size + self.page_table.size, np.int32)
        sections = np.split(flat[: layout.size], np.cumsum(layout.sizes)[:-1])
        (
            token_ids,
            positions,
            slots,
            sources,
            query_starts,
            context_lens,
            token_starts,
            token_counts,
            row_counts,
        ) = sections
        num_tokens, num_rows = self.num_tokens, self.num_sequences
        token_ids[:num_tokens] = self.token_ids
        positions[:num_tokens] = self.positions
        slots[:num_tokens] = self.slots
        slots[num_tokens:] = padding_page * self.page_size
        sources[:] = -1
        if self.sources is not None:
            sources[:num_tokens] = self.sources
        query_starts[: num_rows + 1] = self.query_starts
        query_starts[num_rows + 1 :] = np.arange(1, query_starts.size - num_rows) + num_tokens
        context_lens[:num_rows] = self.context_lens
        context_lens[num_rows:] = 1
        token_starts[:] = self.unit_first_tokens
        token_counts[:] = self.unit_tokens
        row_counts[:] = self.unit_rows
        flat[layout.size :] = self.page_table.ravel()
        return flat


@dataclass(frozen=True)
class StepLayout:
    """The sections of a packed step: how many tokens, sequences and units there is room for.

        section         length          of
        token_ids       T               tokens
        positions       T               tokens
        slots           T               tokens
        sources         T               tokens
        query_starts    S + 1           sequences
        context_lens    S               sequences
        token_starts    U               units: at which token those begin that run it
        token_counts    U               units: before which token they end
        row_counts      U               units: before which sequence

    The page table comes after them, so one layout for all decode steps keeps every section where a captured graph has
    seen it.
    """

    num_tokens: int
    num_sequences: int
    num_units: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the sections."""
        tokens, sequences, units = self.num_tokens, self.num_sequences, self.num_units
        return (tokens, tokens, tokens, tokens, sequences + 1, sequences, units, units, units)

    @property
    def size(self) -> int:
        """Length of all of them."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> StepTensors:
        """The sections of a flat int32 tensor, as views."""
        return StepTensors(*flat[: self.size].split(self.sizes))


@dataclass(frozen=True)
class StepTensors:
    """The sections on the device; see `StepLayout`."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sources: Tensor
    query_starts: Tensor
    context_lens: Tensor
    token_starts: Tensor
    token_counts: Tensor
    row_counts: Tensor
