"""One forward pass as the scheduler plans it: plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleb.engine.requests.request import Request


class ScheduledRow:
    """`num_tokens` tokens of a request, from position `start` on.

    Attributes:
        pending: the row's one token has been sampled by the step before and is known on the device alone.
        samples: whether the row reaches the request's last token, so that a next one is chosen.
        chooses: whether a token is sampled: not where only the prompt was to be computed.
    """

    __slots__ = ("chooses", "end", "num_tokens", "pending", "request", "samples", "start")

    def __init__(self, request: Request, start: int, num_tokens: int) -> None:
        num_known = len(request.tokens)
        self.request = request
        self.start = start
        self.num_tokens = num_tokens
        self.end = start + num_tokens
        self.pending = start >= num_known
        self.samples = self.end == num_known + request.num_pending
        self.chooses = self.samples and request.max_tokens > 0


@dataclass(frozen=True)
class Step:
    """The scheduler's plan for one forward: rows by ascending depth."""

    rows: Sequence[ScheduledRow]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)
