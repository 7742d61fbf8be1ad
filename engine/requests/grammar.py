"""Grammars that an answer must follow: what the engine asks of one.

The engine knows no grammar library: whoever makes a request brings a `GrammarSource` in its sampling parameters.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Mask = np.ndarray[Any, np.dtype[np.int32]]


class Grammar(Protocol):
    """The state of one answer. What it raises ends that answer with an error, and no other."""

    @property
    def finished(self) -> bool:
        """Whether nothing but the end can follow."""

    def fill(self, mask: Mask) -> None:
        """Writes a row of zeros [ceil(V / 32)]: bit t % 32 of word t // 32 is set if token t may come next.

        End-of-sequence tokens may come next exactly when the answer may end here.
        """

    def accept(self, token_id: int) -> None:
        """Moves on by a token."""


class GrammarSource(Protocol):
    """A grammar that any number of answers may follow."""

    def start(self) -> Grammar:
        """The state of a new answer."""
