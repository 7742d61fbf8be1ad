"""A server on a real socket, in a thread of the test's own process.

With SLEB_TEST_FRONTS=N the engine's side is there, and N front processes speak HTTP.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from sleb.server.context import ServerContext
from sleb.server.engine_process.fronts import Fronts
from sleb.server.options import ServeOptions
from sleb.server.run import base_url, listen, make_server

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


NUM_FRONTS = int(os.environ.get("SLEB_TEST_FRONTS", "0"))

sys.path.append(str(FAKE_ENGINE.parent))  # front processes import the fake engine by its name, too
fake, wire_formats = map(importlib.import_module, ("fake_engine", "wire_formats"))


class RunningServer:
    """A server that runs until `close`; `exit_code` is what the process would have ended with."""

    def __init__(self, engine, max_num_seqs=4, **options):
        self.engine = engine
        options = ServeOptions(**{"port": 0, "warm_up": False, "fronts": NUM_FRONTS, **options})
        self.context = ServerContext.create(engine, options, max_num_seqs)
        self.socket = listen(self.context.options)
        self.url = base_url(self.socket)
        self.port = self.socket.getsockname()[1]
        self.exit_code = None
        if options.fronts:
            self.server = Fronts(self.socket, options)
            self.thread = threading.Thread(target=self._run_fronts, daemon=True)
            self._on_signal = self.server.on_signal
        else:
            self.server = make_server(self.context)
            self.thread = threading.Thread(target=self._run, daemon=True)
            self._on_signal = lambda number: self.server.handle_exit(number, None)
        self._started = threading.Event()
        self.thread.start()
        assert self._started.wait(20)
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def _run(self):
        self.server.on_started = self._started.set
        self.server.run([self.socket])
        self.exit_code = self.server.exit_code

    def _run_fronts(self):
        with self.server:
            self.exit_code = self.server.run(self.context, self._started.set)

    def signal(self, number=signal.SIGTERM):
        self._on_signal(number)

    def post(self, path, **fields):
        return self.http.post(path, json=fields)

    def chat(self, text="hello", **fields):
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **fields)

    def complete(self, prompt="hello", **fields):
        return self.post("/v1/completions", prompt=prompt, **fields)

    def client(self, **options):
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0, "timeout": 20} | options)
        )

    def wait_idle(self):
        """Waits until the engine has no request."""
        wait_until(lambda: not self.engine.has_unfinished() and self.context.engine.num_open == 0)

    def close(self):
        self.http.close()
        if self.thread.is_alive():
            self.signal()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.socket.close()


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(name="wait_until")
def wait_until_fixture():
    return wait_until


@pytest.fixture
def fake_engine():
    return fake.FakeEngine()


@pytest.fixture(scope="session")
def make_fake_engine():
    """make_fake_engine(max_model_len=256) -> an engine without a model."""
    return fake.FakeEngine


@pytest.fixture
def serve_engine() -> Iterator:
    """serve_engine(engine, **options) -> RunningServer, closed at the end of the test."""
    servers = []

    def start(engine, **options):
        servers.append(RunningServer(engine, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.engine.hold.set() if hasattr(server.engine, "hold") else None
        server.close()


@pytest.fixture(scope="session")
def wire():
    """The wire formats as a client knows them."""
    return wire_formats


@pytest.fixture(scope="session")
def start_server():
    """start_server(engine, **options) -> RunningServer; the caller closes it."""
    return RunningServer


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server over the fake engine that the tests of a module share: leave it idle and in order."""
    running = RunningServer(fake.FakeEngine())
    yield running
    running.close()


@pytest.fixture
def fake_engine_script():
    """Path of a script that serves the fake engine in a process of its own."""
    return FAKE_ENGINE


class Process:
    """A server in a process of its own, started and ready."""

    def __init__(self, *command, environment):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | environment,
        )
        self.lines = []
        self.url = None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"Serving at (http://\S+)/v1", line)
            if found:
                self.url = found[1]
                break
        assert self.url, "".join(self.lines)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert httpx.get(f"{self.url}/health", timeout=10).status_code == 200  # it listens when it says so

    def _read(self):
        self.lines.extend(self.process.stderr)

    @property
    def output(self):
        return "".join(self.lines)

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self):
        code = self.process.wait(20)
        self._reader.join(5)
        return code


@pytest.fixture
def start_process():
    processes = []

    def start(*command, environment=()):
        processes.append(Process(*command, environment=dict(environment)))
        return processes[-1]

    yield start
    for each in processes:
        each.process.kill()
        each.process.wait()
        each.process.stderr.close()
