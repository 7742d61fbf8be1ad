"""From options to a running server and its exit code: socket, model, event loop, signals, drain."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, cast

import uvicorn

from sleb.errors import ConfigError, RequestError
from sleb.server.app import create_app
from sleb.server.context import ServerContext
from sleb.server.engine_thread.async_engine import AsyncEngine
from sleb.server.errors import ShuttingDownError
from sleb.server.logs import Teller, configure, drain_stderr
from sleb.server.options import ServeOptions
from sleb.server.unix_socket import UnixSocket
from sleb.server.wire import BoundedProtocol, WireLimits

if TYPE_CHECKING:
    from sleb.engine.config import EngineConfig
    from sleb.engine.engine import Engine
    from sleb.engine.served_model import ServedModel

logger = logging.getLogger("sleb.server")

_SECONDS_TO_FLUSH = 5.0  # for clients to read the end of their answers
_SECONDS_AS_DEAD = 1.0  # in which a dead server still says so
_SECONDS_IDLE = 75  # before an unused connection is closed: longer than clients keep theirs
_BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn with our signals: the first drains, a second forces; and an exit code.

    exit_code: 0 after a drain, 1 after the engine's death, 128 + signal when forced.
    """

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, drain_timeout: float) -> None:
        super().__init__(config)
        self.exit_code = 0
        self.on_started: Callable[[], None] = lambda: None  # called once clients can connect
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._forced = False
        self._drain_task: asyncio.Task[None] | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._engine.on_death = self._on_death
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler, between any two instructions: only passes it on."""
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self.stop, sig)

    def stop(self, sig: int) -> None:
        """Begins to drain; called again, stops at once, within a second or two; and again, does not wait for that."""
        if self._drain_task is None:
            logger.info(
                "draining: %d requests are open; a second signal stops at once", self._engine.num_open
            )
            self._drain_task = asyncio.ensure_future(self._drain())
        elif not self._forced:
            logger.warning("stopping at once")
            self._forced = True
            self._engine.fail_open(ShuttingDownError())
            self.exit_code = self.exit_code or 128 + sig
            self.config.timeout_graceful_shutdown = 1
            self.should_exit = True
        else:
            os._exit(128 + sig)

    async def _drain(self) -> None:
        if not await self._engine.drain(self._drain_timeout):
            logger.warning("requests were still open after %g s; they got an error", self._drain_timeout)
        self.should_exit = True

    def _on_death(self) -> None:
        self.exit_code = 1
        asyncio.get_running_loop().call_later(_SECONDS_AS_DEAD, setattr, self, "should_exit", True)


def make_server(context: ServerContext) -> Server:
    """A server for `context`, to be run with a bound socket."""
    options = context.options
    limits = WireLimits(options.read_timeout, options.write_timeout, options.max_connections)
    config = uvicorn.Config(
        create_app(context),
        http=cast("type[asyncio.Protocol]", partial(BoundedProtocol, limits)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        # Whoever can write into a folder of this machine is believed who the client is, as 127.0.0.1 is.
        forwarded_allow_ips="*" if options.uds else None,
        timeout_keep_alive=_SECONDS_IDLE,
        timeout_graceful_shutdown=int(_SECONDS_TO_FLUSH),
    )
    config.load()
    config.ssl = (
        options.ssl_context
    )  # uvicorn's own would ask for passwords, and come after the model is loaded
    return Server(config, context.engine, options.drain_timeout)


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
    with sock:
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
        server = make_server(context)
        url = base_url(sock, is_secure=options.ssl_context is not None)
        server.on_started = lambda: teller.introduce(context, url, can_chat)
        if isinstance(sock, UnixSocket):
            sock.check()
        try:
            server.run(sockets=[sock])
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise _bind_error(
                options.host, options.port, error
            ) from None  # taken while the model was loading
    if context.engine.running:  # it hangs in a step, and would keep the process
        drain_stderr()
        os._exit(server.exit_code or 1)
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
