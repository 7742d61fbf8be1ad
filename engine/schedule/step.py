"""One forward pass as the scheduler plans it: plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sleb.engine.requests.request import Request


@dataclass(eq=False, slots=True)
class ScheduledRow:
    """`num_tokens` tokens of a request, from position `start` on.

    Attributes:
        pending: the row's one token has been sampled by the step before and is known on the device alone.
        samples: whether the row reaches the request's last token, so that a next one is chosen.
        chooses: whether a token is sampled: not where only the prompt was to be computed.
    """

    request: Request
    start: int
    num_tokens: int
    pending: bool = field(init=False)
    samples: bool = field(init=False)
    chooses: bool = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        num_known = len(request.tokens)
        self.pending = self.start >= num_known
        self.samples = self.start + self.num_tokens == num_known + request.num_pending
        self.chooses = self.samples and request.max_tokens > 0

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Step:
    """The scheduler's plan for one forward: rows by ascending depth."""

    rows: Sequence[ScheduledRow]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)
