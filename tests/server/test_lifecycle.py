"""Processes: signals, exit codes, what is printed, and flags that are refused."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from sleb.cli import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def stream_completion(url, num_tokens=20):
    body = {"prompt": "x" * 50, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20)


def test_sigterm_drains_an_open_stream(start_process, fake_engine_script):
    server = start_process(fake_engine_script, 0, "--delay", 0.05)
    with stream_completion(server.url) as response:
        lines = response.iter_lines()
        first = next(lines)
        server.signal()
        rest = list(lines)
    assert first.startswith("data: {")
    assert rest[-2:] == ["data: [DONE]", ""]
    assert sum('"text":"x"' in line for line in [first, *rest]) == 20
    assert server.wait() == 0
    assert "curl http://127.0.0.1:" in server.output
    assert re.search(
        r"request \S+: POST /v1/completions 200 .*, model fake:sleb-1, prompt 50 tokens .*, length",
        server.output,
    )
    assert "Traceback" not in server.output


def test_a_second_signal_forces(start_process, fake_engine_script):
    server = start_process(fake_engine_script, 0, "--delay", 0.05)
    with stream_completion(server.url, 2000) as response:
        lines = response.iter_lines()
        next(lines)
        server.signal(signal.SIGINT)
        while httpx.get(f"{server.url}/health").json() != {"status": "draining"}:
            pass
        server.signal(signal.SIGINT)
        rest = list(lines)
    assert any("shutting_down" in line for line in rest)
    assert server.wait() == 128 + signal.SIGINT
    assert "Traceback" not in server.output


def test_death_of_the_engine_ends_the_process(start_process, fake_engine_script):
    server = start_process(fake_engine_script, 0, "--fail-after", 3)
    with stream_completion(server.url) as response:
        body = response.read().decode()
    assert '"code":"engine_dead"' in body
    assert body.endswith("data: [DONE]\n\n")
    assert server.wait() == 1
    assert "RuntimeError: the fake engine breaks" in server.output


def test_an_engine_that_hangs_does_not_keep_the_process(start_process, fake_engine_script):
    server = start_process(fake_engine_script, 0, "--delay", 1000, "--drain-timeout", 0.2)
    with stream_completion(server.url) as response:
        server.signal()
        body = response.read().decode()
    assert '"code":"shutting_down"' in body
    assert server.wait() == 1


def run_sleb(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sleb", "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
    )


def test_port_in_use_is_told_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_sleb("no-such/model", "--port", port)
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr
    assert "no-such" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tiers", "0,x"], "--tiers is 'x'; it must be a list of integers"),
        (["--port", "70000"], "--port is 70000"),
        (["--max-queue", "-1"], "--max-queue is -1"),
        (["--drain-timeout", "-1"], "--drain-timeout is -1"),
        (["--api-key", " "], "--api-key is empty"),
        (["--dtype", "float8"], "dtype 'float8' is not known"),
        (["--tiers", "0,0"], "names a depth twice"),
        (["--host", "not.a.host.invalid"], "host 'not.a.host.invalid'"),
    ],
)
def test_bad_flags(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sleb", "serve", "no-such/model", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
