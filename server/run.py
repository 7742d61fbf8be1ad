"""From options to a running server and its exit code: socket, model, event loop, signals, drain."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from sleb.errors import ConfigError, RequestError
from sleb.server.app import create_app
from sleb.server.context import ServerContext
from sleb.server.engine_process.fronts import Fronts
from sleb.server.engine_thread.async_engine import AsyncEngine
from sleb.server.logs import Teller, configure, drain_stderr
from sleb.server.options import ServeOptions
from sleb.server.shutdown import Shutdown
from sleb.server.unix_socket import UnixSocket
from sleb.server.uvicorn_config import uvicorn_config

if TYPE_CHECKING:
    from sleb.engine.config import EngineConfig
    from sleb.engine.engine import Engine
    from sleb.engine.served_model import ServedModel


class Server(uvicorn.Server):
    """uvicorn with our signals and an exit code (`Shutdown`), for a server in one process."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, options: ServeOptions) -> None:
        super().__init__(config)
        self.on_started: Callable[[], None] = lambda: None  # called once clients can connect
        self._shutdown = Shutdown(engine, options.shutdown_delay, options.drain_timeout, self._end)
        self._event_loop: asyncio.AbstractEventLoop | None = None

    @property
    def exit_code(self) -> int:
        return self._shutdown.exit_code

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._event_loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler, between any two instructions: only passes it on."""
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._shutdown.on_signal, sig)

    def _end(self, seconds: int) -> None:
        self.config.timeout_graceful_shutdown = seconds
        self.should_exit = True


def make_server(context: ServerContext) -> Server:
    """A server for `context`, whose engine is in this process, to be run with a bound socket."""
    assert isinstance(context.engine, AsyncEngine)
    config = uvicorn_config(create_app(context), context.options)
    return Server(config, context.engine, context.options)


def listen(options: ServeOptions) -> socket.socket:
    """Where `options` say that clients come, bound, not listening yet. Raises ConfigError when that cannot be had."""
    return UnixSocket(options.uds) if options.uds else bind_socket(options.host, options.port)


def bind_socket(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises ConfigError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"host '{host}' is not an address of this machine ({error}); try 127.0.0.1"
        ) from None
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _bind_error(host, port, error) from None
    return sock


def _bind_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} on {host} is in use; choose another, or --port 0 for any free one")
    if error.errno == errno.EACCES:
        return ConfigError(f"port {port} needs more rights than this user has; choose one from 1024 on")
    return ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; try --host 127.0.0.1")


def serve(
    sock: socket.socket,
    engine_config: EngineConfig,
    options: ServeOptions,
    *,
    make_engine: Callable[[EngineConfig], Engine] | None = None,
) -> int:
    """Loads the model, serves it on a bound socket until a signal, and returns the process's exit code.

    Raises SlebError when the model, an option of the engine or the port cannot be had.
    """
    configure(options.log_format, options.log_level)
    teller = Teller(options.log_format)
    url = base_url(sock, is_secure=options.ssl_context is not None)
    with sock, Fronts(sock, options) as fronts:
        teller.say(f"Loading {engine_config.model} ...")
        begin = time.monotonic()
        engine = (make_engine or _load_engine)(engine_config)
        can_chat = warm_up(engine.served)
        teller.say(f"Loaded in {time.monotonic() - begin:.1f} s. Computing with {engine.description}.")
        context = ServerContext.create(engine, options, engine_config.max_num_seqs)
        for result in context.results:
            result.check(context.engine.model)
        gc.collect()
        gc.freeze()  # what is loaded now stays: collections need not look at it again
        if isinstance(sock, UnixSocket):
            sock.check()
        run = fronts.run if options.fronts else partial(_run_here, sock)
        try:
            exit_code = run(context, lambda: teller.introduce(context, url, can_chat))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # taken while the model was loading
            raise _bind_error(options.host, options.port, error) from None
    assert isinstance(context.engine, AsyncEngine)
    if context.engine.running:  # it hangs in a step, and would keep the process
        drain_stderr()
        os._exit(exit_code or 1)
    return exit_code


def _run_here(sock: socket.socket, context: ServerContext, on_started: Callable[[], None]) -> int:
    """Serves in this process until a signal; returns the exit code."""
    server = make_server(context)
    server.on_started = on_started
    server.run(sockets=[sock])
    return server.exit_code


def _load_engine(config: EngineConfig) -> Engine:
    from sleb.engine.engine import Engine

    return Engine(config)


def warm_up(model: ServedModel) -> bool:
    """Compiles the chat template, which takes long the first time. False if the model cannot chat."""
    try:
        model.render_chat([{"role": "user", "content": "Hello"}])
    except RequestError:
        return False
    return True


def base_url(sock: socket.socket, *, is_secure: bool = False) -> str:
    """How a client on this machine reaches a bound socket; of a Unix socket `unix:` and its path."""
    if isinstance(sock, UnixSocket):
        return f"unix:{sock.path}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if is_secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
