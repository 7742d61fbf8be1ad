"""The load and its client, without a server or with one that says what none should."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from sleb.benchmarks.load.client import LoadClient, _Exchange
from sleb.benchmarks.load.events import MAX_EVENT, EventSplitter, Outcome, StreamError, without_key
from sleb.benchmarks.load.load import Load, LoadRequest, LoadResult, arrival_times
from sleb.benchmarks.prompts import Lengths, RandomPrompts, Vocabulary

REQUEST = LoadRequest("completions", "m", b"{}", 8, 4)


class FakeClient:
    """Fills in outcomes as `answer(number)` says: "" for a whole one, "timeout", or an error."""

    num_chunks = 0

    def __init__(self, answer: Callable[[int], str] = lambda number: "", seconds: float = 0.0) -> None:
        self._answer, self._seconds, self._numbers = answer, seconds, itertools.count()

    async def stream(self, path: str, body: bytes, outcome: Outcome) -> None:
        said = self._answer(next(self._numbers))
        outcome.start = 1.0
        await asyncio.sleep(self._seconds)
        outcome.error, outcome.timed_out = said, said == "timeout"
        outcome.chunk_times, outcome.end = [2.0], 3.0


def run_closed(client: FakeClient, concurrency: int, num_requests: int = 20) -> LoadResult:
    load = Load(client)
    return asyncio.run(load.closed([REQUEST] * num_requests, concurrency, lambda progress: None))


def test_requests_whose_turn_comes_too_late_are_not_sent() -> None:
    """All are due at once, within the time of the load, but one may be open and takes half of it."""
    load = Load(FakeClient(seconds=0.15), seconds=0.3)
    result = asyncio.run(load.open([REQUEST] * 50, arrival_times(1e6, "x"), 1, lambda progress: None))
    assert 1 <= len(result.outcomes) <= 3
    assert result.num_unsent == 50 - len(result.outcomes)
    assert not result.has_stalled and not result.interrupted


def test_a_server_that_stalls_ends_a_closed_load() -> None:
    result = run_closed(FakeClient(lambda number: "timeout" if number >= 5 else ""), 1)
    assert (
        result.has_stalled
        and [bool(outcome.error) for outcome in result.outcomes] == [False] * 5 + [True] * 3
    )
    result = run_closed(FakeClient(lambda number: "timeout"), 6, 100)
    assert result.has_stalled and 6 <= len(result.outcomes) < 6 + 6


def test_a_server_that_stalls_ends_an_open_load_with_turns() -> None:
    load = Load(FakeClient(lambda number: "timeout"))
    result = asyncio.run(load.open([REQUEST] * 50, arrival_times(math.inf, ""), 4, lambda progress: None))
    assert result.has_stalled and 4 <= len(result.outcomes) < 4 + 4


@pytest.mark.parametrize("other", ["", "HTTP 500"])
def test_single_timeouts_end_nothing(other: str) -> None:
    result = run_closed(FakeClient(lambda number: other if number % 3 == 2 else "timeout"), 1)
    assert len(result.outcomes) == 20 and not result.has_stalled


def client_of(url: str = "http://127.0.0.1:1/v1", timeout: float = 5.0) -> LoadClient:
    return LoadClient(url, "secret-key", timeout)


def ask(client: LoadClient) -> Outcome:
    outcome = Outcome("m")
    asyncio.run(client.stream("chat/completions", b"{}", outcome))
    return outcome


@pytest.mark.parametrize(
    ("raised", "error", "timed_out"),
    [
        (TimeoutError(errno.ETIMEDOUT, "Connect call failed ('10.0.0.1', 80)"), "Connection timed out", True),
        (
            ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('10.0.0.1', 80)"),
            "refused",
            False,
        ),
        (OSError("no such key: secret-key"), "no such key: …", False),
    ],
)
def test_a_connection_that_fails_is_told_from_an_answer_that_is_late(
    raised: OSError, error: str, timed_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: LoadClient) -> Any:
        raise raised

    monkeypatch.setattr(LoadClient, "_take_connection", fail)
    outcome = ask(client_of())
    assert outcome.error.startswith("no connection (") and error in outcome.error
    assert "10.0.0.1" not in outcome.error and outcome.timed_out is timed_out


def test_an_answer_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(self: LoadClient) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(LoadClient, "_take_connection", wait)
    outcome = ask(client_of(timeout=0.01))
    assert outcome.error == "no whole answer within 0.01 s" and outcome.timed_out


def test_a_lost_connection_ends_a_request_whatever_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that nothing ends would wait for the whole of --timeout."""

    def fail(self: _Exchange, broken: str) -> str:
        raise RuntimeError("a bug")

    async def lose() -> Outcome:
        outcome = Outcome("m")
        exchange = _Exchange(client_of(), outcome)
        monkeypatch.setattr(_Exchange, "_problem", fail)
        with pytest.raises(RuntimeError):
            exchange.lose(None)
        assert exchange.finished.done()
        return outcome

    assert asyncio.run(lose()).error == "the connection closed"


@pytest.mark.parametrize(
    ("url", "path", "host"),
    [
        ("http://127.0.0.1:8000/v1", "/v1/chat/completions", "127.0.0.1:8000"),
        ("http://[2001:db8::1]:8000/v1", "/v1/chat/completions", "[2001:db8::1]:8000"),
        ("https://gw.corp/größe/v1", "/gr%C3%B6%C3%9Fe/v1/chat/completions", "gw.corp"),
    ],
)
def test_heads_of_requests(url: str, path: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    class Connection:
        def send(self, request: bytes, exchange: Any) -> None:
            sent.append(request)
            raise OSError("enough")

        def close(self) -> None:
            pass

    async def connect(self: LoadClient) -> Any:
        return Connection(), False

    monkeypatch.setattr(LoadClient, "_take_connection", connect)
    ask(client_of(url))
    lines = sent[0].split(b"\r\n")
    assert lines[0] == f"POST {path} HTTP/1.1".encode() and lines[1] == f"Host: {host}".encode()
    assert lines[-1] == b"{}" and b"Content-Length: 2" in lines


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        ({"choices": [{"delta": "hi"}]}, "a choice in an event has no delta"),
        ({"choices": ["x"]}, "a choice in an event has no delta"),
        ({"choices": [None]}, "a choice in an event has no delta"),
        ({"choices": {"delta": {"content": "x"}}}, "the choices in an event are no list"),
        ({"choices": 3}, "the choices in an event are no list"),
        ({"choices": [], "usage": "none"}, "the usage in an event holds no counts"),
        ({"choices": [], "usage": {"completion_tokens": "3"}}, "the usage in an event holds no counts"),
        ({"choices": [], "usage": {"prompt_tokens": -3}}, "the usage in an event holds no counts"),
        ({"choices": [], "usage": {"prompt_tokens": True}}, "the usage in an event holds no counts"),
        ([], "an event is no JSON object"),
    ],
)
def test_an_event_that_no_server_should_send(chunk: Any, error: str) -> None:
    answer = Outcome("m")
    assert not answer.take(json.dumps(chunk).encode(), 1.0)
    assert error in answer.error and answer.chunk_times == []


def test_an_error_of_a_thousand_levels_is_one_line() -> None:
    answer = Outcome("m")
    assert not answer.take(b'{"error": ' + b"[" * 1000 + b"]" * 1000 + b"}", 1.0)
    assert answer.error.startswith("error in the stream: ") and len(answer.error) < 600


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": None},
        {"choices": []},
        {},
        {"choices": [{"delta": None, "text": ""}], "usage": None},
        {"choices": [], "usage": {"prompt_tokens": None, "prompt_tokens_details": 3}},
    ],
)
def test_an_event_without_anything_is_none(chunk: Any) -> None:
    answer = Outcome("m", asked_tokens=7)
    assert not answer.take(json.dumps(chunk).encode(), 1.0)
    assert answer.error == "" and answer.num_prompt_tokens == 7 and answer.num_cached_tokens == 0


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 65_530, b"x" * 65_536, b"data: x\n" * 8192])
def test_an_event_without_end_is_given_up(piece: bytes) -> None:
    def feed() -> None:
        for _ in range(2 * MAX_EVENT // len(piece)):
            assert list(splitter.feed(piece)) == []

    splitter = EventSplitter()
    with pytest.raises(StreamError, match="more than 1 MiB"):
        feed()
    assert list(splitter.finish()) == []


def test_a_long_event_comes_whole() -> None:
    splitter = EventSplitter()
    pieces = [b"data: ", *[b"x" * 1000] * 1000, b"\n", b"\n"]
    assert [data for piece in pieces for data in splitter.feed(piece)] == [b"x" * 1_000_000]


def test_keys_are_left_out() -> None:
    assert without_key("no key sk-123456== in xsk-123456==x", "sk-123456==") == "no key … in x…x"
    assert without_key("none of these is nonesuch: none", "none") == "… of these is nonesuch: …"
    assert without_key("nothing", None) == without_key("nothing", "") == "nothing"


def test_salt_is_of_the_words_alone() -> None:
    vocabulary = Vocabulary(
        dict.fromkeys(("time", "year", "day", "hand", "room", "door", "car", "job"), 1), 3
    )
    lengths = Lengths(40, 10, 0.5, 20, 2)

    def prompts(*salt: str) -> list[Any]:
        source = RandomPrompts(lengths, vocabulary, 5, *salt)
        return [source.make(number) for number in range(20)]

    plain, again, salted = prompts(), prompts(""), prompts("s")
    assert plain == again and prompts("s") == salted
    assert [(each.num_tokens, each.output_tokens) for each in plain] == [
        (each.num_tokens, each.output_tokens) for each in salted
    ]
    prefixes = [[" ".join(each.content.split()[:18]) for each in found] for found in (plain, salted)]
    assert len(set(prefixes[0])) == len(set(prefixes[1])) == 2 and not set(prefixes[0]) & set(prefixes[1])
    which = [[found.index(prefix) for prefix in found] for found in prefixes]
    assert which[0] == which[1]  # requests that share one share one again
