"""Messages between the processes of one server: msgpack, each behind its length, over a pair of sockets.

A message is a list that begins with its kind (`Kind`).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any, cast

import msgspec

_LENGTH = struct.Struct("<I")
_MAX_MESSAGE = 2**31
# What a process may leave unread: a front that is stopped for a minute at 10,000 tokens a second has 20 MB to read.
_MAX_UNREAD = 2**28

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder().decode


class Kind(IntEnum):
    """What a message says, and what follows its kind."""

    # From a front to the engine.
    SUBMIT = 0  # number of the first job, packed jobs
    ABORT = 1  # number of the first job
    PUT = 2  # owner, an entry for the store
    STARTED = 3  # clients can connect
    # From the engine to a front.
    ACCEPTED = 10  # number of the first job, (depth, whether it is degraded) if the server chose
    FAILED = 11  # number of the first job, packed error
    OUTPUTS = 12  # packed increments of one step
    STATE = 13  # draining, leaving, warm, why it could not warm up, packed error of death
    STOP = 14  # whole seconds for clients to read the end of their answers, exit code
    # Either way.
    CALL = 20  # number, name, arguments
    RESULT = 21  # number, packed error or None, result


class Channel(asyncio.Protocol):
    """One end, on an event loop.

    Args:
        on_message: called with each message in its order. on_end: called once when the other end has gone.
    """

    def __init__(self, on_message: Callable[[list[Any]], None], on_end: Callable[[], None]) -> None:
        self._on_message, self._on_end = on_message, on_end
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._num_calls = 0

    async def connect(self, sock: socket.socket) -> None:
        """Begins, at the end `sock` of a connected pair, on the running loop."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(_MAX_UNREAD)

    def pause_writing(self) -> None:
        """The other end reads nothing any more: it hangs."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for call in self._calls.values():
            if not call.done():
                call.set_exception(ConnectionError("the other process has ended"))
        self._on_end()

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        place, end = 0, len(received)
        while end - place >= _LENGTH.size:
            [length] = _LENGTH.unpack_from(received, place)
            if end - place - _LENGTH.size < length:
                break
            place += _LENGTH.size
            message = decode(memoryview(received)[place : place + length])
            place += length
            if message[0] == Kind.RESULT:
                self._on_result(*message[1:])
            else:
                self._on_message(message)
        if place:
            del received[:place]

    def send(self, *message: Any) -> None:
        """Sends a message; nothing if the other end has gone."""
        if self._transport is not None:
            content = encode(message)
            self._transport.write(_LENGTH.pack(len(content)) + content)

    async def call(self, name: str, *arguments: Any) -> tuple[Any, Any]:
        """(packed error or None, result) of a call at the other end. Raises ConnectionError if it goes meanwhile."""
        if self._transport is None:
            raise ConnectionError("the other process has ended")
        self._num_calls += 1
        number, future = self._num_calls, asyncio.get_running_loop().create_future()
        self._calls[number] = future
        try:
            self.send(Kind.CALL, number, name, arguments)
            answer: tuple[Any, Any] = await future
            return answer
        finally:
            del self._calls[number]

    def close(self) -> None:
        """Closes this end once what was sent is read."""
        if self._transport is not None:
            self._transport.close()

    def _on_result(self, number: int, error: Any, result: Any) -> None:
        call = self._calls.get(number)
        if call is not None and not call.done():
            call.set_result((error, result))


def send_blocking(sock: socket.socket, content: bytes) -> None:
    """Sends bytes behind their length, before there is an event loop."""
    sock.sendall(_LENGTH.pack(len(content)) + content)


def receive_blocking(sock: socket.socket) -> bytes | None:
    """What `send_blocking` sent; None if the other end has gone. It reads nothing beyond."""
    head = _receive(sock, _LENGTH.size)
    return None if head is None else _receive(sock, _LENGTH.unpack(head)[0])


def _receive(sock: socket.socket, length: int) -> bytes | None:
    received = bytearray()
    while len(received) < length:
        data = sock.recv(length - len(received))
        if not data:
            return None
        received += data
    return bytes(received)
