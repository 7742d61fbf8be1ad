"""How a server ends: signals drain it, and force it; the engine's death ends it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from sleb.server.engine_thread.async_engine import AsyncEngine
from sleb.server.errors import ShuttingDownError

logger = logging.getLogger("sleb.server")

SECONDS_TO_FLUSH = 5  # for clients to read the end of their answers
SECONDS_AS_DEAD = 1.0  # in which a dead server still says so


class Shutdown:
    """The first signal drains, a second forces, a third does not wait for that. Belongs to the event loop.

    Args:
        delay: seconds for which requests are still taken. drain_timeout: then, for open requests to finish.
        end: called with the whole seconds that clients have to read the end of their answers; maybe twice.

    Attributes:
        exit_code: 0 after a drain, 1 after the engine's death, 128 + signal when forced.
    """

    def __init__(
        self, engine: AsyncEngine, delay: float, drain_timeout: float, end: Callable[[int], None]
    ) -> None:
        self.exit_code = 0
        self._engine = engine
        self._delay = delay
        self._drain_timeout = drain_timeout
        self._end = end
        self._forced = False
        self._drain_task: asyncio.Task[None] | None = None
        engine.on_death = self.on_death

    def on_signal(self, sig: int) -> None:
        """Begins to drain; called again, stops at once, within a second or two; and again, does not wait for that."""
        if self._drain_task is None:
            self._drain_task = asyncio.ensure_future(self._drain())
        elif not self._forced:
            logger.warning("stopping at once")
            self._forced = True
            self._engine.fail_open(ShuttingDownError())
            self.exit_code = self.exit_code or 128 + sig
            self._end(1)
        else:
            os._exit(128 + sig)

    def on_death(self, seconds: float = SECONDS_AS_DEAD) -> None:
        """The engine has stopped, or something that the server cannot do without."""
        self.exit_code = 1
        asyncio.get_running_loop().call_later(seconds, self._end, SECONDS_TO_FLUSH)

    async def _drain(self) -> None:
        if self._delay:
            logger.info(
                "not ready any more; requests are taken for %g s; a second signal stops at once", self._delay
            )
            self._engine.leave()
            await asyncio.sleep(self._delay)
        logger.info("draining: %d requests are open; a second signal stops at once", self._engine.num_open)
        if not await self._engine.drain(self._drain_timeout):
            logger.warning("requests were still open after %g s; they got an error", self._drain_timeout)
        if not self._forced:
            self._end(SECONDS_TO_FLUSH)
