"""What a client is held against: the same question by a bare HTTP request, and what went over the wire.

Nothing but the standard library, since it is imported in every client's environment.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import urlsplit

Error = TypeVar("Error", bound=Exception)
QUESTION = "What is the capital of France?"


def chat(url: str, model: str, messages: list[dict[str, Any]] | str = QUESTION, **fields: Any) -> str:
    """The greedy answer of chat.completions at `url` (which ends in /v1)."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 256, **fields}
    request = urllib.request.Request(
        url + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    assert text
    return text


def refused(kind: type[Error], call: Callable[[], object]) -> Error:
    """The error that `call` raises: one of `kind`, or else this fails."""
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} but {answer}")


class Exchange:
    """One request and its answer."""

    def __init__(self, method: str, path: str, sent: bytes) -> None:
        self.method, self.path, self.sent = method, path, sent
        self.status, self.answer = 0, b""

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.sent)
        return body

    def events(self) -> list[dict[str, Any]]:
        """The data of a stream's events, without [DONE]."""
        lines = self.answer.decode().splitlines()
        data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
        return [json.loads(each) for each in data if each != "[DONE]"]


class Recorder:
    """A server in front of another that hands on every byte and keeps it: what a command really asked and was told."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.exchanges: list[Exchange] = []
        exchanges = self.exchanges

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                exchange = Exchange(self.command, self.path, sent)
                exchanges.append(exchange)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                upstream = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=300)
                upstream.request(self.command, self.path, sent, headers)
                answer = upstream.getresponse()
                exchange.status = answer.status
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                self.send_header("Connection", "close")  # which ends the body
                self.end_headers()
                while piece := answer.read1(65536):
                    exchange.answer += piece
                    self.wfile.write(piece)
                    self.wfile.flush()
                upstream.close()

            def log_message(self, *arguments: Any) -> None:
                pass

        for method in ("GET", "HEAD", "POST", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.handle_any)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.url = self.root + parts.path
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def posted(self, path: str) -> list[Exchange]:
        """The requests to `path`, every one of which was answered with 200."""
        found = [each for each in self.exchanges if each.path.partition("?")[0] == path]
        for each in found:
            assert each.status == 200, (each.status, each.sent[:2000], each.answer[:2000])
        return found
