"""A server in several processes, over real sockets: it answers as one process does, and nobody is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from sleb.errors import ConfigError
from sleb.server.options import ServeOptions
from sleb.server.run import listen

LONG = {"prompt": "x" * 50, "max_tokens": 5000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module", params=[1, 2])
def fronted(request, start_server, make_fake_engine):
    running = start_server(make_fake_engine(4096), fronts=request.param)
    yield running
    running.close()


@pytest.fixture(scope="module")
def alone(start_server, make_fake_engine):
    running = start_server(make_fake_engine(4096), fronts=0)
    yield running
    running.close()


def said(text):
    return [{"role": "user", "content": text}]


REQUESTS = {
    "chat": ("/v1/chat/completions", {"messages": said("hello, wörld"), "logprobs": True, "top_logprobs": 2}),
    "chat of three": ("/v1/chat/completions", {"messages": said("abc"), "n": 3, "seed": 4}),
    "completion": ("/v1/completions", {"prompt": ["ab", "cd"], "n": 2, "echo": True, "logprobs": 1}),
    "scored": ("/v1/completions", {"prompt": "abcd", "max_tokens": 0, "prompt_logprobs": 1}),
    "response": ("/v1/responses", {"input": "hello", "store": False}),
    "message": ("/v1/messages", {"messages": said("hello"), "max_tokens": 9}),
    "ollama": ("/api/chat", {"model": "fake", "messages": said("hello")}),
    "rules": ("/v1/completions", {"prompt": "abc", "allowed_token_ids": [64, 65]}),
    "grammar": ("/v1/chat/completions", {"messages": said("abc"), "guided_regex": "[a-c]+"}),
    "bad grammar": ("/v1/chat/completions", {"messages": said("abc"), "guided_regex": "[a-"}),
    "too long": ("/v1/completions", {"prompt": "x" * 5000}),
    "no token": ("/v1/completions", {"prompt": [1, 99_999]}),
    "no model": ("/v1/completions", {"model": "nobody", "prompt": "a"}),
    "too many": ("/v1/completions", {"prompt": "a", "n": 128, "best_of": 128}),
}
_VARYING = re.compile(
    r'"(id|item_id|created|created_at|completed_at|modified_at|timings|metrics|\w+_duration|request_id|system_fingerprint)":'
    r'("[^"]*"|[\d.e+-]+|null|\{[^}]*\})'
)


def shown(response):
    text = response.text
    return response.status_code, response.headers["content-type"], _VARYING.sub("", text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_those_of_one_process(fronted, alone, name, stream):
    path, body = REQUESTS[name]
    if stream and "prompt_logprobs" in body:
        return
    ours, theirs = (each.http.post(path, json=body | {"stream": stream}) for each in (fronted, alone))
    assert shown(ours) == shown(theirs)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/api/tags", "/openapi.json", "/health", "/ready", "/version", "/nothing"]
)
def test_what_is_told_without_the_engine_is_the_same(fronted, alone, path):
    assert shown(fronted.http.get(path)) == shown(alone.http.get(path))


def test_a_kept_answer_is_found_at_every_front(fronted):
    """Each request of a new connection, which the kernel gives to any front."""
    for _ in range(8):
        answer = httpx.post(f"{fronted.url}/v1/responses", json={"input": "hello"}).json()
        path = f"{fronted.url}/v1/responses/{answer['id']}"
        assert httpx.get(path).json() == answer
        again = {"input": "again", "previous_response_id": answer["id"]}
        assert httpx.post(f"{fronted.url}/v1/responses", json=again).status_code == 200
        assert httpx.get(f"{path}/input_items").json()["data"][0]["content"][0]["text"] == "hello"
        reference = [{"type": "item_reference", "id": answer["output"][0]["id"]}, *said("b")]
        assert httpx.post(f"{fronted.url}/v1/responses", json={"input": reference}).status_code == 200
        assert httpx.delete(path).json()["deleted"] is True
        assert httpx.get(path).status_code == 404


def test_an_answer_that_is_being_made_is_found_and_cancelled_at_every_front(fronted, wait_until):
    engine = fronted.engine
    engine.delay = 0.01
    try:
        for _ in range(6):
            body = {"input": "x" * 500, "stream": True}
            with httpx.stream("POST", f"{fronted.url}/v1/responses", json=body) as response:
                lines = (line for line in response.iter_lines() if line.startswith("data: "))
                identifier = json.loads(next(lines)[6:])["response"]["id"]
                path = f"{fronted.url}/v1/responses/{identifier}"
                assert httpx.get(path).json()["status"] == "in_progress"
                assert httpx.post(f"{path}/cancel").json()["status"] == "cancelled"
                list(lines)
    finally:
        engine.delay = 0.0
    fronted.wait_idle()


def total(text, name, **labels):
    found = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
    return sum(
        float(value)
        for given, value in found
        if all(f'{key}="{each}"' in given for key, each in labels.items())
    )


def test_metrics_are_those_of_all_processes(fronted, alone):
    before = {each: each.http.get("/metrics").text for each in (fronted, alone)}
    for server in (fronted, alone):
        for _ in range(7):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "abcd", "max_tokens": 3})
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "frobnicate": 1})
    for name in ("generation_tokens_total", "prompt_tokens_total", "e2e_request_latency_seconds_count"):
        grown = [
            total(server.http.get("/metrics").text, f"sleb:{name}") - total(before[server], f"sleb:{name}")
            for server in (fronted, alone)
        ]
        assert grown[0] == grown[1] > 0, name
    text = fronted.http.get("/metrics").text
    unknown = "sleb:unknown_request_fields_total"
    assert total(text, unknown) - total(before[fronted], unknown) == 1
    pids = [
        os.getpid(),
        *(child.pid for child in psutil.Process().children() if "front" in " ".join(child.cmdline())),
    ]
    resident = sum(psutil.Process(pid).memory_info().rss for pid in pids)
    assert total(text, "process_resident_memory_bytes") >= resident * 0.5
    names = [set(re.findall(r"^# TYPE (\S+) ", each, re.MULTILINE)) for each in (text, before[alone])]
    assert names[0] == names[1]


def test_the_queue_is_one_for_all_fronts(serve_engine, make_fake_engine, wait_until):
    engine = make_fake_engine(4096)
    server = serve_engine(engine, fronts=2, max_queue=2)  # and four that run
    engine.hold.clear()
    with ThreadPoolExecutor(6) as pool:
        waiting = [
            pool.submit(httpx.post, f"{server.url}/v1/completions", json={"prompt": "ab"}, timeout=30)
            for _ in range(6)
        ]
        wait_until(lambda: server.context.engine.num_open == 6)
        for _ in range(6):
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "ab"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
        engine.hold.set()
        assert [each.result().status_code for each in waiting] == [200] * 6


def test_connections_are_counted_together(serve_engine, make_fake_engine, wait_until):
    engine = make_fake_engine()
    server = serve_engine(engine, fronts=2, max_connections=8)
    engine.hold.clear()
    body = json.dumps({"prompt": "abc"}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    socks = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(8)]
    for sock in socks:
        sock.sendall(request)
    wait_until(lambda: server.context.engine.num_open == 8)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one_more:
        assert b"too many connections" in one_more.recv(65536)
    engine.hold.set()
    for sock in socks:
        sock.close()


def test_a_client_that_leaves_is_forgotten_by_the_engine(fronted, wait_until):
    fronted.engine.delay = 0.01
    with httpx.stream("POST", f"{fronted.url}/v1/completions", json=LONG | {"max_tokens": 3000}) as response:
        assert response.status_code == 200
        next(response.iter_lines())
        wait_until(lambda: fronted.context.engine.num_open == 1)
    fronted.wait_idle()
    fronted.engine.delay = 0.0


def children(server):
    return psutil.Process(server.process.pid).children(recursive=True)


def wait_gone(processes, seconds=5.0):
    _, alive = psutil.wait_procs(processes, seconds)
    for each in alive:
        each.kill()
    assert not alive, "left behind"


@pytest.fixture(params=[1, 2])
def process(request, start_process, fake_engine_script):
    return start_process(fake_engine_script, 0, "--delay", 0.02, "--fronts", request.param)


def read_stream(url, seconds):
    """What a stream brings until its end, and how long that took from the moment that `seconds` was given."""
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        seconds.append(time.monotonic())
        rest = "\n".join(lines)
    return rest, time.monotonic()


def test_death_of_the_engines_process_is_told_and_ends_the_fronts(process):
    fronts, begun = children(process), []
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(read_stream, process.url, begun) for _ in range(4)]
        while len(begun) < 4:
            time.sleep(0.01)
        killed = time.monotonic()
        process.process.kill()
        for stream in streams:
            rest, ended = stream.result()
            assert '"code":"engine_dead"' in rest and rest.rstrip().endswith("data: [DONE]")
            assert ended - killed < 1.0
    wait_gone(fronts)
    assert process.wait() == -signal.SIGKILL


def test_death_of_a_front_ends_the_server_and_is_told_by_the_others(process):
    fronts, begun = children(process), []
    outcomes = []

    def read():
        try:
            outcomes.append(read_stream(process.url, begun))
        except httpx.HTTPError:  # of the front that was killed
            outcomes.append(("", time.monotonic()))

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(begun) < 6:
        time.sleep(0.01)
    killed = time.monotonic()
    fronts[0].kill()
    for thread in threads:
        thread.join(10)
    for rest, ended in outcomes:
        assert not rest or '"code":"engine_dead"' in rest
        assert ended - killed < 1.0
    assert process.wait() == 1
    wait_gone(fronts)
    assert "which speaks HTTP, has ended" in process.output and "Traceback" not in process.output


def test_death_of_the_engine_is_told_and_exits_with_1(start_process, fake_engine_script):
    server = start_process(fake_engine_script, 0, "--fail-after", 3, "--fronts", 1)
    fronts = children(server)
    rest, _ = read_stream(server.url, [])
    assert '"code":"engine_dead"' in rest
    assert server.wait() == 1
    wait_gone(fronts)
    assert "RuntimeError: the fake engine breaks" in server.output


def test_a_signal_drains_and_finishes_what_is_open(process):
    fronts = children(process)
    body = LONG | {"max_tokens": 20}
    with httpx.stream("POST", f"{process.url}/v1/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        process.signal()
        refused = httpx.post(f"{process.url}/v1/completions", json={"prompt": "a"})
        while refused.status_code == 200:  # it came before the signal
            refused = httpx.post(f"{process.url}/v1/completions", json={"prompt": "a"})
        assert refused.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{process.url}/health").json() == {"status": "draining"}
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert process.wait() == 0
    wait_gone(fronts)
    assert "Traceback" not in process.output


def test_a_second_signal_forces_all_processes(process):
    fronts = children(process)
    with httpx.stream("POST", f"{process.url}/v1/completions", json=LONG, timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        for each in (*fronts, psutil.Process(process.process.pid)):  # as a terminal tells all of a group
            each.send_signal(signal.SIGINT)
        while httpx.get(f"{process.url}/health").json() != {"status": "draining"}:
            pass
        process.signal(signal.SIGINT)
        assert "shutting_down" in "\n".join(lines)
    assert process.wait() == 128 + signal.SIGINT
    wait_gone(fronts)
    assert "Traceback" not in process.output


def test_a_model_that_cannot_be_loaded_leaves_no_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sleb", "serve", tmp_path / "none", "--port", "0", "--fronts", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not [each for each in psutil.process_iter() if each.ppid() == 1 and _is_front(each)]


def _is_front(process):
    try:
        return "sleb.server.engine_process.front" in process.cmdline()
    except psutil.Error:
        return False


def test_a_port_in_use_is_told_with_several_fronts_too():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="is in use"):
        listen(ServeOptions(port=taken.getsockname()[1], fronts=2))


def test_a_unix_socket_is_shared_by_the_fronts(start_process, fake_engine_script, tmp_path):
    path = tmp_path / "s"
    server = subprocess.Popen([sys.executable, fake_engine_script, "0", "--uds", path, "--fronts", "2"])
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path), retries=20)) as client:
            for _ in range(100):
                try:
                    answer = client.post("http://localhost/v1/completions", json={"prompt": "ab"})
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
        assert answer.json()["choices"][0]["text"] == "ab"
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    assert not path.exists()
