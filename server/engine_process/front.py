"""A front: a process that speaks HTTP and asks the engine's process for answers.

    python -m sleb.server.engine_process.front CHANNEL LISTENER COUNTS

Started by `FrontProcess`, with three open descriptors. It ignores signals: the engine's process tells it to stop, and
when that process goes, however it goes, this one ends its answers with an error and follows.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from sleb.errors import SlebError
from sleb.server.app import create_app
from sleb.server.context import ServerContext
from sleb.server.engine_process.channel import Kind
from sleb.server.engine_process.client import EngineClient, RemoteResponses
from sleb.server.engine_process.spawn import EXIT_ADDRESS_IN_USE, ConnectionCounts, Facts, receive_facts
from sleb.server.logs import configure
from sleb.server.shutdown import SECONDS_AS_DEAD
from sleb.server.uvicorn_config import uvicorn_config


class FrontServer(uvicorn.Server):
    """uvicorn, stopped by the engine's process.

    exit_code: as that says; 1 after its death.
    """

    def __init__(self, config: uvicorn.Config, engine: EngineClient) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._engine = engine

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.on_stop = self._stop
        self._engine.on_death = self._on_death
        await self._engine.connect()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._engine.channel.send(Kind.STARTED)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signals reach all processes of a terminal or a service; the engine's decides."""

    def _stop(self, seconds: int, exit_code: int) -> None:
        self.exit_code = self.exit_code or exit_code
        self.config.timeout_graceful_shutdown = seconds
        self.should_exit = True

    def _on_death(self) -> None:
        self.exit_code = 1
        asyncio.get_running_loop().call_later(SECONDS_AS_DEAD, setattr, self, "should_exit", True)


def main() -> int:
    """Runs a front; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel, listener, descriptor = map(int, sys.argv[1:])
    sock = socket.socket(fileno=channel)
    facts = receive_facts(sock)
    if facts is None:
        return 1
    sock.setblocking(False)
    configure(facts.options.log_format, facts.options.log_level)
    server = make_server(facts, sock, ConnectionCounts(facts.options.fronts, descriptor, facts.index))
    gc.collect()
    gc.freeze()
    try:
        server.run(sockets=[socket.socket(fileno=listener)])
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return EXIT_ADDRESS_IN_USE
    return server.exit_code


def make_server(facts: Facts, sock: socket.socket, counts: ConnectionCounts) -> FrontServer:
    """A server of what `facts` tell, whose engine is behind `sock`. Raises SlebError as the engine's process does."""
    options = facts.options
    engine = EngineClient(facts.model, sock, facts.pids)
    responses = RemoteResponses(engine, keeps=options.response_store_mb > 0)
    context = ServerContext.of(engine, options, responses)
    context.created = facts.created
    engine.calls = {
        "counts": context.metrics.counts.state,
        "of_running": lambda owner, identifier, cancel: responses.of_running(
            owner, identifier, cancel=cancel
        ),
    }
    return FrontServer(uvicorn_config(create_app(context), options, counts.set), engine)


if __name__ == "__main__":
    try:
        code = main()
    except SlebError as error:  # a file that was there when the engine's process read it
        logging.getLogger("sleb.server").critical("%s", error)
        code = 1
    sys.exit(code)
