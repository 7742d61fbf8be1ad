"""Front processes: how one is started, and what it is given."""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sleb.engine.served_model import ServedModel
from sleb.errors import ConfigError
from sleb.server.engine_process.channel import receive_blocking, send_blocking
from sleb.server.options import ServeOptions

EXIT_ADDRESS_IN_USE = 98  # of a front whose address somebody else has taken
_SECONDS_TO_END = 3.0


@dataclass(frozen=True)
class Facts:
    """What a front must know before it takes requests. pids: of all processes of the server. index: its own place
    among the fronts."""

    model: ServedModel
    options: ServeOptions
    created: int
    pids: Sequence[int]
    index: int


class FrontProcess:
    """A process that speaks HTTP, started from the same interpreter; it waits for its facts.

    Args:
        listener: where clients come, bound. counts: see `ConnectionCounts`.
    """

    def __init__(self, listener: socket.socket, counts: ConnectionCounts) -> None:
        self._sock, theirs = socket.socketpair()
        with theirs:
            inherited = theirs.fileno(), listener.fileno(), counts.descriptor
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sleb.server.engine_process.front", *map(str, inherited)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def give(self, facts: Facts) -> None:
        """Lets it begin. Raises ConfigError if it has ended."""
        # Options remember what was made of them, some of which cannot be pickled; a copy has not.
        content = pickle.dumps(replace(facts, options=replace(facts.options)))
        try:
            send_blocking(self._sock, content)
        except OSError:
            raise ConfigError(
                "a process for HTTP has ended while it was started; the lines above say why, or use --fronts 0"
            ) from None

    def take_socket(self) -> socket.socket:
        """The end of the connection with it, which whoever takes it closes."""
        self._sock.setblocking(False)
        return self._sock

    def end(self, seconds: float = _SECONDS_TO_END) -> int:
        """Waits for it to end, as it does when the connection is closed, and kills it if it does not; its exit code."""
        self._sock.close()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def receive_facts(sock: socket.socket) -> Facts | None:
    """What `FrontProcess.give` sent to this process; None if the engine's process ended before.

    Both ends are this program's: pickle reads nothing that came from elsewhere.
    """
    content = receive_blocking(sock)
    if content is None:
        return None
    facts = pickle.loads(content)  # noqa: S301
    assert isinstance(facts, Facts)
    return facts


class ConnectionCounts:
    """How many connections each front has open, in memory that all of them share."""

    _BYTES = 8  # a number

    def __init__(self, num_fronts: int, descriptor: int | None = None, own: int = 0) -> None:
        """descriptor: of the memory, if another process has made it. own: the place of this front."""
        if descriptor is None:
            with tempfile.TemporaryFile() as file:
                file.truncate(self._BYTES * num_fronts)
                descriptor = os.dup(file.fileno())
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, self._BYTES * num_fronts)
        self._numbers = memoryview(self._map).cast("q")
        self._own = own

    def set(self, count: int) -> int:
        """Tells this front's number; returns that of all fronts."""
        self._numbers[self._own] = count
        return sum(self._numbers)
