"""A server in several processes, from the engine's: the fronts' start, signals, deaths and the end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from sleb.errors import ConfigError, EngineDeadError
from sleb.server.context import ServerContext
from sleb.server.engine_process.hub import Front, Hub
from sleb.server.engine_process.spawn import EXIT_ADDRESS_IN_USE, ConnectionCounts, Facts, FrontProcess
from sleb.server.engine_thread.async_engine import AsyncEngine
from sleb.server.options import ServeOptions
from sleb.server.responses.shared import LocalResponses
from sleb.server.shutdown import Shutdown

logger = logging.getLogger("sleb.server")

_SECONDS_TO_START = 60.0  # for a front, once it has its facts
_SECONDS_TO_END = 3.0  # beyond those that clients have to read the end of their answers


class Fronts:
    """The front processes of a server, from their start before the model is loaded to their end. Nothing for 0.

    Raises ConfigError where the machine cannot do it.
    """

    def __init__(self, sock: socket.socket, options: ServeOptions) -> None:
        self._options = options
        self._processes: list[FrontProcess] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shutdown: Shutdown | None = None
        if options.fronts and os.name != "posix":
            raise ConfigError("--fronts needs Linux or macOS; use --fronts 0")
        if options.fronts:
            counts = ConnectionCounts(options.fronts)
            for listener in _listeners(sock, options):
                self._processes.append(FrontProcess(listener, counts))
                if listener is not sock:
                    listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()

    def run(self, context: ServerContext, on_started: Callable[[], None]) -> int:
        """Serves until a signal, the engine's death or that of a front; returns the exit code.

        Raises OSError EADDRINUSE when somebody else has taken the address meanwhile.
        """
        pids = [os.getpid(), *(process.pid for process in self._processes)]
        for index, process in enumerate(self._processes):
            process.give(Facts(context.engine.model, self._options, context.created, pids, index))
        try:
            import uvloop
        except ImportError:
            return asyncio.run(self._serve(context, on_started))
        return uvloop.run(self._serve(context, on_started))

    def on_signal(self, number: int) -> None:
        """As if that signal had come; from any thread, while it runs."""
        assert self._loop is not None and self._shutdown is not None
        self._loop.call_soon_threadsafe(self._shutdown.on_signal, number)

    async def _serve(self, context: ServerContext, on_started: Callable[[], None]) -> int:
        engine, responses = context.engine, context.responses
        assert isinstance(engine, AsyncEngine)
        assert isinstance(responses, LocalResponses)
        over: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def end(seconds: int) -> None:
            hub.stop(seconds, shutdown.exit_code)
            if not over.done():
                over.set_result(seconds)

        def on_lost(front: Front) -> None:
            logger.critical("the process %d, which speaks HTTP, has ended", front.process.pid)
            hub.tell_state(EngineDeadError("a process of the server has ended"))
            engine.fail_open(EngineDeadError("a process of the server has ended"))
            shutdown.on_death()

        def on_death() -> None:
            hub.tell_state()
            die()

        hub = Hub(engine, responses.store, on_lost)
        options = self._options
        shutdown = Shutdown(engine, options.shutdown_delay, options.drain_timeout, end)
        die, engine.on_death, engine.on_change = engine.on_death, on_death, hub.tell_state
        self._loop, self._shutdown = asyncio.get_running_loop(), shutdown
        if threading.current_thread() is threading.main_thread():  # a test's may be another
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(number, shutdown.on_signal, number)
        engine.start()
        fronts = [await hub.connect(process) for process in self._processes]
        if await self._have_started(fronts):
            on_started()
        elif EXIT_ADDRESS_IN_USE in [process.end() for process in self._processes]:
            await engine.stop()
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        elif not any(front.ended.is_set() for front in fronts):  # one hangs; of an end all have been told
            shutdown.on_death(0)
        seconds = await over
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds + _SECONDS_TO_END):
                await asyncio.gather(*(front.ended.wait() for front in fronts))
        await engine.stop()
        return shutdown.exit_code

    async def _have_started(self, fronts: list[Front]) -> bool:
        """Whether clients can connect to each; False if one has ended, or hangs."""

        async def all_started() -> bool:
            return all([await front.started.wait() for front in fronts])

        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(front.ended.wait()) for front in fronts]
        waits.append(asyncio.ensure_future(all_started()))
        await asyncio.wait(waits, timeout=_SECONDS_TO_START, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()
        return all(front.started.is_set() for front in fronts)


def _listeners(sock: socket.socket, options: ServeOptions) -> list[socket.socket]:
    """A bound socket for each front. Of several, each has its own, among which the kernel spreads the clients; a
    Unix socket, which cannot be shared so, is of them all."""
    if options.fronts == 1 or options.uds or not hasattr(socket, "SO_REUSEPORT"):
        return [sock] * options.fronts
    address, family = sock.getsockname(), sock.family
    sock.close()  # bound without that option it had to have the port for itself: nobody else is there
    listeners = []
    for _ in range(options.fronts):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listeners.append(listener)
    return listeners
