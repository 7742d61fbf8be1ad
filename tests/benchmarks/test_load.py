"""The load and its client, without a server or with one that says what none should."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from sleb.benchmarks.load.client import EventSplitter, LoadClient, Outcome, without_key
from sleb.benchmarks.load.load import Load, LoadResult, Request
from sleb.benchmarks.prompts import Lengths, RandomPrompts, Vocabulary


def requests(number: int) -> list[Request]:
    return [("completions", b"{}", Outcome("m", 8, 4)) for _ in range(number)]


class FakeClient:
    """Fills in outcomes as `answer(number)` says: "" for a whole one, "timeout", or an error."""

    def __init__(self, answer: Callable[[int], str]) -> None:
        self._answer, self._numbers = answer, itertools.count()

    async def stream(self, path: str, body: bytes, outcome: Outcome) -> None:
        said = self._answer(next(self._numbers))
        outcome.start = 1.0
        await asyncio.sleep(0)
        outcome.error, outcome.timed_out = said, said == "timeout"
        outcome.chunk_times, outcome.end = [2.0], 3.0


def run_closed(client: FakeClient, concurrency: int, num_requests: int = 20) -> LoadResult:
    load = Load(client)
    return asyncio.run(load.closed(requests(num_requests), concurrency, lambda *told: None))


def test_a_server_that_stalls_ends_a_closed_load() -> None:
    result = run_closed(FakeClient(lambda number: "timeout" if number >= 5 else ""), 1)
    assert (
        result.has_stalled
        and [bool(outcome.error) for outcome in result.outcomes] == [False] * 5 + [True] * 3
    )
    result = run_closed(FakeClient(lambda number: "timeout"), 6, 100)
    assert result.has_stalled and 6 <= len(result.outcomes) < 6 + 6


@pytest.mark.parametrize(("last", "has_stalled"), [("timeout", True), ("", False)])
def test_an_open_load_stalls_where_nothing_came(last: str, has_stalled: bool) -> None:
    """Late answers of a server that has too much to do end no sweep."""
    load = Load(FakeClient(lambda number: last if number == 0 else "timeout"))
    result = asyncio.run(load.open(requests(9), [0.0] * 9, lambda *told: None))
    assert len(result.outcomes) == 9 and result.has_stalled is has_stalled


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

    monkeypatch.setattr(LoadClient, "_connect", fail)
    outcome = ask(client_of())
    assert outcome.error.startswith("no connection (") and error in outcome.error
    assert "10.0.0.1" not in outcome.error and outcome.timed_out is timed_out


def test_an_answer_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait(self: LoadClient) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(LoadClient, "_connect", wait)
    outcome = ask(client_of(timeout=0.01))
    assert outcome.error == "no whole answer within 0.01 s" and outcome.timed_out


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

    class Writer:
        transport = property(lambda self: self)

        def write(self, request: bytes) -> None:
            sent.append(request)
            raise OSError("enough")

        def abort(self) -> None:
            pass

    async def connect(self: LoadClient) -> Any:
        return None, Writer()

    monkeypatch.setattr(LoadClient, "_connect", connect)
    ask(client_of(url))
    lines = sent[0].split(b"\r\n")
    assert lines[0] == f"POST {path} HTTP/1.1".encode() and lines[1] == f"Host: {host}".encode()
    assert lines[-1] == b"{}" and b"Content-Length: 2" in lines


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [{"delta": "hi"}]},
        {"choices": ["x"]},
        {"choices": [None]},
        {"choices": {"delta": {"content": "x"}}},
        {"choices": 3},
        {"choices": [], "usage": "none"},
        [],
    ],
)
def test_an_event_that_no_server_should_send(chunk: Any) -> None:
    answer = Outcome("m")
    assert not answer.take(json.dumps(chunk).encode(), 1.0)
    assert answer.error.startswith("an event is no chunk of an answer") and answer.chunk_times == []


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": None},
        {"choices": []},
        {},
        {"choices": [{"delta": None, "text": ""}], "usage": None},
        {"choices": [], "usage": {"prompt_tokens": None, "prompt_tokens_details": 3}},
        {"choices": [], "usage": {"completion_tokens": "3"}},
        {"choices": [], "usage": {"prompt_tokens": -3}},
        {"choices": [], "usage": {"prompt_tokens": True}},
    ],
)
def test_an_event_without_anything_is_none(chunk: Any) -> None:
    answer = Outcome("m", asked_tokens=7)
    assert not answer.take(json.dumps(chunk).encode(), 1.0)
    assert answer.error == "" and answer.num_prompt_tokens == 7 and answer.num_cached_tokens == 0


def test_a_long_event_comes_whole() -> None:
    splitter = EventSplitter()
    pieces = [b"data: ", *[b"x" * 1000] * 1000, b"\n", b"\n"]
    assert [data for piece in pieces for data in splitter.feed(piece)] == [b"x" * 1_000_000]


def test_keys_are_left_out() -> None:
    assert without_key("no key sk-123456== in xsk-123456==x", "sk-123456==") == "no key … in xsk-123456==x"
    assert without_key("none of these is nonesuch: none", "none") == "… of these is nonesuch: …"
    assert without_key("nothing", None) == without_key("nothing", "") == "nothing"


def test_salt_is_of_the_words_alone() -> None:
    vocabulary = Vocabulary(
        dict.fromkeys(("time", "year", "day", "hand", "room", "door", "car", "job"), 1), 3
    )
    lengths = Lengths(40, 10, 0.5)

    def prompts(*salt: str) -> list[Any]:
        source = RandomPrompts(lengths, vocabulary, 5, *salt)
        return [source.make(number) for number in range(20)]

    plain, again, salted = prompts(), prompts(""), prompts("s")
    assert plain == again and prompts("s") == salted
    assert [(each.num_tokens, each.output_tokens) for each in plain] == [
        (each.num_tokens, each.output_tokens) for each in salted
    ]
    assert not {each.text for each in plain} & {each.text for each in salted}
