"""An OpenAI-compatible server without a model: it does what it is told to, and notes when it did it."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

OWNER = "script"


@dataclass
class Seen:
    """One streamed request. Times by time.perf_counter, which a client in this process shares."""

    path: str
    body: dict
    connection: int
    received: float
    sent: list[float] = field(default_factory=list)  # of chunks with text
    closed_by_client: bool = False


@dataclass
class Script:
    """What the server does.

    Attributes:
        first, gap: seconds before the first token, and between tokens; `first` may depend on the model's name.
        chunk: tokens in a chunk.
        refused: fields that are answered by 400.
        usage: whether it tells usage: "always", "whole" (not in streams) or "never".
        fail: what goes wrong with the streamed request of this number, from 0: "500", "drop", "hang", "error", "empty",
            "garbage", "json", or None. Requests before the load count too.
        close_after: answers have no length; the connection's end is theirs.
        streams_a_connection: the next one that comes over it finds it closed.
        on_stream: called with the number of each streamed request before it is answered.
        words: tokens of a text.
    """

    first: float | Callable[[str], float] = 0.0
    gap: float = 0.0
    chunk: int = 1
    models: tuple[str, ...] = ("small",)
    refused: tuple[str, ...] = ()
    usage: str = "always"
    key: str | None = None
    context: int = 4096
    overhead: int = 7
    lists_models: bool = True
    close_after: bool = False
    streams_a_connection: int | None = None
    on_stream: Callable[[int], None] = lambda number: None
    fail: Callable[[int], str | None] = lambda number: None
    words: Callable[[str], int] = lambda text: len(text.split())


class ScriptedServer:
    """Runs in a thread until `close`. seen: streamed requests; counted: texts of those that were not streamed."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.counted: list[str] = []
        self.num_connections = 0
        self.num_open = self.most_open = 0
        self._streams: Counter[int] = Counter()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def _run(self) -> None:
        async def serve() -> None:
            server = await asyncio.start_server(self._serve_connection, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            self._stop = asyncio.Event()
            self._started.set()
            await self._stop.wait()
            server.close()

        self._loop.run_until_complete(serve())
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        connection = self.num_connections
        try:
            while await self._serve_request(reader, writer, connection):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _serve_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> bool:
        """Whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        received = time.perf_counter()
        method, path = head.split()[:2]
        length = next(
            (int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length")), 0
        )
        body = json.loads(await reader.readexactly(length) if length else b"null")
        if self.script.key and f"authorization: bearer {self.script.key}" not in head:
            return self._answer(writer, 401, {"error": {"message": "no such key"}})
        if method == "get":
            return self._list(writer, path)
        problem = self._problem(body)
        if problem is not None:
            return self._answer(writer, *problem)
        if not body["stream"]:
            self.counted.append(text_of(body))
            usage = {"usage": self._usage(body, 1)} if self.script.usage != "never" else {}
            return self._answer(writer, 200, {"choices": [{"index": 0, "text": "x"}], **usage})
        self._streams[connection] += 1
        if self._streams[connection] > (self.script.streams_a_connection or sys.maxsize):
            return False
        seen, number = Seen(path, body, connection, received), len(self.seen)
        self.seen.append(seen)
        self.script.on_stream(number)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            return await self._stream(seen, reader, writer, self.script.fail(number))
        finally:
            self.num_open -= 1

    def _list(self, writer: asyncio.StreamWriter, path: str) -> bool:
        if path != "/v1/models" or not self.script.lists_models:
            return self._answer(writer, 404, {"detail": "Not Found"})
        return self._answer(
            writer, 200, {"data": [{"id": name, "owned_by": OWNER} for name in self.script.models]}
        )

    def _problem(self, body: dict) -> tuple[int, dict] | None:
        for name in self.script.refused:
            if name in body:
                return 400, {"error": {"message": f"unrecognized request argument: {name}"}}
        if body["model"] not in self.script.models:
            return 404, {"error": {"message": f"no model {body['model']}", "code": "model_not_found"}}
        if self._usage(body, 0)["prompt_tokens"] > self.script.context:
            return 400, {"error": {"message": f"the context holds {self.script.context} tokens"}}
        return None

    def _usage(self, body: dict, num_tokens: int) -> dict:
        prompt = self.script.words(text_of(body)) + self.script.overhead
        cached = {"cached_tokens": 2}
        return {"prompt_tokens": prompt, "completion_tokens": num_tokens, "prompt_tokens_details": cached}

    def _answer(self, writer: asyncio.StreamWriter, status: int, content: dict) -> bool:
        data = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return True

    async def _stream(
        self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str | None
    ) -> bool:
        if fault == "500":
            return self._answer(writer, 500, {"error": {"message": "out of luck"}})
        if fault == "json":
            return self._answer(writer, 200, {"choices": []})
        ends = "Connection: close" if self.script.close_after else "Transfer-Encoding: chunked"
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n{ends}\r\n\r\n".encode()
        )
        if seen.path.endswith("chat/completions"):
            self._event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        first = self.script.first
        await asyncio.sleep(first if isinstance(first, float) else first(seen.body["model"]))
        num_tokens = 0 if fault == "empty" else seen.body["max_tokens"]
        for done in range(0, num_tokens, self.script.chunk):
            if done:
                await asyncio.sleep(self.script.gap)
            if done >= 2 and fault == "drop":
                return False
            if done >= 2 and fault == "error":
                self._event(writer, {"error": {"message": "the engine broke"}})
                break
            if done >= 2 and fault == "hang":
                await self._wait_for_close(seen, reader)
                return False
            await self._token(seen, writer, min(self.script.chunk, num_tokens - done))
        if fault == "garbage":
            self._event(writer, "no object")
        self._event(writer, {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "length"}]})
        wants_usage = seen.body.get("stream_options", {}).get("include_usage")
        if wants_usage and self.script.usage == "always":
            self._event(writer, {"choices": [], "usage": self._usage(seen.body, num_tokens)})
        self._write(writer, b"data: [DONE]\n\n")
        if not self.script.close_after:
            writer.write(b"0\r\n\r\n")
        return not self.script.close_after

    async def _wait_for_close(self, seen: Seen, reader: asyncio.StreamReader) -> None:
        try:
            seen.closed_by_client = not await reader.read(1)
        except ConnectionError:
            seen.closed_by_client = True

    async def _token(self, seen: Seen, writer: asyncio.StreamWriter, num_tokens: int) -> None:
        seen.sent.append(time.perf_counter())
        text = "x" * num_tokens
        self._event(
            writer, {"choices": [{"index": 0, "delta": {"content": text}, "text": text}], "usage": None}
        )
        await writer.drain()

    def _event(self, writer: asyncio.StreamWriter, content: object) -> None:
        self._write(writer, b"data: " + json.dumps(content).encode() + b"\n\n")

    def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data if self.script.close_after else b"%x\r\n%s\r\n" % (len(data), data))


def text_of(body: dict) -> str:
    """The prompt, or the chat's messages joined."""
    return body.get("prompt") or " ".join(message["content"] for message in body["messages"])
