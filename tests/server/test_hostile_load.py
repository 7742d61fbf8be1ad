"""Hostile requests while 32 streams run: how long the others wait for a token, and what it takes of memory."""

import json
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

NUM_STREAMS = 32
MAX_BODY = 4 * 2**20
MAX_GAP = 0.25  # seconds
SIZE = MAX_BODY - 1000


def chat(content, **fields):
    return "/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": content}], **fields})


ATTACKS = {
    "digits": ("/v1/completions", json.dumps({"prompt": "1" * 2**20})),
    "digits in a chat": chat("1" * SIZE),
    "digits to be counted": ("/tokenize", json.dumps({"prompt": "1" * SIZE})),
    "empty lists": ("/v1/chat/completions", '{"messages": [' + "[]," * 700_000 + "[]]}"),
    "fewer empty lists": ("/v1/chat/completions", '{"messages": [' + "[]," * 60_000 + "[]]}"),
    "a schema of lists": chat("x", guided_json='{"enum": [' + "[]," * 900_000 + "[]]}"),
    "biases": chat("x", logit_bias={str(i): 1 for i in range(130_000)}),
    "unknown fields": chat("x", **{f"u{i}": 1 for i in range(100_000)}),
    "a long name": chat("x", model="A" * SIZE),
    "escapes": ("/v1/chat/completions", '{"messages": "' + '\\"' * (SIZE // 2) + '"}'),
    "ids": ("/v1/completions", json.dumps({"prompt": [5] * 260_000})),
    "depth": ("/v1/completions", "[" * SIZE),
    "ids that are floats": ("/v1/completions", json.dumps({"prompt": [5.0] * 260_000})),
    "spaces": ("/tokenize", json.dumps({"prompt": " " * SIZE})),
    "a schema of objects": chat("x", guided_json={"properties": {f"p{i}": {} for i in range(6000)}}),
    "answers": (
        "/v1/completions",
        json.dumps(
            {
                "prompt": ["a b c"] * 8,
                "n": 120,
                "max_tokens": 1,
                "seed": 1,
                "logit_bias": {str(i): 1 for i in range(250)},
                "stop": ["x" * 1000] * 60,
            }
        ),
    ),
    "calls": chat(
        "x",
        tool_choice="required",
        tools=[
            {
                "type": "function",
                "function": {
                    "name": f"f{i}",
                    "parameters": {"properties": {f"p{j}": {"type": "string"} for j in range(10)}},
                },
            }
            for i in range(250)
        ],
    ),
}
VALID = ("answers",)


def resident(pid, name):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


class Streams:
    """Streams that run one after another; `longest`: seconds between two tokens of one, since it was set to 0."""

    def __init__(self, url):
        self.longest = 0.0
        self._url = url
        self._stopping = False
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(NUM_STREAMS)]
        for thread in self._threads:
            thread.start()

    def _run(self, number):
        body = {"prompt": f"{number}:", "max_tokens": 400, "stream": True, "ignore_eos": True}
        with httpx.Client(timeout=60) as client:
            while not self._stopping:
                with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
                    last = None
                    for _ in response.iter_lines():
                        now = time.monotonic()
                        self.longest = max(self.longest, now - (last or now))
                        last = now
                        if self._stopping:
                            break

    def stop(self):
        self._stopping = True
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_request_holds_up_the_others(start_process, tiny_model_dir):
    server = start_process("-m", "sleb", "serve", tiny_model_dir, "--port", 0)
    url, pid = server.url, server.process.pid
    greedy = {"prompt": "abc", "max_tokens": 20, "temperature": 0}
    before = httpx.post(f"{url}/v1/completions", json=greedy, timeout=60).json()["choices"]
    streams = Streams(url)
    try:
        time.sleep(3)
        streams.longest = 0.0
        time.sleep(5)
        usual = streams.longest  # on a machine that does other things too
        for name, (path, body) in ATTACKS.items():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
            memory, streams.longest = resident(pid, "VmRSS"), 0.0
            response = httpx.post(url + path, content=body, timeout=60)
            assert response.status_code == 200 if name in VALID else 400 <= response.status_code < 500, name
            assert len(response.content) < 2000 or name in VALID, name
            time.sleep(0.5)
            assert streams.longest < MAX_GAP + usual, name
            assert resident(pid, "VmHWM") - memory < 8 * MAX_BODY, name
    finally:
        streams.stop()
    assert httpx.post(f"{url}/v1/completions", json=greedy, timeout=60).json()["choices"] == before
