"""A step's integers, laid out once for every executor, and the rule by which rows share units."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain
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

    An executor reads the pages of each sequence, or keeps a page table [rows, width] on its device: then a sequence
    has a row of it from its admission until it ends or is preempted, given by the scheduler like the pages themselves,
    and a step brings the row's number and only the pages that are new there. Whoever applies the `new_pages` of all
    steps in order has the same table, on whatever device.

    Attributes:
        page_size: tokens in a page.
        depths: [S], ascending.
        token_ids: [T]; 0 for a pending token.
        positions: [T], the place of each token in its sequence.
        sources: [T], the place of a pending token in what was sampled last, −1 for a known one; None: none is pending.
        query_starts: [S + 1], where each sequence's tokens begin; the last one is T.
        context_lens: [S], tokens whose K and V are in the cache once this step's are stored.
        page_ids: [S], the pages of each sequence. Later steps append to the same arrays: to be read in this step.
        table_rows: [S], each sequence's row of a page table.
        new_pages: (row of the table, place in it of the first, pages) for each sequence that has got some. What the
            row had before is void from the first of a new sequence on, and never read.
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
    page_ids: Sequence[array[int]]
    table_rows: array[int]
    new_pages: Sequence[tuple[int, int, array[int]]]
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
        """The integers of `rows`, by ascending depth. sampled: each pending row's place in what was sampled last.

        Requests that no scheduler has admitted have the table's rows in their order here, and all pages are new.
        """
        requests = [row.request for row in rows]
        starts, lens = [row.start for row in rows], [row.num_tokens for row in rows]
        query_starts = array("i", accumulate(lens, initial=0))
        if query_starts[-1] == len(rows):
            positions = array("i", starts)
            token_ids = array("i", [0 if row.pending else row.request.tokens[row.start] for row in rows])
        else:
            positions = array("i", chain.from_iterable([range(row.start, row.end) for row in rows]))
            known = [(0,) if row.pending else row.request.tokens[row.start : row.end] for row in rows]
            token_ids = array("i", chain.from_iterable(known))
        sources = None
        if any(row.pending for row in rows):
            assert sampled is not None, "a pending token, and nothing was sampled"
            places = [sampled[row.request] if row.pending else -1 for row in rows]
            if len(token_ids) == len(rows):
                sources = array("i", places)
            else:
                sources = array("i", np.repeat(np.array(places, np.int32), lens).tobytes())
        table_rows = array("i", range(len(rows)))
        new_pages = []
        for at, request in enumerate(requests):
            first, table_row = len(request.page_ids), request.table_row
            # A list of thousands takes long to convert at every step, so each page is converted once.
            if first < len(request.pages):
                request.page_ids.extend(request.pages[first:])
            if table_row is None:
                first = 0
            else:
                table_rows[at] = table_row
            if first < len(request.pages):
                new_pages.append((table_rows[at], first, request.page_ids[first:]))
        depths = tuple([request.tier.depth for request in requests])
        return cls(
            page_size,
            depths,
            token_ids,
            positions,
            sources,
            query_starts,
            array("i", [row.end for row in rows]),
            [request.page_ids for request in requests],
            table_rows,
            new_pages,
            *unit_rows(depths, unit_depths),
            requests[0].long_context,
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
        return self._tokens_at(self.unit_rows)

    @cached_property
    def unit_first_tokens(self) -> array[int]:
        """[U], at which token those begin that run each unit."""
        return self._tokens_at(self.unit_starts)

    def _tokens_at(self, rows: array[int]) -> array[int]:
        if self.num_tokens == self.num_sequences:
            return rows
        return array("i", [self.query_starts[row] for row in rows])

    @cached_property
    def pages(self) -> array[int]:
        """The pages of each sequence, one sequence after another."""
        return array("i", b"".join(self.page_ids))

    @cached_property
    def page_starts(self) -> array[int]:
        """[S], where the pages of each sequence begin in `pages`."""
        return array("i", accumulate([len(ids) for ids in self.page_ids[:-1]], initial=0))

    @cached_property
    def slots(self) -> array[int]:
        """[T], where in the cache K and V of each token go: page · page_size + offset."""
        size = self.page_size
        if self.num_tokens == self.num_sequences:
            places = zip(self.page_ids, self.positions, strict=True)
            return array("i", [ids[at // size] * size + at % size for ids, at in places])
        slots = array("i")
        for ids, end, num_tokens in zip(self.page_ids, self.context_lens, self.query_lens, strict=True):
            if num_tokens == 1:
                slots.append(ids[(end - 1) // size] * size + (end - 1) % size)
                continue
            first, last = (end - num_tokens) // size, (end - 1) // size
            of_pages = np.array(ids[first : last + 1])[:, None] * size + np.arange(size, dtype=np.int32)
            at = end - num_tokens - first * size
            slots.frombytes(of_pages.ravel()[at : at + num_tokens].tobytes())
        return slots

    @cached_property
    def page_table(self) -> Integers:
        """[S, most pages of a sequence], each sequence's pages and then zeros."""
        table = np.zeros((self.num_sequences, max(map(len, self.page_ids))), np.int32)
        for row, ids in zip(table, self.page_ids, strict=True):
            row[: len(ids)] = ids
        return table

    def pack(
        self, layout: StepLayout, padding_page: int, samples: Sequence[int], table_width: int
    ) -> Integers:
        """All of it in one array, so that it reaches a device in one copy: the layout's sections, then the places of
        the new pages in a table of rows of `table_width`, one row after another, and then those pages.

        padding_page: a page that belongs to nobody, for tokens and sequences that the layout has and the step has not.
        samples: the tokens to sample from, at most as many as the layout has sequences.
        """
        spare, free = layout.num_tokens - self.num_tokens, layout.num_sequences - self.num_sequences
        zero, none = array("i", [0]), array("i", [-1])
        after = self.num_tokens + 1  # padding sequences have a token each, past those that are there
        flat = self.token_ids + zero * spare
        flat += self.positions + zero * spare
        flat += self.slots + array("i", [padding_page * self.page_size]) * spare
        flat += none * layout.num_tokens if self.sources is None else self.sources + none * spare
        flat += self.query_starts + array("i", range(after, after + free))
        flat += self.context_lens + array("i", [1]) * free
        flat += self.table_rows + zero * free
        flat += array("i", samples) + zero * (layout.num_sequences - len(samples))
        flat += self.unit_first_tokens + self.unit_tokens + self.unit_rows
        for row, first, ids in self.new_pages:
            start = row * table_width + first
            flat.extend(range(start, start + len(ids)))
        for _, _, ids in self.new_pages:
            flat += ids
        return np.frombuffer(flat, np.int32)


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
        table_rows      S               sequences
        samples         S               tokens that are sampled from
        token_starts    U               units: at which token those begin that run it
        token_counts    U               units: before which token they end
        row_counts      U               units: before which sequence

    New pages come after them, so one layout for all captured steps keeps every section where a graph has seen it.
    """

    num_tokens: int
    num_sequences: int
    num_units: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the sections."""
        tokens, sequences, units = self.num_tokens, self.num_sequences, self.num_units
        return (*[tokens] * 4, sequences + 1, *[sequences] * 3, *[units] * 3)

    @cached_property
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
    table_rows: Tensor
    samples: Tensor
    token_starts: Tensor
    token_counts: Tensor
    row_counts: Tensor
