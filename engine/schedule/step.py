"""One forward pass: the scheduler's plan for it, and its tensors.

The prefix rule. Depths of one chain are nested, so a deeper tier runs a subset of the units of a shallower one.
Rows are sorted by depth, fullest first; then for every unit the rows that run it are a contiguous prefix of
the batch, and skipping costs a slice: no gather, no scatter, no grouping by model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sleb.engine.requests.request import Request
from sleb.kernels.batch import PagedBatch


@dataclass(frozen=True)
class ScheduledRow:
    """`num_tokens` tokens of a request, from position `start` on.

    Attributes:
        pending: the row's one token has been sampled by the step before and is known on the device alone.
        samples: whether the row reaches the request's last token, so that a next one is chosen.
    """

    request: Request
    start: int
    num_tokens: int
    pending: bool = field(init=False)
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        num_known = len(self.request.tokens)
        object.__setattr__(self, "pending", self.start >= num_known)
        object.__setattr__(self, "samples", self.end == num_known + self.request.num_pending)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def chooses(self) -> bool:
        """Whether a token is sampled: not where only the prompt was to be computed."""
        return self.samples and self.request.max_tokens > 0


@dataclass(frozen=True)
class Step:
    """The scheduler's plan for one forward: rows by ascending depth."""

    rows: Sequence[ScheduledRow]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True)
class Prefix:
    """The leading rows that run some unit: how many tokens they are, and what attention needs to know of them."""

    num_tokens: int
    batch: PagedBatch


class StepInput:
    """The tensors of a step.

    Attributes:
        token_ids, positions, slots: [T] int64; the cache slot is where a token's K and V go.
    """

    def __init__(self, step: Step, page_size: int, device: torch.device) -> None:
        self.rows = step.rows
        self.page_size = page_size
        token_ids = [token for row in step.rows for token in row.request.tokens[row.start : row.end]]
        positions = [position for row in step.rows for position in range(row.start, row.end)]
        slots = [
            row.request.pages[position // page_size] * page_size + position % page_size
            for row in step.rows
            for position in range(row.start, row.end)
        ]
        self.token_ids, self.positions, self.slots = torch.tensor(
            [token_ids, positions, slots], device=device
        )
        width = max(len(row.request.pages) for row in step.rows)
        table = [row.request.pages + [0] * (width - len(row.request.pages)) for row in step.rows]
        self._page_table = torch.tensor(table, device=device)
        self._prefixes: dict[int | None, Prefix | None] = {}

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    def prefix(self, removed_at: int | None) -> Prefix | None:
        """The rows that run a unit which goes at depth `removed_at` (None: never); None when no row does."""
        if removed_at not in self._prefixes:
            self._prefixes[removed_at] = self._make_prefix(removed_at)
        return self._prefixes[removed_at]

    def _make_prefix(self, removed_at: int | None) -> Prefix | None:
        rows = [row for row in self.rows if removed_at is None or row.request.tier.depth < removed_at]
        if not rows:
            return None
        for known in self._prefixes.values():  # depths between two served tiers give the same rows
            if known is not None and known.batch.num_sequences == len(rows):
                return known
        query_lens = tuple(row.num_tokens for row in rows)
        context_lens = tuple(row.end for row in rows)
        batch = PagedBatch(query_lens, context_lens, self._page_table[: len(rows)], self.page_size)
        return Prefix(sum(query_lens), batch)
