"""`sleb bench serve` from options to table and JSON, against a server that notes what it did and when."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import sleb_tests_scripted_server as scripted
from typer.testing import CliRunner

from sleb.benchmarks.load.load import LoadResult, measure
from sleb.benchmarks.load.options import Level, ServeLoadOptions
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.serve import Target, describe_client, run_serve
from sleb.cli.bench import app
from sleb.errors import SlebError

# Between a server's sending and a client's noting of it, on a machine that does other things as well.
SLACK = 0.5


@pytest.fixture
def start():
    """start(first=0.1, …) -> a running ScriptedServer."""
    servers = []

    def start_one(**script):
        servers.append(scripted.ScriptedServer(scripted.Script(**script)))
        return servers[-1]

    yield start_one
    for server in servers:
        server.close()


def sizes(prompt: int, output: int, spread: float = 0) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "output_tokens": output, "length_spread": spread}


def options(server, concurrency: tuple[int, ...] = (1,), **changes: Any) -> ServeLoadOptions:
    given = {**sizes(32, 6), "num_requests": 5, "concurrency": concurrency}
    return ServeLoadOptions(**{"url": server.url, **given, **changes})


def load(asked: ServeLoadOptions) -> tuple[Result, list[dict[str, Any]]]:
    """The result, and a row a load after its warm-up: its figures, and the times of every request."""
    rows, run = [], Target.run

    async def note(target: Target, level: Level, what: str, seed: str | None) -> LoadResult:
        done = await run(target, level, what, seed)
        whole = [not each.error for each in done.outcomes]
        if seed is not None:
            rows.append(
                {
                    **measure(done.outcomes, done.duration),
                    "duration": done.duration,
                    "completed": sum(whole),
                    "errors": [each.error for each in done.outcomes],
                    "input_lens": [each.num_prompt_tokens for each in done.outcomes],
                    "output_lens": [each.num_output_tokens for each in done.outcomes],
                    "start_times": [each.start for each in done.outcomes],
                    "ttfts": [each.first_seconds for each in done.outcomes if not each.error],
                    "itls": [each.gaps for each in done.outcomes],
                    "latencies": [each.seconds for each in done.outcomes],
                }
            )
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "run", note)
        return run_serve(asked, {}), rows


def row_of(*arguments: Any, **changes: Any) -> dict[str, Any]:
    (row,) = load(options(*arguments, **changes))[1]
    return row


def found(result: Result, metric: str, subject: str | None = None) -> Measurement:
    """The only measurement of a metric."""
    (each,) = (
        each for each in result.measurements if each.metric == metric and subject in (None, each.subject)
    )
    return each


def run_cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "200"})


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def under_load(server, row) -> list[Any]:
    """Of the requests that a server saw those of the last row."""
    return server.seen[-len(row["errors"]) :]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("close_after", [False, True])
def test_times_are_those_of_the_server(start, endpoint: str, close_after: bool) -> None:
    """The chunk that names a chat's role comes 50 ms before the first token and is none."""
    server = start(first=0.05, gap=0.01, close_after=close_after)
    result, (row,) = load(options(server, endpoint=endpoint))
    seen = under_load(server, row)
    assert result.complete and row["errors"] == [""] * 5
    assert row["output_lens"] == [6] * 5 and found(result, "tokens/s").facts["total_output_tokens"] == 30
    for index, request in enumerate(seen):
        begin, first = row["start_times"][index], row["ttfts"][index]
        arrivals = [begin + first]
        for gap in row["itls"][index]:
            arrivals.append(arrivals[-1] + gap)
        assert 0 <= request.received - begin < SLACK
        assert len(arrivals) == len(request.sent) == 6
        for arrival, sent in zip(arrivals, request.sent, strict=True):
            assert 0 <= arrival - sent + 1e-6 < SLACK
        assert row["latencies"][index] + 1e-8 >= first + sum(row["itls"][index])
    assert row["TTFT p50 ms"] >= 50 and row["TPOT p50 ms"] >= 10
    busy = seen[-1].sent[-1] - seen[0].received
    assert busy <= row["duration"] < busy + SLACK
    assert row["tokens/s"] == pytest.approx(30 / row["duration"])
    assert row["requests/s"] == pytest.approx(5 / row["duration"])
    assert found(result, "tokens/s").facts["total_input_tokens"] == 5 * 32


def test_tpot_counts_tokens_and_itl_counts_chunks(start) -> None:
    server = start(gap=0.01, chunk=4)
    row = row_of(server, **sizes(32, 10))
    assert row["output_lens"] == [10] * 5
    assert [len(gaps) for gaps in row["itls"]] == [2] * 5
    tpots = [(e2e - ttft) / 9 for e2e, ttft in zip(row["latencies"], row["ttfts"], strict=True)]
    assert row["TPOT p50 ms"] == pytest.approx(1000 * median(tpots))


def test_connections_are_kept_and_slots_are_filled(start) -> None:
    server = start(first=0.02, gap=0.002)
    row = row_of(server, (3,), num_requests=12)
    seen = under_load(server, row)
    assert len({request.connection for request in seen}) == 3
    assert server.most_open == 3
    texts = [scripted.text_of(request.body) for request in seen]
    assert len(set(texts)) == 12
    assert all(request.body["ignore_eos"] and request.body["temperature"] == 0 for request in seen)


def test_a_connection_that_the_server_has_closed_is_no_failure(start) -> None:
    server = start(streams_a_connection=2)
    row = row_of(server, (2,), num_requests=10)
    assert row["completed"] == 10
    assert len({request.connection for request in under_load(server, row)}) >= 5


@pytest.mark.parametrize(
    "words",
    [
        lambda text: len(text.split()),
        len,
        lambda text: sum(2 + len(word) // 4 for word in text.split()),
    ],
    ids=["a word a token", "a byte a token", "words of several tokens"],
)
def test_prompts_have_the_length_asked_for_by_the_servers_count(start, words) -> None:
    server = start(words=words)
    lengths = sizes(96, 3, 0.25)
    result, (row,) = load(options(server, (4,), **lengths, num_requests=40))
    usages = [words(scripted.text_of(request.body)) + 7 for request in under_load(server, row)]
    assert sorted(row["input_lens"]) == sorted(usages)
    assert min(usages) >= 72 and max(usages) <= 120 and len(set(usages)) > 10
    assert min(row["output_lens"]) == 2 and max(row["output_lens"]) == 4
    assert not any("length" in notice for notice in result.notes)


def test_lengths_are_exact_without_a_spread(start) -> None:
    server = start(words=len)
    row = row_of(server, **sizes(61, 3))
    assert row["input_lens"] == [61] * 5


@pytest.mark.parametrize("field", ["ignore_eos", "stream_options"])
def test_a_refused_field_is_left_out(start, field: str) -> None:
    server = start(refused=(field,))
    result, (row,) = load(options(server))
    assert row["completed"] == 5
    assert all(field not in request.body for request in under_load(server, row))
    other = {"ignore_eos": "stream_options", "stream_options": "ignore_eos"}[field]
    assert all(other in request.body for request in under_load(server, row))
    said = {"ignore_eos": "refuses ignore_eos", "stream_options": "tell no usage"}[field]
    assert any(said in notice for notice in result.notes)


@pytest.mark.parametrize("usage", ["whole", "never"])
def test_without_usage_chunks_are_counted(start, usage: str) -> None:
    server = start(usage=usage, chunk=2)
    result, (row,) = load(options(server))
    assert row["output_lens"] == [3] * 5 and row["input_lens"] == [32] * 5
    notices = " ".join(result.notes)
    assert "tell no usage" in notices
    assert ("counts no tokens" in notices) == (usage == "never")


def test_failures_are_counted_with_their_reasons(start) -> None:
    faults = {3: "500", 4: "drop", 6: "error", 7: "empty", 8: "garbage", 9: "json", 10: "hang"}
    server = start(fail=faults.get)
    result, (row,) = load(options(server, (2,), num_requests=12, timeout=0.4))
    facts = found(result, "tokens/s").facts
    assert (facts["completed"], facts["failed"], facts["total_output_tokens"]) == (5, 7, 30)
    assert sum(bool(error) for error in row["errors"]) == 7
    assert found(result, "tokens/s").facts["failures"] == {
        "HTTP 500: out of luck": 1,
        "the connection closed after 2 chunks": 1,
        "error in the stream: the engine broke": 1,
        "no text came": 1,
        'an event is no chunk of an answer: "no object"': 1,
        "the answer is no event stream": 1,
        "no whole answer within 0.4 s": 1,
    }
    wait_until(lambda: server.seen[10].closed_by_client)
    assert any("1 of 12 requests failed: HTTP 500" in each for each in result.notes)


def test_all_failed_is_an_exit_status(start, tmp_path: Path) -> None:
    server = start(fail=lambda number: "500" if number else None)
    path = tmp_path / "result.json"
    done = run_cli("--url", server.url, "--num-requests", 3, "--concurrency", 1, "--json", path)
    assert done.exit_code == 1
    assert "all requests failed: HTTP 500: out of luck" in done.output
    (row,) = (each for each in json.loads(path.read_text())["rows"] if each["metric"] == "tokens/s")
    assert row["completed"] == 0 and row["failures"] == {"HTTP 500: out of luck": 3}


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ({"key": "k"}, {}, "no such key.*--api-key"),
        ({}, {"model": ["huge"]}, "no model huge.*--model may be one of: small"),
        ({"lists_models": False}, {}, "name one with --model"),
        ({"context": 90}, sizes(91, 1), "the context holds 90"),
        ({"overhead": 40}, {}, "no room for a text.*takes 41"),
        ({"fail": lambda number: "json"}, {}, "no event stream"),
        ({"fail": lambda number: "garbage"}, {}, "small gives no whole streamed answer"),
    ],
)
def test_what_cannot_work_is_told_before_the_load(start, script, changes, message: str) -> None:
    server = start(**script)
    with pytest.raises(SlebError, match=message) as caught:
        load(options(server, **changes))
    assert "\n" not in str(caught.value)
    assert len(server.seen) <= 1


def test_no_server(start) -> None:
    server = start()
    server.close()
    with pytest.raises(SlebError, match="no server at"):
        load(options(server))


def test_a_key_is_sent_and_not_told(start, tmp_path: Path) -> None:
    server = start(key="secret-9", lists_models=False)
    path = tmp_path / "result.json"
    arguments = [
        "--url",
        server.url,
        "--model",
        "small",
        "--num-requests",
        2,
        "--concurrency",
        1,
        "--json",
        path,
    ]
    done = run_cli(*arguments, "--api-key", "secret-9")
    assert done.exit_code == 0, done.output
    assert "secret" not in path.read_text() + done.output


def test_the_command_line_is_kept_without_keys_and_places(start) -> None:
    server = start(key="secret-9", models=("org/small",))
    command = ["sleb", "bench", "serve", "--url", server.url, "--api-key", "secret-9", "--model", "org/small"]
    asked = options(server, api_key="secret-9", model=["org/small"])
    others = ["--api-key=older==", "--json", "/home/somebody/x.json", "--dataset=/home/some=body/rows.jsonl"]
    far = ["--compare", "http://box-17.corp:8000/v1"]
    shown = describe_client(asked, [*command, "--api-key=secret-9", *others, *far])["command"]
    expected = (
        f"sleb bench serve --url {server.url} --api-key … --model org/small --api-key=… --api-key=… --json x.json "
        "--dataset=rows.jsonl --compare http://server:8000/v1"
    )
    assert shlex.split(shown) == expected.split()


def test_requests_come_when_they_are_due(start) -> None:
    """At 40 a second, whatever becomes of the others: each answer takes 0.15 s."""
    server = start(first=0.15)
    row = row_of(server, (), rate=[40.0], num_requests=20)
    assert row["completed"] == 20
    assert server.most_open >= 3
    gaps = [
        later - earlier for earlier, later in zip(row["start_times"], row["start_times"][1:], strict=False)
    ]
    assert 0.1 < sum(gaps) < 0.5 + SLACK
    received = [request.received for request in under_load(server, row)]
    assert all(0 <= there - here < SLACK for here, there in zip(row["start_times"], received, strict=True))


def test_tiers_take_turns(start) -> None:
    server = start(models=("small", "big"), first=lambda model: {"small": 0.0, "big": 0.08}[model])
    asked = options(server, (2,), model=["small", "big"], num_requests=8, goodput=["ttft:60"])
    result, (row,) = load(asked)
    assert Counter(request.body["model"] for request in under_load(server, row)) == {"small": 4, "big": 4}
    whole, small, big = (found(result, "tokens/s", name) for name in ("small,big", "small", "big"))
    assert whole.facts["completed"] == row["completed"] == 8
    assert small.facts["completed"] + big.facts["completed"] == 8
    assert small.value + big.value == pytest.approx(whole.value)
    assert found(result, "TTFT p50 ms", "big").value >= 80
    assert found(result, "goodput requests/s", "big").value == 0


def test_a_sweep_warms_up_and_asks_nothing_twice(start) -> None:
    server = start()
    result, rows = load(
        options(
            server,
            (
                1,
                4,
            ),
        )
    )
    rates = [each for each in result.measurements if each.metric == "tokens/s"]
    assert [each.case for each in rates] == ["1 at once, 32 → 6", "4 at once, 32 → 6"]
    assert [each.facts["concurrency"] for each in rates] == [1, 4]
    assert [len(row["errors"]) for row in rows] == [5, 5]
    assert len(server.seen) == 1 + 2 * (1 + 5)
    texts = [scripted.text_of(request.body) for request in server.seen[1:]]
    assert len(set(texts)) == 12


def test_a_result_says_what_the_rows_of_the_load_amount_to(start) -> None:
    """And holds no time of a single chunk or request."""
    server = start(first=0.02, gap=0.004)
    result, (row,) = load(options(server, (2,), goodput=["ttft:9000"]))
    by_metric = {each.metric: each.value for each in result.measurements}
    assert by_metric["tokens/s"] == row["tokens/s"] == pytest.approx(30 / row["duration"])
    assert by_metric["TTFT p50 ms"] == pytest.approx(1000 * median(row["ttfts"]))
    assert by_metric["latency p50 ms"] == pytest.approx(1000 * median(row["latencies"]))
    assert by_metric["goodput requests/s"] == by_metric["requests/s"]
    assert len(by_metric) == 10 and not any(
        isinstance(each, list) for row in result.document()["rows"] for each in row.values()
    )
    assert Result.of_document(json.loads(json.dumps(result.document()))).measurements == result.measurements


def test_a_second_run_has_the_lengths_of_the_first_and_other_words(start) -> None:
    """The server's prefix cache would know the words of the first."""
    server = start()
    for _ in range(2):
        run_serve(options(server, **sizes(60, 20, 0.5), seed=7, num_requests=8), {})
    loads = [server.seen[2:10], server.seen[12:]]
    lengths = [
        [(len(scripted.text_of(request.body).split()), request.body["max_tokens"]) for request in load]
        for load in loads
    ]
    assert len(lengths[0]) == 8 and lengths[0] == lengths[1] and len(set(lengths[0])) > 4
    starts = [{scripted.text_of(request.body)[:60] for request in load} for load in loads]
    assert len(starts[0]) == 8 and not starts[0] & starts[1]


def test_a_result_on_the_command_line(start, tmp_path: Path) -> None:
    server = start()
    path = tmp_path / "result.json"
    arguments = ["--url", server.url, "--num-requests", 4, "--concurrency", "1,2", "--goodput", "ttft:9000"]
    done = run_cli(*arguments, "--goodput", "e2el:9000", "--json", path)
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert result["kind"] == "serve" and result["complete"] is True
    assert result["settings"]["goodput"] == ["ttft:9000", "e2el:9000"]
    assert {row["subject"] for row in result["rows"]} == {"small"}
    for heading in ("TTFT", "TPOT", "tokens/s", "goodput", "2 at once"):
        assert heading in done.output


def test_an_interrupt_reports_what_is_complete(start, tmp_path: Path) -> None:
    """The third request under load never ends, and during it comes Ctrl-C."""

    def interrupt(number: int) -> None:
        if number == 4:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    server = start(fail=lambda number: "hang" if number >= 4 else None, on_stream=interrupt)
    path = tmp_path / "result.json"
    done = run_cli("--url", server.url, "--concurrency", "1,2", "--json", path)
    assert done.exit_code == 130, done.output
    result = json.loads(path.read_text())
    assert result["complete"] is False
    assert [row["completed"] for row in result["rows"] if row["metric"] == "tokens/s"] == [2]
    wait_until(lambda: server.seen[-1].closed_by_client)


def test_an_early_interrupt_writes_nothing(start, tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    server = start(fail=lambda number: "hang" if number else None, on_stream=interrupt)
    path = tmp_path / "result.json"
    path.write_text("older")
    done = run_cli("--url", server.url, "--concurrency", "1", "--json", path)
    assert done.exit_code == 130
    assert path.read_text() == "older"


def compared(*servers: Any, **changes: Any) -> ServeLoadOptions:
    return ServeLoadOptions(compare=tuple(server.url for server in servers), **changes)


def test_a_comparison_finds_the_slow_server(start) -> None:
    fast, slow = start(gap=0.003), start(gap=0.012, models=("other",))
    asked = compared(
        fast, slow, model=["small", "other"], concurrency=[2], **sizes(24, 5, 0.2), num_requests=4
    )
    result = run_serve(asked, {})
    assert result.complete and {each.subject for each in result.measurements} == {"A", "B"}
    for metric in ("tokens/s", "requests/s", "TPOT p50 ms"):
        ratio = found(result, metric, "B").ratio
        assert ratio.verdict == "slower" and ratio.high < 0.8
        assert len(found(result, metric, "B").facts["samples"]) == 6
    assert found(result, "TPOT p50 ms", "B").value > found(result, "TPOT p50 ms", "A").value >= 3
    loads = [server.seen[2:] for server in (fast, slow)]  # after the first question and a warm-up
    lengths = [
        [(len(scripted.text_of(request.body).split()), request.body["max_tokens"]) for request in seen]
        for seen in loads
    ]
    assert len(lengths[0]) == 24
    assert [sorted(lengths[0][at : at + 4]) for at in range(0, 24, 4)] == [
        sorted(lengths[1][at : at + 4]) for at in range(0, 24, 4)
    ]
    assert len(set(lengths[0])) > 2
    order = sorted(
        [(seen[at].received, name) for name, seen in zip("AB", loads, strict=True) for at in range(0, 24, 4)]
    )
    names = "".join(name for _, name in order)
    pairs = [names[at : at + 2] for at in range(0, 12, 2)]  # an order, and then the same backwards
    assert all(second == first[::-1] for first, second in zip(pairs[::2], pairs[1::2], strict=True))


def test_models_in_turns_each_have_the_server_alone(start) -> None:
    server = start(gap=0.003, first=lambda model: 0.03 if model == "b" else 0.0, models=("a", "b", "c"))
    asked = ServeLoadOptions(
        url=server.url,
        model=["a", "b", "c"],
        in_turns=True,
        rate=[50.0],
        goodput=["ttft:20"],
        **sizes(24, 3, 0.0),
        num_requests=4,
    )
    result = run_serve(asked, {})
    assert result.complete and {each.subject for each in result.measurements} == {"a", "b", "c"}
    assert found(result, "goodput requests/s", "a").value > 0
    assert found(result, "TTFT p50 ms", "b").ratio.high < 0.8
    assert found(result, "answered %", "c").value == 100
    seen = [request.body["model"] for request in server.seen[6:]]  # after a question and a warm-up each
    turns = [seen[at : at + 4] for at in range(0, len(seen), 4)]
    assert len(turns) == 18 and all(len(set(turn)) == 1 for turn in turns)


def test_a_comparison_of_a_server_with_itself(start) -> None:
    """Its prefix cache must not help the second time, so the words differ, but neither lengths nor anything else."""
    server = start(gap=0.004)
    asked = compared(server, server, concurrency=[1], **sizes(24, 8, 0.5), num_requests=2)
    result = run_serve(asked, {})
    assert 0.6 < found(result, "TPOT p50 ms", "B").ratio.estimate < 1.6
    seen = server.seen[4:]  # after a question and a warm-up each
    texts = [scripted.text_of(request.body) for request in seen]
    assert len(texts) == len(set(texts)) == 24
    shapes = [
        (len(text.split()), request.body["max_tokens"]) for text, request in zip(texts, seen, strict=True)
    ]
    rounds = [shapes[at : at + 4] for at in range(0, 24, 4)]  # of each two requests to A, and two to B
    assert all(each[:2] == each[2:] for each in rounds) and len(set(shapes)) > 3


def test_both_sides_of_a_comparison_get_the_same_rows(start, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"question {number}"}) for number in range(3)))
    server = start()
    run_serve(compared(server, server, concurrency=[1], dataset=path, num_requests=2), {})
    texts = [scripted.text_of(request.body) for request in server.seen[4:]]
    turns = [(number, number + 1) * 2 for number in range(1, 13, 2)]  # the first row is the warm-up's
    assert texts == [f"question {number % 3}" for turn in turns for number in turn]


def test_a_comparison_on_the_command_line(start, tmp_path: Path) -> None:
    first, second = start(), start()
    path = tmp_path / "result.json"
    arguments = ["--compare", first.url, second.url, "--concurrency", 1, "--num-requests", 2]
    done = run_cli(*arguments, "--json", path)
    assert done.exit_code == 0, done.output
    assert "1 at once: B, turn 6 of 6" in done.output
    rows = json.loads(path.read_text())["rows"]
    (ratio,) = (row for row in rows if (row["subject"], row["metric"]) == ("B", "tokens/s"))
    assert ratio["ratio"] > 0 and ratio["repetitions"] == 6


def test_progress_is_told_as_the_load_goes_on(start) -> None:
    server, told = start(first=0.3), []
    run_serve(options(server, (2,), num_requests=6), {}, lambda *progress: told.append(progress))
    assert told[0] == (0, None, "asking the server")
    loads = [progress for progress in told if "2 running" in progress[2]]
    assert 1 <= len(loads) <= 4
    num_done, num_requests, what = loads[-1]
    assert num_done >= 2 and num_requests == 6 and what.startswith("2 at once: turn 1: 2 running, ")
    assert what.endswith(" tokens/s") and " 0 tokens/s" not in what
