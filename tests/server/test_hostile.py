"""Whoever knocks: over a real socket, before and after a key is asked for."""

import asyncio
import json
import logging
import re
import socket
import time
from contextlib import closing
from dataclasses import replace

import pytest

from sleb.server.body_reader import BodyReader
from sleb.server.wire import BoundedProtocol, WireLimits

BODY = b'{"prompt": "abc", "max_tokens": 1}'
LENGTH = len(BODY)


def connect(server, receive_buffer=None):
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(10)
    client.connect(("127.0.0.1", server.port))
    return closing(client)


def read_all(client):
    """What comes until the server closes."""
    data = b""
    try:
        while chunk := client.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def status_of(data):
    return int(data.split(b" ")[1]) if data else None


def send(server, data, pieces=1, close=True):
    """All of an answer to raw bytes; the connection is asked to be closed behind it."""
    with connect(server) as client:
        try:
            for _ in range(pieces):
                client.sendall(data)
        except (ConnectionResetError, BrokenPipeError):
            pass
        if close:
            return read_all(client)
        return client.recv(65536)


def head(method="POST", path="/v1/completions", length=LENGTH, **headers):
    lines = {"Host": "127.0.0.1", "Content-Length": length} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    if length is None:
        del lines["Content-Length"]
    return (
        f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    ).encode()


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (b"a:b\r\n" * 10_000, 200),
        (b"x" * 2**20, 10),
        (b"a: " + b"x" * 100_000, 10),
    ],
    ids=["lines", "name", "value"],
)
def test_headers_without_end_are_refused_early(server, data, pieces):
    with connect(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        try:
            for _ in range(pieces):
                client.sendall(data)
                sent += len(data)
        except (ConnectionResetError, BrokenPipeError):
            pass
        answer = read_all(client)
    assert status_of(answer) in (431, None)  # None: reset while it was still sending
    assert server.http.get("/health").status_code == 200


def test_too_many_headers_are_refused_with_a_reason(server, caplog):
    answer = send(server, head("GET", "/health", None, **{f"x{i}": 1 for i in range(300)}))
    assert status_of(answer) == 431
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].startswith("the request has more")
    assert "127.0.0.1" in caplog.text


def test_a_long_url_is_refused_once(server, caplog):
    assert status_of(send(server, head("GET", "/" + "a" * 70_000, None))) == 431
    assert caplog.text.count("the headers are larger than") == 1
    assert "Traceback" not in caplog.text


def test_what_is_no_http_is_told_so(server):
    assert b"is it meant for https" in send(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")


@pytest.mark.parametrize("name", ["Upgrade", "upgrade"])
def test_a_proposal_of_http_2_is_passed_over(server, name):
    # What Java's HttpClient sends with the first request to each server; RFC 9110, 7.8 lets a server ignore it.
    proposal = {"Connection": "Upgrade, HTTP2-Settings", name: "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
    with connect(server) as client:
        client.sendall(head(**proposal) + BODY)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")
        client.sendall(head(**proposal | {"Connection": "close, Upgrade, HTTP2-Settings"}) + BODY)
        assert read_all(client).startswith(b"HTTP/1.1 200 OK")


def test_a_compressed_body_is_named_as_that(server):
    answer = server.http.post("/v1/completions", content=BODY, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert "send it without compression" in answer.json()["error"]["message"]


def test_trailers_and_framing_are_bounded(server):
    chunked = head(length=None, Transfer_Encoding="chunked")
    trailers = chunked + b"1\r\n{\r\n0\r\n" + b"a: b\r\n" * 30_000
    assert status_of(send(server, trailers)) in (431, None)
    extensions = chunked + b"1;" + b"x" * 200_000 + b"\r\n"
    assert status_of(send(server, extensions)) in (431, None)
    small = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    whole = head(length=None, Transfer_Encoding="chunked", Connection="close") + small
    assert status_of(send(server, whole)) == 200


def test_many_requests_at_once_on_one_connection(server):
    assert status_of(send(server, head("GET", "/health", None) * 5000)) in (200, None)
    three = head("GET", "/health", None) * 2 + head("GET", "/health", None, Connection="close")
    assert send(server, three).count(b"HTTP/1.1 200") == 3


@pytest.fixture
def impatient(serve_engine, fake_engine):
    return serve_engine(fake_engine, read_timeout=0.2)


@pytest.mark.parametrize("data", [b"", b"\r\n", b"GET /health HT", head()[:-2]], ids=repr)
def test_a_head_must_come_in_time(impatient, data):
    begin = time.monotonic()
    answer = send(impatient, data)
    assert time.monotonic() - begin < 5
    assert status_of(answer) in ((408, None) if data.strip() else (None,))


def test_a_body_must_come_in_time(impatient):
    for path in ("/v1/completions", "/v1/models"):  # one that is read, one that nobody reads
        answer = send(impatient, head(path=path, length=10**6) + b"{")
        assert status_of(answer) == {"/v1/completions": 408, "/v1/models": 405}[path]
    # A connection that went on after an answer that came before the end of a body.
    with connect(impatient) as client:
        client.sendall(head(path="/v1/models", length=4) + b"{")
        assert status_of(client.recv(65536)) == 405
        client.sendall(b'"a}' + head("GET", "/health", None, Connection="close"))
        assert status_of(read_all(client)) == 200


def test_half_bodies_without_a_key_are_answered_at_once(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("key",))
    with connect(server) as client:
        client.sendall(head(length=10**6) + b"{")
        assert status_of(client.recv(65536)) == 401


def test_the_oldest_of_too_many_half_bodies_gives_way(serve_engine, fake_engine):
    server = serve_engine(fake_engine, max_body_mb=0.01)
    part = b"x" * 10_000
    clients = []
    try:
        for _ in range(40):
            client = connect(server).thing
            clients.append(client)
            client.sendall(head(length=10_100) + part)
            time.sleep(0.01)
        assert status_of(read_all(clients[0])) == 408
        assert server.complete("abc", max_tokens=1).status_code == 200
    finally:
        for client in clients:
            client.close()


class HalfRequest:
    """A request whose body stops half-way, `delay` turns of the event loop after the others'."""

    def __init__(self, delay):
        self.headers = {}
        self._delay = delay

    async def stream(self):
        for _ in range(self._delay):
            await asyncio.sleep(0)
        yield b"x" * 10_000
        await asyncio.Event().wait()


def test_a_half_body_that_gives_way_is_told_so_once():
    """Others come between its being told and its end."""

    async def read_all():
        reader = BodyReader(10_100, 0.2)
        return await asyncio.gather(
            *(reader.read(HalfRequest(delay)) for delay in range(60)), return_exceptions=True
        )

    assert {getattr(each, "status", each) for each in asyncio.run(read_all())} == {408}


class Transport:
    """What waits in it is up to the test; a kernel's own buffers may take any answer whole."""

    def __init__(self):
        self.size = 10**6
        self.aborted = False

    def get_write_buffer_size(self):
        return self.size

    def abort(self):
        self.aborted = True

    def get_extra_info(self, name):
        return None


def test_a_client_that_reads_nothing_is_let_go(server):
    async def serve():
        server_state, limits = server.server.server_state, WireLimits(write_timeout=0.04)
        protocol = BoundedProtocol(limits, server.server.config, type(server_state)(), {})
        transport = Transport()
        protocol.connection_made(transport)
        protocol.pause_writing()
        for _ in range(20):  # slowly, but it reads
            await asyncio.sleep(0.01)
            transport.size -= 1000
        assert not transport.aborted
        protocol.resume_writing()
        await asyncio.sleep(0.1)
        assert not transport.aborted
        protocol.pause_writing()
        await asyncio.sleep(0.1)
        assert transport.aborted
        protocol.connection_lost(ConnectionResetError())

    asyncio.run(serve())


def test_idle_connections_give_way(serve_engine, fake_engine):
    server = serve_engine(fake_engine, max_connections=5)
    idle = [connect(server).thing for _ in range(8)]
    try:
        time.sleep(0.05)
        assert server.complete("abc", max_tokens=1).status_code == 200
        assert read_all(idle[0]) == b""
    finally:
        for client in idle:
            client.close()


def test_busy_connections_do_not(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine, max_connections=2)
    fake_engine.hold.clear()
    busy = [connect(server).thing for _ in range(2)]
    try:
        for client in busy:
            client.sendall(head() + BODY)
        wait_until(lambda: server.context.engine.num_open == 2)
        assert status_of(send(server, head("GET", "/health", None))) in (503, None)
        fake_engine.hold.set()
        assert [status_of(client.recv(65536)) for client in busy] == [200, 200]
    finally:
        for client in busy:
            client.close()


HOSTS = {
    "localhost": 200,
    "localhost:8000": 200,
    "LOCALHOST.": 200,
    "a.localhost": 200,
    "127.0.0.1:9": 200,
    "192.168.0.7": 200,
    "[::1]:8000": 200,
    "gpu-box:8000": 200,
    "sleb.default.svc.cluster.local": 200,
    "evil.example": 403,
    "evil.example:8000": 403,
    "127.0.0.1.evil.example": 403,
    "localhost.evil.example": 403,
}


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_is_a_name_of_the_server(server, host):
    response = server.http.get("/v1/models", headers={"Host": host})
    assert response.status_code == HOSTS[host]
    if response.status_code == 403:
        assert "--allowed-host" in response.json()["error"]["message"]


def test_names_that_the_operator_allows(serve_engine, make_fake_engine):
    server = serve_engine(make_fake_engine(), allowed_hosts=("llm.example.org",))
    for host, status in {"LLM.example.org:443": 200, "example.org": 403}.items():
        assert server.http.get("/v1/models", headers={"Host": host}).status_code == status
    response = server.http.post(
        "/v1/completions",
        content=BODY,
        headers={"Host": "127.0.0.1:8000", "Origin": "https://llm.example.org"},  # behind a proxy
    )
    assert response.status_code == 200
    any_name = serve_engine(make_fake_engine(), allowed_hosts=("*",))
    assert any_name.http.get("/v1/models", headers={"Host": "x.example"}).status_code == 200


PAGES = [
    ({}, 200),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 200),  # curl -d
    ({"Content-Type": "text/plain"}, 200),
    ({"Origin": "http://127.0.0.1:3000"}, 200),
    ({"Origin": "vscode-webview://abc"}, 200),
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Origin": "https://evil.example", "Content-Type": "text/plain"}, 403),
    ({"Origin": "https://evil.example", "Content-Type": "application/json"}, 403),
    ({"Origin": "null", "Content-Type": "text/plain"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
]


@pytest.mark.parametrize(("headers", "status"), PAGES)
def test_pages_of_other_sites_send_nothing(server, headers, status):
    response = server.http.post("/v1/completions", content=BODY, headers=headers)
    assert response.status_code == status
    if status == 403:
        assert "--cors-origin" in response.json()["error"]["message"]


def test_pages_that_the_operator_allows_do(serve_engine, make_fake_engine):
    server = serve_engine(make_fake_engine(), cors_origins=("https://chat.example",))
    for origin, status in {"https://chat.example": 200, "https://evil.example": 403}.items():
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        assert server.http.post("/v1/completions", content=BODY, headers=headers).status_code == status
    every = serve_engine(make_fake_engine(), cors_origins=("*",))
    assert (
        every.http.post("/v1/completions", content=BODY, headers={"Origin": "https://x.example"}).status_code
        == 200
    )


def test_refused_requests_leave_a_line_each(server, caplog, wait_until):
    caplog.set_level(logging.WARNING, logger="sleb.server")
    server.http.get("/v1/models/gpt-9", headers={"X-Request-Id": "mine"})
    server.http.get("/nowhere/%1b[31m")
    server.complete("abc", temperature=-1)
    wait_until(lambda: len(caplog.records) >= 3)  # a line is written after its answer
    lines = [record.getMessage() for record in caplog.records]
    lines = [re.sub(r"in \d+ ms", "in N ms", line) for line in lines]
    assert lines[0] == "request mine: GET /v1/models/gpt-9 404 model_not_found in N ms, from 127.0.0.1"
    assert lines[1].endswith(": GET /nowhere/\\x1b[31m 404 in N ms, from 127.0.0.1")
    assert lines[2].endswith(": POST /v1/completions 400 in N ms, from 127.0.0.1")
    assert len(lines) == 3


def test_a_long_prompt_shows_how_far_it_is(serve_engine, fake_engine, caplog, wait_until):
    caplog.set_level(logging.INFO, logger="sleb.server")
    stats = fake_engine.stats
    fake_engine.stats = lambda: replace(stats(), running={1: 1}, num_prefilled=512, num_to_prefill=3000)
    serve_engine(fake_engine, log_interval=0.02)
    wait_until(lambda: "512 of 3000 prompt tokens computed" in caplog.text)
