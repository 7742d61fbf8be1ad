"""Peers behind HTTP: the client's clock and count, what servers of each kind take and tell, and whole contests."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sleb.benchmarks import peer_process
from sleb.benchmarks.idle import QuietPolicy
from sleb.benchmarks.peer_engines import Task
from sleb.benchmarks.peer_http import Answer, CompletionClient, ServerError
from sleb.benchmarks.peer_options import PeerOptions, PeerTest, ServerSpec
from sleb.benchmarks.peer_process import PeerError, UnableError
from sleb.benchmarks.peer_prompts import Prompts
from sleb.benchmarks.peer_servers import HttpEngine, find_server, listening_pids, rate_over_http
from sleb.benchmarks.peer_workers.ours_worker import Engine as OursEngine
from sleb.benchmarks.peers import run_peers
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="peers are measured on Linux")

SECONDS_A_TOKEN = 0.002


class StandIn(ThreadingHTTPServer):
    """An OpenAI-compatible server that generates nothing but time. What it can is set by attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.owner = "someone"
        self.takes_ids = self.counts = True
        self.refused: tuple[str, ...] = ()  # fields
        self.path = "/v1/completions"
        self.hosts: list[str] = []  # as requests name it
        self.cards: list[Any] | None = None
        self.number: Callable[[int], Any] = int  # how counts are written
        self.end_after: int | None = None
        self.key: str | None = None
        self.pieces = 1  # into which each event is cut
        self.told: dict[str, dict[str, Any]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            own = [{"id": "org/m", "owned_by": self.server.owner}]
            self._json(200, {"data": own if self.server.cards is None else self.server.cards})
        elif self.path in self.server.told:
            self._json(200, self.server.told[self.path])
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.hosts.append(self.headers["Host"])
        if self.path != server.path:
            return self._json(404, {"detail": "Not Found"})
        if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
            return self._json(401, {"error": {"message": "no key"}})
        unknown = [name for name in server.refused if name in body]
        if unknown:
            return self._json(422, {"detail": f"Unexpected fields in the request: {unknown}"})
        if isinstance(body["prompt"], list) and not server.takes_ids:
            return self._json(400, {"error": {"message": "prompt must be a string"}})
        server.bodies.append(body)
        return self._stream(body)

    def _json(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: dict[str, Any]) -> None:
        server, prompt, wanted = self.server, body["prompt"], body["max_tokens"]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = wanted if server.end_after is None else min(wanted, server.end_after)
        time.sleep(0.03)  # the prompt
        for number in range(count):
            time.sleep(SECONDS_A_TOKEN if number else 0)
            last = "length" if count == wanted else "stop"
            reason = last if number == count - 1 else None
            self._event({"choices": [{"text": " é", "finish_reason": reason}]})
        if server.counts:
            length = len(prompt) if isinstance(prompt, list) else len(prompt.split()) + 1
            usage = {"prompt_tokens": server.number(length), "completion_tokens": server.number(count)}
            self._event({"choices": [], "usage": usage})
        self._piece(b": a comment\n\ndata: [DONE]\n\n")
        self._piece(b"")

    def _event(self, event: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\r\n\r\n"
        size = -(-len(data) // self.server.pieces)
        for start in range(0, len(data), size):
            self._piece(data[start : start + size])

    def _piece(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()


@pytest.fixture
def server() -> Iterator[StandIn]:
    stand_in = StandIn()
    thread = threading.Thread(target=stand_in.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path, byte_tokenizer: Any) -> Path:
    """What prompts are made for: a vocabulary, and a tokenizer for text."""
    (tmp_path / "config.json").write_text('{"vocab_size": 200}')
    byte_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def found(server: StandIn, folder: Path, model: str | None = None, key: str | None = None) -> HttpEngine:
    return find_server(ServerSpec("far", server.url, model), key, Prompts(folder, 0))


def task(folder: Path, test: str, as_text: bool = False, num_runs: int = 1) -> Task:
    return Task(PeerTest.parse(test), Prompts(folder, 0), 1, num_runs, 0, as_text)


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_client_tells_first_from_last_and_counts_what_the_server_counts(
    server: StandIn, pieces: int
) -> None:
    server.pieces = pieces
    body = {"prompt": [1, 2, 3], "max_tokens": 20, "stream": True}
    (answer,) = CompletionClient(server.url).run([body])
    assert (answer.num_tokens, answer.prompt_tokens, answer.finish_reason) == (20, 3, "length")
    assert 0.03 <= answer.first < answer.last
    assert answer.last - answer.first >= 19 * SECONDS_A_TOKEN
    many = CompletionClient(server.url).run([body] * 5)
    assert [each.num_tokens for each in many] == [20] * 5


def test_the_client_s_failures_are_one_line(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    client = CompletionClient(server.url)
    server.refused = ("strange",)
    with pytest.raises(ServerError, match=r"HTTP 422\): Unexpected fields") as caught:
        client.run([{"prompt": "x", "max_tokens": 2, "strange": 1}])
    assert caught.value.status == 422
    with pytest.raises(ServerError, match="in time"):
        client.run([{"prompt": "x", "max_tokens": 2000}], timeout=0.1)
    monkeypatch.setattr(_Handler, "_event", lambda self, event: self.wfile.write(b"5\r\nda"))
    with pytest.raises(ServerError, match="broken stream"):
        client.run([{"prompt": "x", "max_tokens": 2}])
    monkeypatch.setattr(_Handler, "_event", lambda self, event: self._piece(b'data: {"error": "oops"}\n\n'))
    with pytest.raises(ServerError, match="failed: oops"):
        client.run([{"prompt": "x", "max_tokens": 2}])
    with pytest.raises(ServerError, match="connection"):
        CompletionClient("http://127.0.0.1:1/v1").run([{}])


@pytest.mark.parametrize(
    "data",
    [
        "null",
        "[]",
        "7",
        '{"choices": [], "usage": [1]}',
        '{"choices": {"text": "x"}}',
        '{"choices": ["x"]}',
        '{"choices": [{}], "usage": {"completion_tokens": 2.5}}',
    ],
)
def test_events_of_another_form_are_the_server_s_failure(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    server.counts = False
    monkeypatch.setattr(_Handler, "_event", lambda self, event: self._piece(f"data: {data}\n\n".encode()))
    with pytest.raises(ServerError, match="answered in another form"):
        CompletionClient(server.url).run([{"prompt": "x", "max_tokens": 1}])


@pytest.mark.parametrize("head", [b"1" * 70_000, b"-5\r\n", b"0x5\r\n", b"\r\n"])
def test_a_chunk_s_size_that_is_none_is_the_server_s_failure(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(_Handler, "_event", lambda self, event: self.wfile.write(head))
    with pytest.raises(ServerError, match="broken stream"):
        CompletionClient(server.url).run([{"prompt": "x", "max_tokens": 1}])


def test_a_password_in_an_address_is_not_sent_as_a_host(server: StandIn) -> None:
    client = CompletionClient(server.url.replace("//", "//user:secret@"))
    client.run([{"prompt": "x", "max_tokens": 1}])
    assert server.hosts == [server.url.removeprefix("http://").removesuffix("/v1")]


def test_rates_over_http_count_what_the_test_says() -> None:
    answers = [Answer(0.5, 3.0, 128, 70, "length"), Answer(0.6, 4.0, 128, 70, "length")]
    assert rate_over_http(PeerTest.parse("decode-2"), answers) == pytest.approx(2 * 128 / 4.0)
    assert rate_over_http(PeerTest.parse("decode-1"), answers[:1]) == pytest.approx(127 / 2.5)
    assert rate_over_http(PeerTest.parse("prompt-64"), answers[:1]) == pytest.approx(70 / 0.5)
    uncounted = Answer(0.5, 0.5, None, None, "length")
    assert rate_over_http(PeerTest.parse("prompt-64"), [uncounted]) == pytest.approx(64 / 0.5)


def test_a_server_that_takes_ids_gets_new_ones_in_every_run(server: StandIn, folder: Path) -> None:
    server.told["/version"] = {"version": "1.2"}
    engine = found(server, folder)
    assert engine.takes_ids and engine.facts["version"] == "1.2" and engine.facts["model"] == "m"
    assert engine.facts["takes"] == "token ids" and engine.pids == (os.getpid(),)
    server.bodies.clear()
    measured = engine.turn(task(folder, "prompt-32", num_runs=3))
    assert 32 / 0.06 < measured.rate < 32 / 0.03 and len(measured.seconds) == 3
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == 3 and {len(prompt) for prompt in prompts} == {32}
    assert all(50 <= each < 150 for prompt in prompts for each in prompt)  # no special tokens
    body = server.bodies[0]
    assert body["ignore_eos"] and body["temperature"] == 0 and body["model"] == "org/m"
    assert "cache_prompt" not in body
    # Another start asks anew, what a server may remember of the last one; the same start asks all servers the same.
    test = PeerTest.parse("prompt-32")
    first, second = Prompts(folder, 0), Prompts(folder, 0)
    assert first.fresh(test, 1, 1, False) == first.fresh(test, 1, 1, False) != second.fresh(test, 1, 1, False)
    assert first.ids(test, 1) == second.ids(test, 1) != first.ids(test, 2)


def test_llama_cpp_is_told_to_keep_nothing_and_tells_of_itself(server: StandIn, folder: Path) -> None:
    server.owner = "llamacpp"
    server.told["/props"] = {"total_slots": 4, "build_info": "b1-x", "model_ftype": "Q4_1", "n": 0}
    engine = found(server, folder)
    assert (engine.facts["version"], engine.facts["weights"], engine.facts["parallel"]) == ("b1-x", "Q4_1", 4)
    engine.turn(task(folder, "prompt-8"))
    assert server.bodies[-1]["cache_prompt"] is False


def test_a_server_that_takes_text_only_gets_text(server: StandIn, folder: Path) -> None:
    server.takes_ids = False
    engine = found(server, folder)
    assert not engine.takes_ids and engine.facts["takes"] == "text"
    engine.turn(task(folder, "prompt-8", as_text=True))
    assert isinstance(server.bodies[-1]["prompt"], str)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PeerError, match=r"must be a string; .*no tokenizer.json"):
        found(server, folder)


def test_transformers_own_fields_are_found(server: StandIn, folder: Path) -> None:
    """It refuses what OpenAI's API lacks, and ids; its generation_config ignores the end of a sequence."""
    server.refused, server.takes_ids = ("ignore_eos", "repetition_penalty"), False
    engine = found(server, folder, model="/a/folder")
    engine.turn(task(folder, "decode-2", as_text=True))
    body = server.bodies[-1]
    assert json.loads(body["generation_config"])["min_new_tokens"] == body["max_tokens"] == 128
    assert body["model"] == "/a/folder" and engine.facts["model"] == "folder"


def test_what_a_server_cannot_do_is_said(server: StandIn, folder: Path) -> None:
    engine = found(server, folder)
    server.end_after = 17
    with pytest.raises(UnableError, match="17 of 128 tokens: it does not ignore"):
        engine.turn(task(folder, "decode-1"))
    server.counts = False
    with pytest.raises(UnableError, match="an unknown number of 128"):
        engine.turn(task(folder, "decode-1"))
    server.end_after = None
    assert engine.turn(task(folder, "decode-1")).rate > 0  # cut at the length asked for: whole
    server.key = "k"
    with pytest.raises(PeerError, match="no key"):
        found(server, folder)
    assert found(server, folder, key="k").takes_ids
    server.path = "/v1/chat/completions"
    with pytest.raises(PeerError, match=r"cannot be compared: .*HTTP 404") as caught:
        found(server, folder, key="k")
    assert str(caught.value).count("404") == 1  # other forms are not tried
    with pytest.raises(PeerError, match="no server at"):
        find_server(ServerSpec("far", "http://127.0.0.1:1/v1"), None, Prompts(folder, 0))


def test_what_a_server_tells_in_another_form_ends_no_contest(server: StandIn, folder: Path) -> None:
    server.cards = [7, {"id": 7}, {"owned_by": "x"}]
    assert found(server, folder).facts["model"] is None
    server.number = str
    with pytest.raises(PeerError, match="another form: completion_tokens is '2'"):
        found(server, folder)


def test_who_listens_is_found(server: StandIn) -> None:
    port = server.server_address[1]
    assert listening_pids(port) == (os.getpid(),)
    assert listening_pids(1) == ()


def test_prompts_need_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        Prompts(tmp_path, 0)


def test_text_is_of_words_that_are_one_token_each(tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrst"
    words = [first + second for first in letters for second in letters]
    vocabulary = {f"Ġ{word}": number for number, word in enumerate(words)} | {"<s>": 400, "Ġ7": 401}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (tmp_path / "config.json").write_text('{"vocab_size": 402}')
    (text,) = Prompts(tmp_path, 0).fresh(PeerTest.parse("prompt-50"), 1, 1, as_text=True)
    assert len(text.split()) == 50 and set(text.split()) <= set(words)


SERVED_ENGINE = """
import json, sys
sys.path.insert(0, {tests!r})

class Engine:
    def __init__(self, weight_format, depths, **options):
        self.facts = {{"version": "1", "environment": {{"cpu": "x"}}, "decode_bytes_per_token": {{}}}}
        self.depths = depths

    def serve(self):
        import threading, test_peers_http
        self.server = test_peers_http.StandIn()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        url = self.server.url.removesuffix("/v1")
        return {{"url": url, "models": {{str(depth): f"m:{{depth}}" for depth in self.depths}}}}
"""


@pytest.fixture
def contest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a contest of servers, ours a stand-in too."""
    workers = folder / "workers"
    shutil.copytree(peer_process.WORKER_MAIN.parent, workers, ignore=shutil.ignore_patterns("__pycache__"))
    (workers / "ours_worker.py").write_text(SERVED_ENGINE.format(tests=str(Path(__file__).parent)))
    monkeypatch.setattr(peer_process, "WORKER_MAIN", workers / "worker_main.py")
    monkeypatch.setattr(peer_process, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(peer_process, "_LISTEN_SECONDS", 0.05)

    def run(
        *servers: ServerSpec, tests: tuple[str, ...], say: Callable[[str], None] = print
    ) -> dict[str, Any]:
        options = PeerOptions(
            model="m",
            folder=folder,
            model_name="m",
            peers=[],
            servers=servers,
            tests=[PeerTest.parse(name) for name in tests],
            depths=(0, 6),
            threads=2,
            repetitions=2,
            policy=QuietPolicy(wait_seconds=0.0, limit=1.0, retries=0),
        )
        return run_peers(options, say=say)

    return run


def test_servers_meet_our_server_in_turns(server: StandIn, contest: Callable[..., dict[str, Any]]) -> None:
    server.told["/props"] = {"total_slots": 4, "model_ftype": "Q4_1"}
    absent = ServerSpec("absent", "http://user:secret@127.0.0.1:1/v1")
    said: list[str] = []
    specs = (ServerSpec("far", server.url), absent)
    result = contest(*specs, tests=("decode-8", "prompt-16"), say=said.append)
    assert result["complete"] and list(result["failures"]) == ["absent"]
    assert any("no server at" in text and "takes no part" in text for text in said)
    rows = {(row["test"], row["weight_format"]): row for row in result["rows"]}
    tests, labels = ("decode-8", "prompt-16"), ("bf16-http", "bf16-http:6")
    assert set(rows) == {(test, label) for test in tests for label in labels}
    assert all(0.2 < row["ratio"] < 5 and row["http"] for row in rows.values())
    assert rows["decode-8", "bf16-http"]["rate"] <= 8 * 128 / (0.03 + 127 * SECONDS_A_TOKEN)
    assert {facts["transport"] for facts in result["engines"].values()} == {"HTTP"}
    assert set(result["memory"]) == {"sleb-bf16-http", "far"}
    (notice,) = (text for text in result["conditions"]["notices"] if "4 requests at once" in text)
    assert notice.startswith("far ") and server.url not in json.dumps(result)
    assert any("far has quantised weights (Q4_1)" in text for text in result["conditions"]["notices"])
    assert "no server at http://server:1 (" in result["failures"]["absent"]
    assert "secret" not in json.dumps(result)


def test_a_test_that_a_server_cannot_do_costs_it_no_other(
    server: StandIn, contest: Callable[..., dict[str, Any]]
) -> None:
    server.end_after = 5
    result = contest(ServerSpec("far", server.url), tests=("decode-1", "prompt-16"))
    assert result["complete"] and list(result["failures"]) == ["far, decode-1"]
    assert {row["test"] for row in result["rows"]} == {"prompt-16"}


def test_our_own_worker_serves_every_depth(
    tiny_model_dir: Path, tiny_chain: LayerMap, tmp_path: Path
) -> None:
    """The real one, in this process: found as any server is, its tokens those that it computes without HTTP."""
    path = tmp_path / "map.json"
    tiny_chain.save(path)
    common: dict[str, Any] = {"threads": 1, "max_context": 48, "max_batch": 2, "kv_gib": 0.01}
    engine = OursEngine(
        str(tiny_model_dir),
        str(path),
        [0, 3],
        "bf16",
        step_tokens=None,
        shown_command=["sleb"],
        decode_shape=(8, 4),
        **common,
    )
    shares = engine.facts["decode_bytes_per_token"]
    assert shares["3"] < shares["0"] and engine.facts["environment"]["command"] == "sleb"
    direct = engine.run([[65, 66, 67]], 4, 3)
    assert direct["num_tokens"] == 4
    served = engine.serve()
    assert set(served["models"]) == {"0", "3"} and served["models"]["3"].endswith(":sleb-3")
    spec = ServerSpec("ours", f"{served['url']}/v1", served["models"]["3"])
    prompts = Prompts(tiny_model_dir, 0)
    peer = find_server(spec, None, prompts)
    assert peer.takes_ids and peer.facts["version"] == engine.facts["version"]
    assert peer.pids == (os.getpid(),)
    test = PeerTest("decode", 2, 8, 4)
    measured = peer.turn(Task(test, prompts, 1))
    assert measured.rate > 0
    single = peer.turn(Task(PeerTest("decode", 1, 8, 4), prompts, 1))
    assert 0 < single.seconds[0] <= single.seconds[1]  # the tiny model's tokens may come in one piece
