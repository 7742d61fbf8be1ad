"""What a server must survive, each with the answer of the contract; /health tells the truth throughout.

Here are those that no other file has: test_engine_thread.py has the engine's death and clients that go,
test_lifecycle.py the signals, test_errors.py and test_operations.py the full queue, large bodies, slow readers and
broken bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from sleb import LLM

CONTEXT = 512  # of the tiny model


@pytest.fixture(scope="module")
def real(tiny_model_dir, tiny_chain, start_server):
    llm = LLM(tiny_model_dir, tiny_chain, (0, 3), device="cpu", dtype="float32", kv_cache_memory=0.01)
    running = start_server(llm.engine, max_num_seqs=8)
    yield running
    running.wait_idle()
    llm.engine.check_integrity()
    running.close()


def is_healthy(server):
    return server.http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_billion_tokens_are_what_the_context_has_room_for(real, field, stream):
    answer = real.chat(
        "x", **{field: 10**9}, ignore_eos=True, stream=stream, stream_options={"include_usage": True}
    )
    assert answer.status_code == 200
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]
        usage, reason = events[-1]["usage"], events[-2]["choices"][0]["finish_reason"]
    else:
        usage, reason = answer.json()["usage"], answer.json()["choices"][0]["finish_reason"]
    assert usage["total_tokens"] == CONTEXT and reason == "length"
    assert is_healthy(real)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_one_token_too_long(real, stream):
    fits = real.complete([5] * (CONTEXT - 1), max_tokens=1)
    assert fits.json()["usage"]["total_tokens"] == CONTEXT
    answer = real.complete([5] * CONTEXT, max_tokens=1, stream=stream)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert f"{CONTEXT} tokens, but the context holds {CONTEXT}" in error["message"]
    assert is_healthy(real)


def test_a_hundred_stop_strings(real):
    stops = [f"stop {number}" for number in range(100)]
    answer = real.chat("x", stop=stops)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop")
    assert len(answer.content) < 1000
    assert is_healthy(real)


def test_a_client_whose_machine_dies_mid_stream(real):
    """No orderly close: the connection is reset."""
    body = json.dumps({"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    sock = socket.create_connection(("127.0.0.1", real.port), timeout=10)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    assert sock.recv(100)
    assert real.engine.num_running == 1
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    real.wait_idle()
    assert is_healthy(real)


def full_disk():
    return [os.open("/dev/full", os.O_WRONLY)]


def full_pipe():
    """Its reader is there, and reads nothing."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    return [reader, writer]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("make", [full_disk, full_pipe])
def test_a_log_that_takes_no_line(fake_engine_script, make):
    """The address cannot be read from the log either, so the port is chosen here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    descriptors = make()
    process = subprocess.Popen(
        [sys.executable, str(fake_engine_script), str(port)], stdout=descriptors[-1], stderr=descriptors[-1]
    )
    with process, httpx.Client(base_url=url, timeout=10) as client:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(httpx.TransportError):
                assert client.get("/health").json() == {"status": "ok"}
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(3):
            assert client.post("/v1/completions", json={"prompt": "ab"}).json()["choices"][0]["text"] == "ab"
        assert client.get("/health").json() == {"status": "ok"}
        process.terminate()
        assert process.wait(20) == 0
    for each in descriptors:
        os.close(each)


def test_health_through_a_life(start_process, fake_engine_script):
    """ok, also with work; draining once it is told to stop; 503 when the engine is dead."""
    process = start_process(fake_engine_script, 0, "--delay", 0.02, "--drain-timeout", 10)
    with httpx.Client(base_url=process.url, timeout=10) as client:
        health = [client.get("/health").json()["status"]]
        worker = threading.Thread(
            target=lambda: httpx.post(
                f"{process.url}/v1/completions", json={"prompt": "x" * 50, "max_tokens": 50}
            )
        )
        worker.start()
        time.sleep(0.2)
        health.append(client.get("/health").json()["status"])
        process.signal()
        time.sleep(0.2)
        health.append(client.get("/health").json()["status"])
        refused = client.post("/v1/completions", json={"prompt": "x"})
        worker.join()
    assert health == ["ok", "ok", "draining"]
    assert refused.status_code == 503 and re.search("shutting down", refused.text)
    assert process.wait() == 0
