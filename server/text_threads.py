"""Where texts of clients are worked on: short ones at once, long ones in a few threads beside the event loop.

Few, because each thread that runs Python makes the engine's wait for the interpreter's lock, a turn of it at a time.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sleb.engine.encoding import SHORT_TEXT

T = TypeVar("T")

_NUM_THREADS = 2
_threads = ThreadPoolExecutor(_NUM_THREADS, "sleb-text")


async def run(work: Callable[[], T], num_bytes: int) -> T:
    """The result of `work` on a request of `num_bytes`."""
    if num_bytes < SHORT_TEXT:
        return work()
    within = contextvars.copy_context().run
    return await asyncio.get_running_loop().run_in_executor(_threads, lambda: within(work))
