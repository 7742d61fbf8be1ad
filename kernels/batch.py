"""What an attention kernel needs to know about the rows of one step: a plain record, built once a step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of one attention call, each with its new tokens and its pages.

    Tokens of a sequence are adjacent, sequences in the order of `page_table`'s rows. A slot is a position in
    the flat cache: `page * page_size + offset`.

    Attributes:
        query_lens: new tokens of each sequence, host integers, each at least 1; they sum to T.
        context_lens: tokens whose K and V are in the cache once this step's are stored, new ones included.
        page_table: [S, max_pages] int64, page numbers; past a sequence's last page the value is unspecified.
        page_size: tokens in a page.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    page_table: Tensor
    page_size: int

    @property
    def num_sequences(self) -> int:
        return len(self.query_lens)

    @cached_property
    def query_starts(self) -> tuple[int, ...]:
        """Index of each sequence's first token among the step's tokens; length S + 1, the last one is T."""
        starts = [0]
        for length in self.query_lens:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @cached_property
    def decode_rows(self) -> tuple[int, ...]:
        """Sequences with one new token: they can share one batched call."""
        return tuple(row for row, length in enumerate(self.query_lens) if length == 1)

    @cached_property
    def chunk_rows(self) -> tuple[int, ...]:
        """Sequences with several new tokens."""
        return tuple(row for row, length in enumerate(self.query_lens) if length > 1)

    def slots(self, row: int) -> Tensor:
        """[context_len] int64: the cache slots of one sequence's context, in order of position."""
        return self._chunk_slots[row]

    @cached_property
    def _chunk_slots(self) -> dict[int, Tensor]:
        return {row: self._row_slots(row) for row in self.chunk_rows}

    def _row_slots(self, row: int) -> Tensor:
        positions = torch.arange(self.context_lens[row], device=self.page_table.device)
        pages = self.page_table[row, positions // self.page_size]
        return pages * self.page_size + positions % self.page_size

    @cached_property
    def decode_lens(self) -> Tensor:
        """[D] int64: context lengths of the decode rows."""
        lens = [self.context_lens[row] for row in self.decode_rows]
        return torch.tensor(lens, device=self.page_table.device)

    @cached_property
    def decode_tokens(self) -> Tensor | slice:
        """Where the decode rows' tokens are among the step's tokens; a slice when they lead, so no copy is made."""
        if self.decode_rows == tuple(range(len(self.decode_rows))):
            return slice(0, len(self.decode_rows))
        starts = [self.query_starts[row] for row in self.decode_rows]
        return torch.tensor(starts, device=self.page_table.device)

    @cached_property
    def decode_slots(self) -> Tensor:
        """[D, L] int64: context slots of the decode rows, L the longest context.

        Places past a row's context hold the row's own first slot: what is masked is at least the row's own and
        finite, so a row never depends on what another one left in the cache.
        """
        lens = self.decode_lens
        positions = torch.arange(
            int(max(self.context_lens[row] for row in self.decode_rows)), device=lens.device
        )
        positions = torch.where(positions[None, :] < lens[:, None], positions[None, :], 0)
        rows = torch.tensor(self.decode_rows, device=lens.device)
        pages = self.page_table[rows[:, None], positions // self.page_size]
        return pages * self.page_size + positions % self.page_size


@dataclass(frozen=True)
class BatchTensors:
    """A batch as kernels read it on its device: nothing of it needs the host to know a length.

    Only the first num_rows[0] of the S sequences laid out are there; kernels read that number themselves, so that a
    captured launch follows it from step to step.

    Attributes:
        query_starts: [S + 1] int32, index of each sequence's first token among the step's.
        context_lens: [S] int32, tokens whose K and V are in the cache once this step's are stored.
        page_table: [R, width] int32, rows one after another at a stride of their own.
        table_rows: [S] int32, the row of page_table that holds a sequence's pages; past num_rows it is any row of it.
        num_rows: [1] int32, sequences that run the unit.
        page_size: tokens in a page.
        max_query_len, max_context_len: bounds that the host knows: of the new tokens and the context of a sequence.
        has_decodes: whether there may be sequences with one new token.
    """

    query_starts: Tensor
    context_lens: Tensor
    page_table: Tensor
    table_rows: Tensor
    num_rows: Tensor
    page_size: int
    max_query_len: int
    max_context_len: int
    has_decodes: bool = True

    @classmethod
    def of(cls, batch: PagedBatch, device: torch.device) -> BatchTensors:
        """The tensors of a batch whose lengths the host knows; all its sequences are there."""

        def integers(values: tuple[int, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return cls(
            integers(batch.query_starts),
            integers(batch.context_lens),
            batch.page_table.to(device, torch.int32),
            torch.arange(batch.num_sequences, dtype=torch.int32, device=device),
            integers((batch.num_sequences,)),
            batch.page_size,
            max(batch.query_lens, default=0),
            max(batch.context_lens, default=0),
            bool(batch.decode_rows),
        )

    def to_host(self) -> PagedBatch:
        """The batch with its lengths on the host, which waits for the device. Padding after its end is dropped."""
        num_rows = int(self.num_rows)
        starts = self.query_starts[: num_rows + 1].tolist()
        lens = self.context_lens[:num_rows].tolist()
        query_lens = tuple(end - start for start, end in itertools.pairwise(starts))
        return PagedBatch(query_lens, tuple(lens), self.gathered_table(num_rows).long(), self.page_size)

    def gathered_table(self, num_rows: int) -> Tensor:
        """[num_rows, width] int32: the pages of the first sequences, a copy, for kernels that know no table_rows."""
        return self.page_table.index_select(0, self.table_rows[:num_rows])
