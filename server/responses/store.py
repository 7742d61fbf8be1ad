"""What /v1/responses keeps in memory: answers that later requests go on from, and those that are being made.

Bounded in bytes, in number and in time; the one that was used longest ago goes first. An answer belongs to the API key
that asked for it: for any other key it does not exist.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from sleb.server.errors import ApiError, shorten

MAX_ANSWERS = 2**16
MAX_ENTRY_BYTES = 2**24  # more would hold up other requests while it is read
_CODE = "response_not_found"
# Bytes of an entry beside its JSON, and of an item's place in the index: what Python needs for them, rounded up.
_ENTRY_BYTES = 1024
_ITEM_BYTES = 256
_MAX_ITEM_ID = 128  # characters; an item with a longer one cannot be referred to


class Running(Protocol):
    """An answer that is being made."""

    owner: bytes

    def cancel(self) -> dict[str, Any]:
        """Ends it; the answer as far as it came."""

    def snapshot(self) -> dict[str, Any] | None:
        """The answer so far; None if it shall not be kept."""


@dataclass(frozen=True)
class Kept:
    """An answer as JSON.

    Attributes:
        owner: whose it is.
        response: all of it but its output.
        turns: lists of items, from the first of the conversation to this answer's own: input, output, input, output.
        item_ids: of this answer's own items.
        num_bytes: that it counts for, with the turns that it shares with earlier answers.
    """

    owner: bytes
    response: bytes
    turns: tuple[bytes, ...]
    item_ids: tuple[str, ...]
    num_bytes: int
    expires: float

    def whole(self) -> dict[str, Any]:
        """The answer as it was given."""
        response: dict[str, Any] = orjson.loads(self.response)
        return response | {"output": orjson.loads(self.turns[-1])}

    def input_items(self) -> list[dict[str, Any]]:
        """The items that this answer's own request sent."""
        items: list[dict[str, Any]] = orjson.loads(self.turns[-2])
        return items


@dataclass(frozen=True)
class Entry:
    """An answer as it is put: as JSON, made of it where it was written. Attributes as `Kept`'s."""

    identifier: str
    response: bytes
    turns: tuple[bytes, ...]
    item_ids: tuple[str, ...]

    @classmethod
    def of(
        cls, response: dict[str, Any], input_items: Sequence[dict[str, Any]], earlier: tuple[bytes, ...]
    ) -> Entry:
        """input_items: with their ids. earlier: the turns of the answer that it goes on from."""
        output = response["output"]
        found = (item.get("id") for item in [*input_items, *output])
        ids = tuple(each for each in found if isinstance(each, str) and len(each) <= _MAX_ITEM_ID)
        rest = orjson.dumps({name: value for name, value in response.items() if name != "output"})
        turns = (*earlier, orjson.dumps(list(input_items)), orjson.dumps(output))
        return cls(response["id"], rest, turns, ids)

    @property
    def num_bytes(self) -> int:
        """That it counts for, with the turns that it shares with earlier answers."""
        return (
            len(self.response) + sum(map(len, self.turns)) + _ENTRY_BYTES + _ITEM_BYTES * len(self.item_ids)
        )


class ResponseStore:
    """Belongs to the event loop.

    Args:
        max_bytes: 0: nothing is kept. max_seconds: how long after it was made an answer is kept at most.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        max_bytes: int,
        max_seconds: float,
        max_answers: int = MAX_ANSWERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self.max_answers = max_answers
        self.num_bytes = 0
        self._clock = clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the one used last is last
        self._by_age: OrderedDict[str, None] = OrderedDict()
        self._items: dict[tuple[bytes, str], str] = {}  # the id of the newest answer that has the item

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[str]:
        """Ids, that of the next one to go first."""
        return iter(self._kept)

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self.max_bytes > 0

    def put(
        self,
        owner: bytes,
        response: dict[str, Any],
        input_items: Sequence[dict[str, Any]],
        earlier: tuple[bytes, ...] = (),
    ) -> None:
        """Keeps an answer if there is room for it, at the cost of others; see `Entry.of`."""
        self.keep(owner, Entry.of(response, input_items, earlier))

    def keep(self, owner: bytes, entry: Entry) -> None:
        """Keeps an entry if there is room for it, at the cost of others."""
        identifier, num_bytes = entry.identifier, entry.num_bytes
        self._expire()
        if num_bytes > min(self.max_bytes, MAX_ENTRY_BYTES):
            return
        while self._kept and (
            self.num_bytes + num_bytes > self.max_bytes or len(self._kept) >= self.max_answers
        ):
            self._drop(next(iter(self._kept)))
        expires = self._clock() + self.max_seconds
        kept = Kept(owner, entry.response, entry.turns, entry.item_ids, num_bytes, expires)
        self._kept[identifier] = kept
        self._by_age[identifier] = None
        self._items |= {(owner, item_id): identifier for item_id in entry.item_ids}
        self.num_bytes += num_bytes

    def get(self, owner: bytes, identifier: str, param: str | None = None) -> Kept:
        """An answer that is kept. Raises ApiError 404, which says why it may not be, and names the field `param`."""
        self._expire()
        kept = self._kept.get(identifier)
        if kept is None or kept.owner != owner:
            raise ApiError(
                404, f"no response {shorten(identifier)} is kept here: {self._why()}", param=param, code=_CODE
            )
        self._kept.move_to_end(identifier)
        return kept

    def delete(self, owner: bytes, identifier: str) -> None:
        """Forgets an answer. Raises ApiError 404."""
        self.get(owner, identifier)
        self._drop(identifier)

    def item(self, owner: bytes, item_id: str) -> dict[str, Any] | None:
        """An item of an answer that is kept, or of its request; None if there is none of that id."""
        self._expire()
        identifier = self._items.get((owner, item_id))
        if identifier is None:
            return None
        turns = self.get(owner, identifier).turns[-2:]
        items = (item for turn in turns for item in orjson.loads(turn))
        return next((item for item in items if item.get("id") == item_id), None)

    def items(self, owner: bytes, item_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of the items that are kept, by id."""
        found = {item_id: self.item(owner, item_id) for item_id in item_ids}
        return {item_id: item for item_id, item in found.items() if item is not None}

    def _why(self) -> str:
        if not self.keeps:
            return "this server keeps none (--response-store-mb 0); send the conversation as input"
        return (
            "it was asked for with store: false or by another key, was deleted, is older than "
            f"{self.max_seconds:g} seconds, or gave way to newer ones ({self.max_bytes / 2**20:g} MiB are kept; "
            "--response-store-mb, --response-store-seconds)"
        )

    def _expire(self) -> None:
        now = self._clock()
        while self._by_age and self._kept[oldest := next(iter(self._by_age))].expires <= now:
            self._drop(oldest)

    def _drop(self, identifier: str) -> None:
        kept = self._kept.pop(identifier)
        del self._by_age[identifier]
        self.num_bytes -= kept.num_bytes
        for item_id in kept.item_ids:
            if self._items.get((kept.owner, item_id)) == identifier:
                del self._items[kept.owner, item_id]
