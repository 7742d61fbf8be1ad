"""Requests that end early, and an engine that dies: nothing leaks and nobody waits for ever."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


def start(server, path="/v1/completions", **fields):
    """Sends a request on a raw socket and returns the socket."""
    body = json.dumps(fields).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def receive_all(sock, until=None):
    """Everything until the server closes, or until `until` has come; closes the socket."""
    received = b""
    with sock:
        while (data := sock.recv(65536)) and (until is None or until not in received + data):
            received += data
    return received + data


@pytest.mark.parametrize("stream", [False, True])
def test_closed_connection_aborts_a_running_request(serve_engine, fake_engine, wait_until, stream):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.02
    sock = start(server, prompt="x" * 100, max_tokens=150, ignore_eos=True, stream=stream)
    wait_until(lambda: fake_engine.num_running == 1 and fake_engine.num_steps > 2)
    sock.close()
    begin = fake_engine.num_steps
    server.wait_idle()
    assert fake_engine.num_steps - begin <= 3  # the one in progress, and the time that the news takes
    assert server.context.engine.stats.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_closed_connection_aborts_a_queued_request(serve_engine, fake_engine, wait_until, stream):
    server = serve_engine(fake_engine)
    fake_engine.max_running, fake_engine.delay = 1, 0.02
    first = start(server, prompt="x" * 100, max_tokens=150, ignore_eos=True)
    wait_until(lambda: fake_engine.num_running == 1)
    second = start(server, prompt=["y", "z"], stream=stream)
    wait_until(lambda: fake_engine.num_waiting == 2)
    second.close()
    wait_until(lambda: fake_engine.num_waiting == 0)
    assert fake_engine.num_running == 1
    first.close()
    server.wait_idle()


def test_closed_connection_while_the_engine_has_not_taken_the_request(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine)
    fake_engine.hold.clear()
    first = start(server, prompt="a", stream=True)
    wait_until(lambda: fake_engine.num_running == 1)
    second = start(server, prompt="b", stream=True)
    wait_until(lambda: server.context.engine.num_open == 2)
    second.close()
    wait_until(lambda: server.context.engine.num_open == 1)
    fake_engine.hold.set()
    assert receive_all(first, b"[DONE]").count(b"data:") >= 3
    server.wait_idle()


def test_client_that_stops_reading_and_goes_is_aborted(serve_engine, fake_engine, wait_until):
    fake_engine.max_model_len = 10**6
    server = serve_engine(fake_engine)
    sock = start(server, prompt="x" * 10, max_tokens=10**6 - 100, ignore_eos=True, stream=True)
    wait_until(lambda: fake_engine.num_steps > 20_000, 20)  # more than the socket's buffers hold
    sock.close()
    server.wait_idle()


def test_many_clients_at_once_each_get_their_own_text(server):
    texts = [f"client {number} says {'x' * number}" for number in range(40)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda text: server.chat(text, stream=len(text) % 2 == 0).text, texts))
    for text, answer in zip(texts, answers, strict=True):
        if answer.startswith("{"):
            assert json.loads(answer)["choices"][0]["message"]["content"] == text
        else:
            lines = [json.loads(line[6:]) for line in answer.split("\n\n") if line.startswith("data: {")]
            assert "".join(line["choices"][0]["delta"].get("content", "") for line in lines) == text
    server.wait_idle()


@pytest.mark.parametrize("way", ["step", "add"])
def test_death_of_the_engine_reaches_everybody(serve_engine, fake_engine, wait_until, caplog, way):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.02
    streamed = start(server, prompt="x" * 100, max_tokens=90, stream=True)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(server.complete("y" * 100, max_tokens=90)))
    waiting.start()
    wait_until(lambda: fake_engine.num_running == 2)
    if way == "step":
        fake_engine.error = RuntimeError("secret detail")
    else:
        fake_engine.add_error = KeyError("secret detail")
        assert server.complete("z").status_code == 503
    wait_until(lambda: server.context.engine.dead is not None)
    for response in (
        server.http.get("/health"),
        server.http.get("/ready"),
        server.complete("z"),
        server.chat("z"),
    ):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"
        assert "secret" not in response.text
    waiting.join(10)
    assert answers[0].status_code == 503
    received = receive_all(streamed)
    last, done = received.split(b"data: ")[-2:]
    assert json.loads(last.split(b"\n")[0])["error"]["code"] == "engine_dead"
    assert done.startswith(b"[DONE]\n\n")
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert server.exit_code == 1
    assert any("secret detail" in str(record.exc_info) for record in caplog.records if record.exc_info)


def test_death_of_an_idle_engine_stops_the_server(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine)
    fake_engine.has_unfinished = lambda: 1 / 0
    assert server.complete("a").json()["error"]["code"] == "engine_dead"
    server.thread.join(10)
    assert server.exit_code == 1


def test_idle_engine_takes_no_steps(server):
    server.wait_idle()
    steps = server.engine.num_steps
    assert server.http.get("/health").status_code == 200
    assert server.engine.num_steps == steps


def test_drain_refuses_new_and_finishes_old(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.02
    sock = start(server, prompt="x" * 30, max_tokens=30, stream=True)
    wait_until(lambda: fake_engine.num_running == 1)
    server.signal()
    wait_until(lambda: server.context.engine.draining)
    refused = server.complete("a")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert server.http.get("/health").json() == {"status": "draining"}
    assert server.http.get("/ready").status_code == 503
    received = receive_all(sock)
    assert b'"finish_reason":"length"' in received or b'"finish_reason":"stop"' in received
    assert received.rstrip().endswith(b"0")  # the last chunk of the transfer: a whole answer
    server.thread.join(10)
    assert server.exit_code == 0


def test_requests_are_taken_for_a_while_after_the_signal(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine, shutdown_delay=1.0)
    server.signal()
    wait_until(lambda: server.http.get("/ready").status_code == 503)
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.complete("ab").status_code == 200
    assert server.http.get("/ready").json()["error"]["code"] == "shutting_down"
    wait_until(lambda: server.context.engine.draining)
    server.thread.join(10)
    assert server.exit_code == 0


def test_drain_gives_up_after_its_timeout(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine, drain_timeout=0.2)
    fake_engine.delay = 0.05
    sock = start(server, prompt="x" * 200, max_tokens=50, stream=True)
    wait_until(lambda: fake_engine.num_running == 1)
    server.signal()
    received = receive_all(sock)
    assert b'"code":"shutting_down"' in received
    assert b"data: [DONE]\n\n" in received
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert not fake_engine.has_unfinished()
