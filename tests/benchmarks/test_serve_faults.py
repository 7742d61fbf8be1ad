"""`sleb bench serve` against servers that say odd things, say too much, or say nothing any more."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sleb_tests_scripted_server as scripted
from typer.testing import CliRunner

from sleb.benchmarks.load.options import ServeLoadOptions
from sleb.benchmarks.record import Result
from sleb.benchmarks.serve import describe_client, run_serve
from sleb.cli.bench import app
from sleb.client.connection import ClientError

ERROR = "an event is no chunk of an answer"
KEY = "c2vjcmv0=="
WHOLE = [
    b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n\n',
    b"data: [DONE]\n\n",
]


class OddServer(scripted.ScriptedServer):
    """Answers a stream with `pieces(number)`, number from 0, each a while after the other; None: as a good server.

    models: what it answers to GET /models, None: as a good server.
    """

    def __init__(
        self,
        pieces: Callable[[int], list[bytes] | None] = lambda number: None,
        pause: float = 0.0,
        models: tuple[int, dict] | None = None,
        **script: Any,
    ) -> None:
        self.pieces, self.pause, self.models = pieces, pause, models
        super().__init__(scripted.Script(**script))

    async def _stream(self, seen: Any, reader: Any, writer: Any, fault: str | None) -> bool:
        pieces = self.pieces(len(self.seen) - 1)
        if pieces is None:
            return await super()._stream(seen, reader, writer, fault)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(self.pause)
        return False

    def _list(self, writer: Any, path: str) -> bool:
        if self.models is None:
            return super()._list(writer, path)
        return self._answer(writer, *self.models)


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """start(pieces, …) -> a running OddServer."""
    servers = []

    def start_one(*arguments: Any, **script: Any) -> Any:
        servers.append(OddServer(*arguments, **script))
        return servers[-1]

    yield start_one
    for server in servers:
        server.close()


def options(server: Any, concurrency: tuple[int, ...] = (1,), **changes: Any) -> ServeLoadOptions:
    given = {"prompt_tokens": 32, "output_tokens": 6, "num_requests": 3}
    return ServeLoadOptions(**{"url": server.url, "concurrency": concurrency, **given, **changes})


def failures(result: Result) -> dict[str, int]:
    """Of the only level."""
    (rate,) = (each for each in result.measurements if each.metric == "tokens/s")
    return rate.facts["failures"]


def run_cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "200"})


def under_load(pieces: list[bytes]) -> Callable[[int], list[bytes] | None]:
    """Of a server that is good until the load."""
    return lambda number: pieces if number else None


def notices_of(result: Result) -> str:
    return "\n".join(result.notes)


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices": [{"delta": "hi"}]}\n\n',
        b'data: {"choices": ["x"]}',  # without an end: the connection's is it
        b'data: {"choices": 3}\n\n',
        b'data: {"usage": 3}\n\n',
        b"data: " + b"x" * (1 << 20) + b"\n\n",
    ],
)
def test_odd_answers_are_failures(start, event: bytes) -> None:
    """And told as such before the load, if they come then."""
    server = start(under_load([event]))
    ((reason, number),) = failures(run_serve(options(server, timeout=60), {})).items()
    assert number == 3 and reason.startswith(ERROR)
    early = start(lambda number: [event])
    with pytest.raises(ClientError, match=f"small gives no whole streamed answer.*{ERROR}"):
        run_serve(options(early, timeout=60), {})


def test_a_server_that_drips_is_given_up_before_the_load(start) -> None:
    """A byte after the other comes soon, and the whole answer in a minute."""
    server = start(lambda number: [b":"] * 1000, pause=0.06)
    with pytest.raises(ClientError, match=r"no whole answer within 1 s.*--timeout"):
        run_serve(options(server, timeout=1.0), {})


def test_an_endless_answer_is_given_up_before_the_load(start) -> None:
    server = start(lambda number: [b": a comment that nobody reads\n" * 4096] * 10_000, pause=0.001)
    with pytest.raises(ClientError, match="no whole answer within 1 s"):
        run_serve(options(server, timeout=1.0), {})


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            (503, {"error": {"message": "loading"}}),
            r"loading \(HTTP 503\); the server is busy or in trouble: try again",
        ),
        ((401, {"error": {"message": f"no such key: {KEY}"}}), r"no such key: … \(HTTP 401\); .*--api-key"),
        ((400, {"error": {"message": "what?"}}), r"what\? \(HTTP 400\); is http://.*/v1 right"),
        ((500, {}), r"HTTP 500\); the server is busy or in trouble.*log"),
        ((200, {"models": []}), "is no list of models"),
        ((200, {"data": ["x"]}), "is no list of models"),
        ((200, {"data": [{"id": "\ud800"}]}), "is no list of models"),
    ],
)
def test_remedies_of_a_list_of_models(start, models: tuple[int, dict], message: str) -> None:
    """They are this command's: a chat has others."""
    server = start(models=models)
    with pytest.raises(ClientError, match=message) as caught:
        run_serve(options(server, api_key=KEY), {})
    assert "/retry" not in str(caught.value) and KEY not in str(caught.value)


def test_counts_that_are_none_are_not_taken(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OddServer, "_usage", lambda self, body, number: {"prompt_tokens": 12.5})
    server = start(under_load(WHOLE), usage="whole", context=10**6)
    assert "counts no tokens" in notices_of(run_serve(options(server), {}))


@pytest.mark.parametrize("given", [["--api-key", KEY], [f"--api-key={KEY}"]])
def test_a_key_is_nowhere_in_a_result(start, given: list[str]) -> None:
    """A server may repeat it, as in an error."""
    told = json.dumps({"error": {"message": f"the key {KEY} is worn out"}}).encode()
    server = start(under_load([b"data: " + told + b"\n\n"]), key=KEY)
    server.models = (200, {"data": [{"id": "small", "owned_by": f"owner of {KEY}"}]})
    asked = options(server, api_key=KEY)
    result = run_serve(asked, describe_client(asked, ["sleb", "bench", "serve", *given]))
    assert KEY.rstrip("=") not in json.dumps(result.document())
    assert failures(result) == {"error in the stream: the key … is worn out": 3}
    assert "the key … is worn out" in notices_of(result)
    assert shlex.split(result.environment["command"])[-1] == given[-1].replace(KEY, "…")


def test_a_server_that_answers_no_more_ends_the_sweep(start, tmp_path: Path) -> None:
    """The first level and its warm-up are answered, and nothing after them."""
    server = start(fail=lambda number: "hang" if number > 3 else None)
    path = tmp_path / "result.json"
    load = ["--concurrency", "1,2,4,8", "--num-requests", 2, "--timeout", 1]
    done = run_cli("--url", server.url, *load, "--output-tokens", 6, "--json", path)
    assert done.exit_code == 1, done.output
    result = json.loads(path.read_text())
    rates = [row for row in result["rows"] if row["metric"] == "tokens/s"]
    assert [row["completed"] for row in rates] == [2] and result["complete"] is False
    said = "2 at once: warming up: the last requests of 1 had no whole answer within 1 s"
    assert result["settings"]["problem"].startswith(said)
    assert f"error: {said}" in done.output
    assert len(server.seen) == 5


def test_a_level_without_answers_is_kept_and_ends_the_sweep(start) -> None:
    server = start(fail=lambda number: "hang" if number > 1 else None)
    result = run_serve(options(server, (3, 8), timeout=1.0), {})
    (rate,) = (each for each in result.measurements if each.metric == "tokens/s")
    assert (rate.facts["completed"], rate.facts["failed"]) == (0, 3)
    assert "3 at once: turn 1: the last requests of 3 had no whole answer" in result.settings["problem"]


def test_a_comparison_keeps_turns_before_a_server_answers_no_more(start) -> None:
    good, bad = start(gap=0.002), start(gap=0.002, fail=lambda number: "hang" if number > 2 else None)
    asked = ServeLoadOptions(
        compare=(good.url, bad.url),
        concurrency=[1],
        prompt_tokens=24,
        output_tokens=5,
        num_requests=1,
        timeout=1.0,
    )
    result = run_serve(asked, {})
    assert {(each.subject, each.facts["repetitions"]) for each in result.measurements} == {
        ("A", 1),
        ("B", 1),
    }
    assert result.complete is False and "1 at once: B, turn 2" in result.settings["problem"]


def test_names_in_brackets_are_shown_and_written(start, tmp_path: Path) -> None:
    """Rich takes what stands in brackets for its own marks."""
    server = start()
    server.script.models = ("tiny[fp8]", "big[/b]:rocket:")
    path = tmp_path / "result.json"
    arguments = ["--concurrency", 1, "--num-requests", 4, "--output-tokens", 6, "--json", path]
    done = run_cli("--url", server.url, "--model", "tiny[fp8],big[/b]:rocket:", *arguments)
    assert done.exit_code == 0, done.output
    for name in ("tiny[fp8]", "big[/b]:rocket:"):
        assert name in done.output
    assert json.loads(path.read_text())["rows"][0]["subject"] == "tiny[fp8],big[/b]:rocket:"
