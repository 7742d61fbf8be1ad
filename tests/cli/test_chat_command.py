"""`sleb chat` against a little server on a real socket: through pipes, and on a terminal."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sleb import cli
from sleb.client.answer import Answer
from sleb.client.connection import base_url, is_loopback, refusal_of
from sleb.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., int]


def chunk(content: str | None = None, reason: str | None = None, **fields: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice], **fields})}\n\n".encode()


class ChatServer:
    """Does what the last message asks for; `bodies` are the requests, `num_open` the streams not yet over."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.key: str | None = None
        self.has_models = True
        self.num_open = 0
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        config = uvicorn.Config(Starlette(routes=routes), log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    async def models(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "wrong key", "code": "invalid_api_key"}}, 401)
        if not self.has_models:
            return PlainTextResponse("Not Found", 404)
        return JSONResponse({"object": "list", "data": [{"id": "small"}, {"id": "large"}]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        words = body["messages"][-1]["content"]
        if body.get("model") == "none":
            error = {"message": "there is no model 'none'; there are small, large", "code": "model_not_found"}
            return JSONResponse({"error": error}, 404)
        if words == "long":
            error = {"message": "600 tokens, but the context is 512", "code": "context_length_exceeded"}
            return JSONResponse({"error": error}, 400)
        if words == "crash":
            return PlainTextResponse("Internal\nServer Error", 500)
        if words == "page":
            return PlainTextResponse("<html>", headers={"content-type": "text/html"})
        if words == "whole":
            message = {"role": "assistant", "content": "all at once"}
            return JSONResponse({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        return StreamingResponse(self._stream(words), media_type="text/event-stream")

    async def _stream(self, words: str) -> AsyncIterator[bytes]:
        self.num_open += 1
        try:
            yield b": keep-alive\n\n"
            if words == "slow":
                for number in range(200):
                    yield chunk(f"{number} ")
                    await asyncio.sleep(0.05)
            elif words == "silent":
                await asyncio.sleep(10)
            elif words == "think":
                for name in ("reasoning_content", "reasoning"):
                    choice = {"index": 0, "delta": {name: f"[{name}]"}, "finish_reason": None}
                    yield f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
                yield chunk("thought") + chunk(reason="stop")
            elif words == "break":
                yield chunk("half ") + b'data: {"error": {"message": "the engine died"}}\n\ndata: [DONE]\n\n'
            elif words == "cut":
                yield chunk("half ")
                return
            elif words == "limit":
                yield chunk("much") + chunk(reason="length")
            elif words == "escape":
                yield chunk("a\x1b]0;title\x07b\tc") + chunk(reason="stop")
            elif words == "garbage":
                yield b"data: {oops\n\n"
            else:
                for piece in ("Grüße", ", 世", "界\n", f"({len(self.bodies[-1]['messages'])})"):
                    yield chunk(piece)
                yield chunk(reason="stop")
                usage = {
                    "prompt_tokens": 30,
                    "completion_tokens": 4,
                    "prompt_tokens_details": {"cached_tokens": 9},
                }
                last = {"choices": [], "usage": usage, "timings": {"predicted_per_second": 12.5}}
                yield f"data: {json.dumps(last)}\n\n".encode()
            yield b"data: [DONE]\n\n"
        finally:
            self.num_open -= 1


@pytest.fixture
def server() -> Iterator[ChatServer]:
    running = ChatServer()
    yield running
    running.close()


@pytest.fixture
def run(server: ChatServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """run(input, *arguments): `sleb chat` in this process with that on standard input; its exit code."""
    for name in ("SLEB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))

    def call(text: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sleb", "chat", "--url", server.url, *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call


def test_a_piped_question_gets_only_its_answer(
    server: ChatServer, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("hi\n") == 0
    assert capsys.readouterr() == ("Grüße, 世界\n(1)\n", "")
    [body] = server.bodies
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert body["model"] == "small"
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert set(body) == {
        "model",
        "messages",
        "stream",
        "stream_options",
    }  # what is not given, the model decides
    assert not (tmp_path / "cache").exists()  # history is a terminal's


def test_options_go_into_every_request(server: ChatServer, run: Run) -> None:
    options = [
        "--model",
        "large",
        "--system",
        "Be brief.",
        "--temperature",
        "0",
        "--max-tokens",
        "9",
        "--seed",
        "3",
    ]
    assert run("hi\nagain\n", *options, "--top-p", "0.5") == 0
    for body in server.bodies:
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("large", 0, 9)
        assert (body["seed"], body["top_p"]) == (3, 0.5)
    answer = {"role": "assistant", "content": "Grüße, 世界\n(2)"}
    assert server.bodies[1]["messages"][1:] == [
        {"role": "user", "content": "hi"},
        answer,
        {"role": "user", "content": "again"},
    ]


def test_lines_are_joined(server: ChatServer, run: Run) -> None:
    assert run('one\\\ntwo\n"""three\n\nfour"""\n"""five"""\n\n   \n"""six\n') == 0
    asked = [body["messages"][-1]["content"] for body in server.bodies]
    assert asked == ["one\ntwo", "three\n\nfour", "five", "six"]


def test_undecodable_input_is_sent_as_replacement_characters(
    server: ChatServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("") == 0
    monkeypatch.setattr(sys, "argv", ["sleb", "chat", "--url", server.url])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), "utf-8"))
    with pytest.raises(SystemExit):
        cli.main()
    assert server.bodies[-1]["messages"][-1]["content"] == "a\ufffdb"


def test_commands(server: ChatServer, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved, as_json = tmp_path / "chat.md", tmp_path / "chat.json"
    lines = [
        "/stats",
        "/model",
        "/model large",
        "/system Be kind.",
        "hi",
        "/retry",
        f"/save {saved}",
        f"/save {as_json}",
        "/stats",
        "/reset",
        "/system",
        "hi",
        "/usr/bin is a path",
        "/help",
    ]
    assert run("\n".join(lines)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    out = captured.out
    assert out.startswith("no answer yet\n* small\n  large\n")
    statistics = r"prompt 30 tokens \(9 cached\), answer 4 tokens, 12\.5 tokens/s, ended by stop\n"
    assert re.search(r"\nfirst text after \d+\.\d\d s, " + statistics, out)
    _, _, listed = out.rpartition("ended by stop")
    for name in ("/model", "/system", "/reset", "/retry", "/save", "/stats", "/help", "Ctrl-C", "Ctrl-D"):
        assert name in listed
    asked = [[message["role"] for message in body["messages"]] for body in server.bodies]
    # The retry forgets the answer; the reset forgets both, and the system message goes by itself.
    assert asked == [["system", "user"], ["system", "user"], ["user"], ["user", "assistant", "user"]]
    assert {body["model"] for body in server.bodies} == {"large"}
    assert saved.read_text("utf-8") == (
        "## system\n\nBe kind.\n\n## user\n\nhi\n\n## assistant\n\nGrüße, 世界\n(2)\n"
    )
    messages = json.loads(as_json.read_text("utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]


def test_reasoning_stays_off_a_pipe(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("think\n") == 0
    assert capsys.readouterr() == ("thought\n", "[reasoning_content][reasoning]\n")


def test_a_server_that_does_not_stream(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("whole\n") == 0
    assert capsys.readouterr().out == "all at once\n"


@pytest.mark.parametrize(
    ("question", "said", "remedy", "shown"),
    [
        ("long", "600 tokens, but the context is 512 (HTTP 400)", "/reset", ""),
        ("crash", "Internal Server Error (HTTP 500)", "server's log", ""),
        ("break", "the server broke the answer off: the engine died", "/retry", "half \n"),
        ("cut", "the answer broke off before its end", "/retry", "half \n"),
        ("garbage", "no JSON object: {oops", "", ""),
        ("page", "no event stream but text/html", "OpenAI-compatible", ""),
    ],
)
def test_an_error_is_one_line_with_the_remedy(
    question: str, said: str, remedy: str, shown: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"{question}\nhi\n") == 2  # what follows in a pipe is not asked
    captured = capsys.readouterr()
    assert captured.out == shown
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert said in captured.err and remedy in captured.err


def test_a_missing_model_names_those_that_exist(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("hi\n", "--model", "none") == 2
    error = capsys.readouterr().err
    assert "small, large" in error and "--model" in error


def test_a_wrong_key(
    server: ChatServer, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "right"
    assert run("hi\n", "--api-key", "wrong") == 2
    assert "--api-key" in capsys.readouterr().err
    assert run("hi\n", "--api-key", "right") == 0
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    assert run("hi\n") == 0
    monkeypatch.setenv("SLEB_API_KEY", "wrong")
    assert run("hi\n") == 2  # ours comes first


def test_a_server_without_a_list_of_models(server: ChatServer, run: Run) -> None:
    server.has_models = False
    assert run("hi\n") == 0
    assert "model" not in server.bodies[0]


def test_no_server(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert run("hi\n", "--url", f"127.0.0.1:{port}") == 2
    error = capsys.readouterr().err
    assert f"no server at http://127.0.0.1:{port}/v1" in error and "sleb serve" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("line", ["/nonsense", "/retry", "/save", "/save /nowhere/at/all.md"])
def test_a_wrong_command_is_one_line(line: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line + "\n") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")


def test_a_failed_question_is_no_turn(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions in a row would break templates; and what is asked again must not eat the turn before."""
    from sleb.client.conversation import Conversation

    conversation = Conversation()
    conversation.messages("hi")
    conversation.add_answer("hello")
    conversation.messages("hi")  # fails
    assert conversation.take_back() == "hi"
    assert [turn["content"] for turn in conversation.turns] == ["hi", "hello"]


class Terminal:
    """`sleb chat` on a pseudo-terminal that is its controlling one, so that ^C and ^D work."""

    def __init__(self, url: str, cache: Path) -> None:
        self._master, slave = pty.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "SLEB_CACHE": str(cache),
            "TERM": "xterm",
            "PYTHONIOENCODING": "utf-8",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sleb", "chat", "--url", url],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self.shown = ""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 15.0) -> str:
        """What was shown since the last wait, up to `text`."""
        deadline = time.monotonic() + seconds
        while (found := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown[self._seen :]!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._master, 65536).decode("utf-8", "replace")
                except OSError:  # the other end is closed
                    time.sleep(0.05)
        end = found + len(text)
        piece, self._seen = self.shown[self._seen : end], end
        return piece

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(server: ChatServer, tmp_path: Path) -> Iterator[Terminal]:
    started = Terminal(server.url, tmp_path / "cache")
    yield started
    started.close()


def test_a_session_on_a_terminal(server: ChatServer, terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("/help lists the commands")
    terminal.wait_for("> ")
    terminal.type("hi\r")
    terminal.wait_for("(1)")
    terminal.wait_for("> ")

    # ^C closes the connection and keeps the chat and the part that came.
    terminal.type("slow\r")
    terminal.wait_for("3 ")
    assert server.num_open == 1
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    deadline = time.monotonic() + 5
    while server.num_open:
        assert time.monotonic() < deadline, "the connection stayed open"
        time.sleep(0.01)
    terminal.type("hi\r")
    terminal.wait_for("(5)")
    assert server.bodies[-1]["messages"][3]["content"].startswith("0 1 2 3")
    terminal.wait_for("> ")

    # Stopped before any text came: the question is no turn.
    terminal.type("silent\r")
    while not server.num_open:
        time.sleep(0.01)
    time.sleep(0.2)
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.type("hi\r")
    terminal.wait_for("(7)")

    # Errors do not end the chat; reasoning is dim; what could harm the terminal is left out.
    terminal.type("break\r")
    assert "Traceback" not in terminal.wait_for("the engine died")
    terminal.type("/nonsense\r")
    terminal.wait_for("is no command")
    terminal.type("think\r")
    assert "\x1b[2m[reasoning_content]" in terminal.wait_for("[reasoning_content]")
    terminal.wait_for("thought")
    terminal.type("escape\r")
    assert "\x1b]" not in terminal.wait_for(r"a\x1b]0;titleb")
    terminal.type("limit\r")
    terminal.wait_for("(ended by length)")
    terminal.wait_for("> ")

    # ^C at the prompt drops the line; ^D ends.
    terminal.type("not sent")
    terminal.wait_for("not sent")
    time.sleep(0.3)  # a signal just before readline waits is seen only with the next key
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D ends the chat")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(10) == 0
    assert server.bodies[-1]["messages"][-1]["content"] == "limit"
    history = tmp_path / "cache" / "chat_history"
    assert "slow" in history.read_text().splitlines()
    assert history.stat().st_mode & 0o077 == 0


def test_history_comes_back(server: ChatServer, terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("> ")
    terminal.type("first question\r")
    terminal.wait_for("(1)")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(10) == 0
    again = Terminal(server.url, tmp_path / "cache")
    try:
        again.wait_for("> ")
        again.type("\x1b[A\r")  # arrow up
        again.wait_for("(1)")
        assert server.bodies[-1]["messages"][-1]["content"] == "first question"
    finally:
        again.close()


def test_importing_the_command_is_light() -> None:
    program = (
        "import sys, sleb.cli.chat, sleb.client.session, sleb.models.store, sleb.cli.doctor, sleb.doctor.run\n"
        "print(*({'torch', 'transformers', 'fastapi', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("localhost:8000/", "http://localhost:8000/v1"),
        ("https://example.org/api/openai", "https://example.org/api/openai"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_addresses(given: str, url: str) -> None:
    assert base_url(given) == url


@pytest.mark.parametrize(
    "given", ["", "ftp://x/v1", "http://", "http://x:y/v1", "http://x/v1?a=1", "http://[::1"]
)
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(ConfigError, match="write it like"):
        base_url(given)


def test_no_proxy_is_asked_for_this_machine() -> None:
    assert [
        is_loopback(url) for url in ("http://127.0.0.1/v1", "http://localhost:1", "http://[::1]:80/v1")
    ] == [True] * 3
    assert not is_loopback("http://example.org/v1") and not is_loopback("http://10.0.0.1/v1")


@pytest.mark.parametrize(
    ("status", "error", "remedy"),
    [
        (403, {"message": "no"}, "--api-key"),
        (404, {"message": "Not Found"}, "/v1"),
        (404, {"message": "The model `x` does not exist."}, "--model"),
        (400, {"message": "This model's maximum context length is 4096 tokens."}, "/reset"),
        (503, {"message": "overloaded"}, "/retry"),
        (422, {"message": "[{'loc': ['body']}]"}, "change the request"),
    ],
)
def test_remedies(status: int, error: dict[str, str], remedy: str) -> None:
    found = refusal_of(status, error, "http://x/v1")
    assert remedy in str(found) and error["message"] in str(found)
    assert found.status == status


def test_statistics_without_the_servers_own() -> None:
    answer = Answer(content="x", num_pieces=11, first_seconds=1.0, last_seconds=3.0)
    assert answer.statistics() == "first text after 1.00 s, answer about 11 tokens, about 5.0 tokens/s"
    answer.usage = {"prompt_tokens": 7, "completion_tokens": 21}
    assert answer.statistics() == "first text after 1.00 s, prompt 7 tokens, answer 21 tokens, 10.0 tokens/s"
    assert Answer().statistics() == "no text came"
