"""A proxy before our own server that is right in everything, until a fault spoils a request or an answer.

Loaded by test_doctor_faults.py; a module of its own only for its length.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


@dataclass
class Call:
    """A request on its way in: its parsed body, None if it is no JSON object."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes
    body: dict[str, Any] | None


@dataclass
class Reply:
    """An answer on its way out."""

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})

    @classmethod
    def of(cls, content: Any, status: int = 200) -> Reply:
        return cls(json.dumps(content).encode(), status)

    @classmethod
    def error(cls, status: int, code: str | None = None) -> Reply:
        return cls.of({"error": {"message": "refused", "type": "x", "param": None, "code": code}}, status)


Before = Callable[[Call], Reply | None]
After = Callable[[Call, Reply], None]


@dataclass
class Fault:
    """`checks` must fail, by what is done to the request or to the answer."""

    name: str
    checks: tuple[str, ...]
    before: Before | None = None
    after: After | None = None


class Proxy:
    """A right server, until `fault` is set."""

    def __init__(self, upstream: str) -> None:
        self.fault: Fault | None = None
        self.num_running = 0
        self.num_tokens = 0
        self._upstream = upstream
        self._client = httpx.AsyncClient(timeout=30)
        methods = ["GET", "POST", "DELETE", "HEAD", "OPTIONS"]
        app = Starlette(routes=[Route("/{path:path}", self._handle, methods=methods)])
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    async def _handle(self, request: Request) -> Response:
        content = await request.body()
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        headers = {n: v for n, v in request.headers.items() if n not in ("host", "content-length")}
        body = body if isinstance(body, dict) else None
        call = Call(request.method, request.scope["path"], headers, content, body)
        fault = self.fault
        reply = fault.before(call) if fault is not None and fault.before is not None else None
        if reply is None:
            if body is not None and body.get("ignore_eos") and body.get("max_tokens") == 1000:
                if body.get("stream"):
                    return StreamingResponse(self._generate_slowly(), media_type="text/event-stream")
                return await self._compute_slowly(request)
            reply = stand_in(self, call) or await self._forward(call)
        if fault is not None and fault.after is not None:
            fault.after(call, reply)
        return Response(reply.content, reply.status, reply.headers)

    async def _forward(self, call: Call) -> Reply:
        content = call.content if call.body is None else json.dumps(call.body).encode()
        answer = await self._client.request(
            call.method, self._upstream + call.path, content=content, headers=call.headers
        )
        headers = {
            n: v for n, v in answer.headers.items() if n not in ("content-length", "transfer-encoding")
        }
        headers.setdefault("server-timing", "total;dur=1")
        return Reply(answer.content, answer.status_code, headers)

    async def _generate_slowly(self) -> Any:
        self.num_running += 1
        try:
            for _ in range(100):
                yield b'data: {"choices": [{"index": 0, "text": "x"}]}\n\n'
                await asyncio.sleep(0.05)
        finally:
            self._end()

    async def _compute_slowly(self, request: Request) -> Response:
        self.num_running += 1
        while not await request.is_disconnected():
            await asyncio.sleep(0.05)
        self._end()
        return Response()

    def _end(self) -> None:
        if self.fault is None or self.fault.name != "clients that leave are not noticed":
            self.num_running -= 1


def stand_in(proxy: Proxy, call: Call) -> Reply | None:
    """Right answers for what depends on more than the model, so that these tests need nothing but the core."""
    body, path = call.body or {}, call.path
    if path == "/metrics":
        proxy.num_tokens += 1000
        lines = [
            f'x:num_requests_running{{model_name="m"}} {proxy.num_running}.0',
            "x:num_requests_waiting 0.0",
            "x:prompt_tokens_total 0.0",
            f"x:generation_tokens_total {proxy.num_tokens}.0",
        ]
        return Reply("\n".join(lines).encode(), headers={"content-type": "text/plain"})
    if path == "/docs":
        return Reply(b'<a href="https://example.org/">more</a>', headers={"content-type": "text/html"})
    if path == "/v1/embeddings":
        return Reply.error(501)
    if path == "/tokenizer_info":
        return Reply.of({"tokenizer_class": "Bytes"})
    if path == "/detokenize":
        return Reply.of({"prompt": bytes(body["tokens"]).decode()})
    if path == "/tokenize" and "prompt" in body:
        tokens = list(body["prompt"].encode())
        return Reply.of({"tokens": tokens, "count": len(tokens), "max_model_len": 512})
    if path == "/tokenize":  # the tiny model's template around one message
        role, content = body["messages"][0]["role"], body["messages"][0]["content"]
        count = len(f"{role}\n{content}\nassistant\n") + 3
        return Reply.of({"tokens": [0] * count, "count": count, "max_model_len": 512})
    if path == "/v1/chat/completions" and body.get("tools"):
        return tool_answer(body)
    response_format = body.get("response_format") or {"type": "text"}
    if response_format["type"] == "poem" or "nonsense" in json.dumps(response_format):
        return Reply.error(400)
    if response_format["type"] != "text":
        return chat_answer(body, {"content": '{"colour":"red","is_warm":true}'}, "stop")
    return None


def tool_answer(body: dict[str, Any]) -> Reply:
    choice = body.get("tool_choice")
    name = "get_weather"
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        if name == "no_such_tool":
            return Reply.error(400)
    if choice == "none" or choice is None:
        return chat_answer(body, {"content": "Sunny."}, "stop")
    function = {"name": name, "arguments": '{"city": "Paris"}'}
    call = {"index": 0, "id": "call_1", "type": "function", "function": function}
    return chat_answer(body, {"content": None, "tool_calls": [call]}, "tool_calls")


def chat_answer(body: dict[str, Any], message: dict[str, Any], reason: str) -> Reply:
    number = sum(len(str(each)) for each in body["messages"])
    usage = {"prompt_tokens": number, "completion_tokens": 1, "total_tokens": number + 1}
    part = "delta" if body.get("stream") else "message"
    choice = {"index": 0, part: {"role": "assistant", **message}, "finish_reason": reason}
    answer = {"id": "x", "choices": [choice], "usage": usage}
    if body.get("stream"):
        return Reply(
            f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n".encode(),
            headers={"content-type": "text/event-stream"},
        )
    return Reply.of(answer)
