"""The answers of /v1/responses as one server's processes share them: those that are kept, and those being made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from sleb.server.responses.store import Kept, ResponseStore, Running


class Responses(ABC):
    """What a request asks of them. Belongs to the event loop.

    Attributes:
        running: answers that this process is making.
        keeps: whether any are kept.
    """

    def __init__(self, *, keeps: bool) -> None:
        self.running: dict[str, Running] = {}
        self.keeps = keeps

    def of_running(self, owner: bytes, identifier: str, *, cancel: bool) -> dict[str, Any] | None:
        """An answer that this process is making, ended if `cancel`; None if there is none, or none that is told."""
        running = self.running.get(identifier)
        if running is None or running.owner != owner:
            return None
        return running.cancel() if cancel else running.snapshot()

    async def find(self, owner: bytes, identifier: str, *, cancel: bool = False) -> dict[str, Any]:
        """An answer that is kept or being made, the latter ended if `cancel`. Raises ApiError 404."""
        told = self.of_running(owner, identifier, cancel=cancel)
        return await self._find_elsewhere(owner, identifier, cancel=cancel) if told is None else told

    @abstractmethod
    async def _find_elsewhere(self, owner: bytes, identifier: str, *, cancel: bool) -> dict[str, Any]:
        """One that is kept, or that another process is making."""

    @abstractmethod
    async def get(self, owner: bytes, identifier: str, param: str | None = None) -> Kept:
        """As `ResponseStore.get`."""

    @abstractmethod
    async def delete(self, owner: bytes, identifier: str) -> None:
        """As `ResponseStore.delete`."""

    @abstractmethod
    async def items(self, owner: bytes, item_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of the items that are kept, by id."""

    @abstractmethod
    def put(
        self,
        owner: bytes,
        response: dict[str, Any],
        input_items: Sequence[dict[str, Any]],
        earlier: tuple[bytes, ...] = (),
    ) -> None:
        """As `ResponseStore.put`; whoever asks after the client has read the answer finds it."""


class LocalResponses(Responses):
    """Those of a server in one process."""

    def __init__(self, store: ResponseStore) -> None:
        super().__init__(keeps=store.keeps)
        self.store = store

    async def _find_elsewhere(self, owner: bytes, identifier: str, *, cancel: bool) -> dict[str, Any]:
        return self.store.get(owner, identifier).whole()

    async def get(self, owner: bytes, identifier: str, param: str | None = None) -> Kept:
        return self.store.get(owner, identifier, param)

    async def delete(self, owner: bytes, identifier: str) -> None:
        self.store.delete(owner, identifier)

    async def items(self, owner: bytes, item_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        return self.store.items(owner, item_ids)

    def put(
        self,
        owner: bytes,
        response: dict[str, Any],
        input_items: Sequence[dict[str, Any]],
        earlier: tuple[bytes, ...] = (),
    ) -> None:
        self.store.put(owner, response, input_items, earlier)
