"""`sleb bench serve` from options to table and JSON, against a server that notes what it did and when."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sleb_tests_scripted_server as scripted
import typer
from typer.testing import CliRunner

from sleb.benchmarks.load_prompts import Lengths
from sleb.benchmarks.serving import run_serving
from sleb.benchmarks.serving_compare import compare_rounds, run_comparison
from sleb.benchmarks.serving_metrics import VLLM_KEYS
from sleb.benchmarks.serving_options import Level, ServeOptions
from sleb.cli.bench.serve import serve
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


def options(server, *levels: Level, **changes: Any) -> ServeOptions:
    given = {"lengths": Lengths(32, 6), "warmup": 0, "num_requests": 5} | changes
    return ServeOptions([server.url], levels=levels or [Level(1)], **given)


def run_cli(*arguments: object) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(serve)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def under_load(server, row) -> list[Any]:
    """Of the requests that a server saw those of the last row."""
    return server.seen[-row["num_prompts"] :]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("close_after", [False, True])
def test_times_are_those_of_the_server(start, endpoint: str, close_after: bool) -> None:
    """The chunk that names a chat's role comes 50 ms before the first token and is none."""
    server = start(first=0.05, gap=0.01, close_after=close_after)
    result = run_serving(options(server, endpoint=endpoint))
    (row,) = result["rows"]
    seen = under_load(server, row)
    assert result["complete"] and row["completed"] == 5 and row["failed"] == 0
    assert row["output_lens"] == [6] * 5 and row["total_output_tokens"] == 30
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
    assert row["median_ttft_ms"] >= 50 and row["median_tpot_ms"] >= 10
    busy = seen[-1].sent[-1] - seen[0].received
    assert busy <= row["duration"] < busy + SLACK
    assert row["output_throughput"] == pytest.approx(30 / row["duration"])
    assert row["request_throughput"] == pytest.approx(5 / row["duration"])
    assert row["total_token_throughput"] == pytest.approx((30 + 5 * 32) / row["duration"])


def test_tpot_counts_tokens_and_itl_counts_chunks(start) -> None:
    server = start(gap=0.01, chunk=4)
    (row,) = run_serving(options(server, lengths=Lengths(32, 10)))["rows"]
    assert row["output_lens"] == [10] * 5
    assert [len(gaps) for gaps in row["itls"]] == [2] * 5
    tpots = [(e2e - ttft) / 9 for e2e, ttft in zip(row["latencies"], row["ttfts"], strict=True)]
    assert row["mean_tpot_ms"] == pytest.approx(1000 * sum(tpots) / 5)


def test_connections_are_kept_and_slots_are_filled(start) -> None:
    server = start(first=0.02, gap=0.002)
    (row,) = run_serving(options(server, Level(3), num_requests=12))["rows"]
    seen = under_load(server, row)
    assert len({request.connection for request in seen}) == 3
    assert row["max_concurrent_requests"] == 3 == server.most_open
    assert row["max_concurrency"] == 3 and row["request_rate"] == "inf"
    texts = [scripted.text_of(request.body) for request in seen]
    assert len(set(texts)) == 12
    assert all(request.body["ignore_eos"] and request.body["temperature"] == 0 for request in seen)


def test_a_connection_that_the_server_has_closed_is_no_failure(start) -> None:
    server = start(streams_a_connection=2)
    (row,) = run_serving(options(server, Level(2), num_requests=10))["rows"]
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
    lengths = Lengths(96, 3, 0.25)
    result = run_serving(options(server, Level(4), lengths=lengths, num_requests=40))
    (row,) = result["rows"]
    usages = [words(scripted.text_of(request.body)) + 7 for request in under_load(server, row)]
    assert sorted(row["input_lens"]) == sorted(usages)
    assert min(usages) >= 72 and max(usages) <= 120 and len(set(usages)) > 10
    assert min(row["output_lens"]) == 2 and max(row["output_lens"]) == 4
    assert not any("length" in notice for notice in result["conditions"]["notices"])


def test_lengths_are_exact_without_a_spread(start) -> None:
    server = start(words=len)
    (row,) = run_serving(options(server, lengths=Lengths(61, 3)))["rows"]
    assert row["input_lens"] == [61] * 5


def test_prefixes_are_shared(start) -> None:
    server = start(overhead=4)
    lengths = Lengths(20, 2, 0.0, 34, 3)
    (row,) = run_serving(options(server, lengths=lengths, num_requests=30))["rows"]
    assert set(row["input_lens"]) == {54}
    texts = [scripted.text_of(request.body).split() for request in under_load(server, row)]
    prefixes = Counter(tuple(words[:30]) for words in texts)  # 4 tokens more are the template's
    assert len(prefixes) == 3
    assert len({tuple(words) for words in texts}) == 30


@pytest.mark.parametrize("field", ["ignore_eos", "stream_options"])
def test_a_refused_field_is_left_out(start, field: str) -> None:
    server = start(refused=(field,))
    result = run_serving(options(server))
    (row,) = result["rows"]
    assert row["completed"] == 5
    assert all(field not in request.body for request in under_load(server, row))
    other = {"ignore_eos": "stream_options", "stream_options": "ignore_eos"}[field]
    assert all(other in request.body for request in under_load(server, row))
    said = {"ignore_eos": "refuses ignore_eos", "stream_options": "tell no usage"}[field]
    assert any(said in notice for notice in result["conditions"]["notices"])


@pytest.mark.parametrize("usage", ["whole", "never"])
def test_without_usage_chunks_are_counted(start, usage: str) -> None:
    server = start(usage=usage, chunk=2)
    result = run_serving(options(server))
    (row,) = result["rows"]
    assert row["output_lens"] == [3] * 5 and row["input_lens"] == [32] * 5
    notices = " ".join(result["conditions"]["notices"])
    assert "tell no usage" in notices
    assert ("counts no tokens" in notices) == (usage == "never")


def test_failures_are_counted_with_their_reasons(start) -> None:
    faults = {2: "500", 3: "drop", 5: "error", 6: "empty", 7: "garbage", 8: "json", 9: "hang"}
    server = start(fail=faults.get)
    result = run_serving(options(server, Level(2), num_requests=12, timeout=0.4))
    (row,) = result["rows"]
    assert row["completed"] == 5 and row["failed"] == 7
    assert row["total_output_tokens"] == 30 and sum(bool(error) for error in row["errors"]) == 7
    assert row["failures"] == {
        "HTTP 500: out of luck": 1,
        "the connection closed after 2 chunks": 1,
        "error in the stream: the engine broke": 1,
        "no text came": 1,
        'an event is no JSON object: "no object"': 1,
        "the answer is no event stream": 1,
        "no whole answer within 0.4 s": 1,
    }
    wait_until(lambda: server.seen[9].closed_by_client)
    assert any("1 of 12 requests failed: HTTP 500" in each for each in result["conditions"]["notices"])


def test_all_failed_is_an_exit_status(start, tmp_path: Path) -> None:
    server = start(fail=lambda number: "500" if number else None)
    path = tmp_path / "result.json"
    done = run_cli("--url", server.url, "--num-requests", 3, "--concurrency", 1, "--json", path)
    assert done.exit_code == 1
    assert "all requests failed: HTTP 500: out of luck" in done.output
    row = json.loads(path.read_text())["rows"][0]
    assert row["completed"] == 0 and row["median_ttft_ms"] is None


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ({"key": "k"}, {}, "no such key.*--api-key"),
        ({}, {"models": ["huge"]}, "no model huge.*--model may be one of: small"),
        ({"lists_models": False}, {}, "name one with --model"),
        ({"context": 90}, {"lengths": Lengths(91, 1)}, "the context holds 90"),
        ({"overhead": 40}, {}, "no room for a text.*takes 41"),
        ({"fail": lambda number: "json"}, {}, "answers at once"),
        ({"fail": lambda number: "garbage"}, {}, "small gives no whole answer"),
    ],
)
def test_what_cannot_work_is_told_before_the_load(start, script, changes, message: str) -> None:
    server = start(**script)
    with pytest.raises(SlebError, match=message) as caught:
        run_serving(options(server, **changes))
    assert "\n" not in str(caught.value)
    assert len(server.seen) <= 1


def test_no_server(start) -> None:
    server = start()
    server.close()
    with pytest.raises(SlebError, match="no server at"):
        run_serving(options(server))


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


def test_the_command_line_is_kept_without_keys_and_places(start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(key="secret-9", models=("org/small",))
    command = ["sleb", "bench", "serve", "--url", server.url, "--api-key", "secret-9", "--model", "org/small"]
    asked = options(server, api_key="secret-9", models=["org/small"])
    others = ["--api-key=older==", "--json", "/home/somebody/x.json", "--dataset=/home/some=body/rows.jsonl"]
    result = run_serving(asked, [*command, "--api-key=secret-9", *others])
    shown = result["environment"]["command"]
    assert (
        shown
        == f"sleb bench serve --url {server.url} --api-key … --model org/small --api-key=… --api-key=… --json x.json "
        "--dataset=rows.jsonl"
    )


def test_requests_come_when_they_are_due(start) -> None:
    """At 40 a second, whatever becomes of the others: each answer takes 0.15 s."""
    server = start(first=0.15)
    (row,) = run_serving(options(server, Level(rate=40.0), num_requests=20))["rows"]
    assert row["completed"] == 20 and row["request_rate"] == 40 and row["max_concurrency"] is None
    assert row["max_concurrent_requests"] >= 3
    gaps = [
        later - earlier for earlier, later in zip(row["start_times"], row["start_times"][1:], strict=False)
    ]
    assert 0.1 < sum(gaps) < 0.5 + SLACK
    received = [request.received for request in under_load(server, row)]
    assert all(0 <= there - here < SLACK for here, there in zip(row["start_times"], received, strict=True))


def test_open_requests_are_bounded(start) -> None:
    server = start(first=0.03)
    result = run_serving(options(server, Level(rate=math.inf, max_concurrency=3), num_requests=12))
    (row,) = result["rows"]
    assert row["max_concurrent_requests"] == 3 == server.most_open
    assert row["request_rate"] == "inf" and row["max_concurrency"] == 3
    assert max(row["queue_times"]) > 0.05 and min(row["queue_times"]) < 0.03
    assert max(row["ttfts"]) < 0.03 + SLACK  # without the wait for a turn


@pytest.mark.parametrize("level", [Level(2), Level(rate=100.0)])
def test_a_duration_ends_the_sending(start, level: Level) -> None:
    server = start(first=0.02)
    (row,) = run_serving(options(server, level, num_requests=None, duration=0.3))["rows"]
    assert row["completed"] == row["num_prompts"] > 5
    assert max(row["start_times"]) - min(row["start_times"]) < 0.3 + SLACK


def test_tiers_take_turns(start) -> None:
    server = start(models=("small", "big"), first=lambda model: {"small": 0.0, "big": 0.08}[model])
    asked = options(server, Level(2), models=["small", "big"], num_requests=8, goodput={"ttft": 60.0})
    (row,) = run_serving(asked)["rows"]
    assert Counter(request.body["model"] for request in under_load(server, row)) == {"small": 4, "big": 4}
    assert row["model_id"] == "small,big"
    small, big = row["tiers"]
    assert (small["model_id"], big["model_id"]) == ("small", "big")
    assert small["completed"] + big["completed"] == row["completed"] == 8
    assert small["output_throughput"] + big["output_throughput"] == pytest.approx(row["output_throughput"])
    assert big["median_ttft_ms"] >= 80
    assert big["request_goodput"] == 0


def test_a_sweep_warms_up_and_asks_nothing_twice(start) -> None:
    server = start()
    result = run_serving(options(server, Level(1), Level(4), warmup=3))
    assert [row["level"] for row in result["rows"]] == ["1 at once", "4 at once"]
    assert [row["num_prompts"] for row in result["rows"]] == [5, 5]
    assert len(server.seen) == 1 + 2 * (3 + 5)
    texts = [scripted.text_of(request.body) for request in server.seen[1:]]
    assert len(set(texts)) == 16


def test_a_second_run_has_the_lengths_of_the_first_and_other_words(start) -> None:
    """The server's prefix cache would know the words of the first."""
    server = start()
    for _ in range(2):
        run_serving(options(server, lengths=Lengths(60, 20, 0.5, 30, 3), seed=7, num_requests=8))
    loads = [server.seen[1:9], server.seen[10:]]
    lengths = [
        [(len(scripted.text_of(request.body).split()), request.body["max_tokens"]) for request in load]
        for load in loads
    ]
    assert len(lengths[0]) == 8 and lengths[0] == lengths[1] and len(set(lengths[0])) > 4
    starts = [{scripted.text_of(request.body)[:60] for request in load} for load in loads]
    assert 1 < len(starts[0]) <= 3 and not starts[0] & starts[1]


def test_vllm_keys_and_types(start, tmp_path: Path) -> None:
    server = start()
    folder, path = tmp_path / "files", tmp_path / "result.json"
    arguments = ["--url", server.url, "--num-requests", 4, "--concurrency", "1,2", "--goodput", "ttft:9000"]
    done = run_cli(
        *arguments, "--goodput", "e2el:9000", "--vllm-json", folder, "--json", path, "--label", "mine"
    )
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert result["kind"] == "serve" and result["complete"] is True
    assert result["model"]["name"] == "small" and result["settings"]["goodput"] == {
        "ttft": 9000,
        "e2el": 9000,
    }
    files = sorted(folder.iterdir())
    assert [file.name.rsplit("-", 2)[0] for file in files] == [
        "mine-infqps-concurrency1-small",
        "mine-infqps-concurrency2-small",
    ]
    for file, row in zip(files, result["rows"], strict=True):
        data = json.loads(file.read_text())
        assert set(data) == set(VLLM_KEYS)
        assert data == {key: row[key] for key in VLLM_KEYS}
        for key in ("date", "endpoint_type", "backend", "label", "model_id"):
            assert isinstance(data[key], str)
        for key in ("num_prompts", "max_concurrency", "completed", "failed", "total_input_tokens"):
            assert type(data[key]) is int
        for key in ("duration", "request_throughput", "request_goodput", "output_throughput", "burstiness"):
            assert type(data[key]) is float
        assert data["request_goodput"] == data["request_throughput"]
        for statistic in ("mean", "median", "std", "p90", "p99"):
            for metric in ("ttft", "tpot", "itl", "e2el"):
                assert type(data[f"{statistic}_{metric}_ms"]) is float
        for key in ("input_lens", "output_lens", "ttfts", "itls", "errors", "start_times"):
            assert len(data[key]) == 4
    for heading in ("TTFT", "TPOT", "tokens/s", "goodput", "mine: 2 at once"):
        assert heading in done.output


def test_an_interrupt_reports_what_is_complete(start, tmp_path: Path) -> None:
    """The third request under load never ends, and during it comes Ctrl-C."""

    def interrupt(number: int) -> None:
        if number == 4:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    server = start(fail=lambda number: "hang" if number >= 4 else None, on_stream=interrupt)
    path = tmp_path / "result.json"
    done = run_cli("--url", server.url, "--warmup", 1, "--concurrency", "1,2", "--json", path)
    assert done.exit_code == 130, done.output
    result = json.loads(path.read_text())
    assert result["complete"] is False
    assert [row["completed"] for row in result["rows"]] == [2]
    assert "Interrupted" in done.output
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


def test_a_comparison_finds_the_slow_server(start) -> None:
    fast, slow = start(gap=0.003), start(gap=0.012, models=("other",))
    asked = ServeOptions(
        [fast.url, slow.url],
        models=["small", "other"],
        levels=[Level(2)],
        lengths=Lengths(24, 5, 0.2),
        num_requests=4,
        rounds=6,
    )
    result = run_comparison(asked)
    assert result["complete"] and [row["label"] for row in result["rows"]] == ["A", "B"]
    assert [row["completed"] for row in result["rows"]] == [24, 24]
    found = {each["metric"]: each for each in result["comparisons"]}
    for metric in ("output_throughput", "request_throughput", "median_tpot_ms"):
        assert found[metric]["verdict"] == "slower"
        assert found[metric]["speedup_high"] < 0.8
        assert len(found[metric]["speedup_samples"]) == 6
    assert found["median_tpot_ms"]["b"] > found["median_tpot_ms"]["a"] >= 3
    loads = [server.seen[2:] for server in (fast, slow)]  # after the first question and a warm-up
    lengths = [
        [(len(scripted.text_of(request.body).split()), request.body["max_tokens"]) for request in load]
        for load in loads
    ]
    assert [sorted(lengths[0][at : at + 4]) for at in range(0, 24, 4)] == [
        sorted(lengths[1][at : at + 4]) for at in range(0, 24, 4)
    ]
    assert len(set(lengths[0])) > 2
    order = sorted(
        [(load[at].received, name) for name, load in zip("AB", loads, strict=True) for at in range(0, 24, 4)]
    )
    names = "".join(name for _, name in order)
    assert names[:4] in ("ABBA", "BAAB") and names == "".join(
        pair + pair[::-1] for pair in (names[0:2], names[4:6], names[8:10])
    )


def test_a_comparison_of_a_server_with_itself(start) -> None:
    """Its prefix cache must not help the second time, so the words differ, but neither lengths nor anything else."""
    server = start(gap=0.004)
    asked = ServeOptions(
        [server.url] * 2, levels=[Level(1)], lengths=Lengths(24, 8, 0.5), num_requests=2, warmup=0
    )
    result = run_comparison(asked)
    found = {each["metric"]: each for each in result["comparisons"]}
    assert 0.6 < found["median_tpot_ms"]["speedup"] < 1.6
    load = server.seen[2:]
    texts = [scripted.text_of(request.body) for request in load]
    assert len(texts) == len(set(texts)) == 24
    shapes = [
        (len(text.split()), request.body["max_tokens"]) for text, request in zip(texts, load, strict=True)
    ]
    rounds = [shapes[at : at + 4] for at in range(0, 24, 4)]  # of each two requests to A, and two to B
    assert all(found[:2] == found[2:] for found in rounds) and len(set(shapes)) > 3


def test_both_sides_of_a_comparison_get_the_same_rows(start, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"question {number}"}) for number in range(3)))
    server = start()
    asked = ServeOptions(
        [server.url] * 2, levels=[Level(1)], dataset=path, num_requests=2, rounds=3, warmup=0
    )
    run_comparison(asked)
    texts = [scripted.text_of(request.body) for request in server.seen[2:]]
    assert texts == [f"question {number % 3}" for number in (0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5)]


def test_comparisons_by_hand() -> None:
    rate = "output_throughput"
    first = [
        {rate: value, "request_throughput": 1.0, "median_ttft_ms": 10.0, "median_tpot_ms": None}
        for value in range(1, 7)
    ]
    second = [row | {rate: 2 * row[rate], "request_throughput": factor, "median_ttft_ms": 20.0} for row, factor in
              zip(first, (0.9, 1.1, 0.95, 1.05, 1.02, 0.98), strict=True)]  # fmt: skip
    found = {each["metric"]: each for each in compare_rounds(Level(1), first, second)}
    assert set(found) == {rate, "request_throughput", "median_ttft_ms"}
    assert found[rate]["speedup"] == pytest.approx(2) and found[rate]["verdict"] == "faster"
    assert (found[rate]["a"], found[rate]["b"]) == (3.5, 7)
    assert found["median_ttft_ms"]["speedup"] == pytest.approx(0.5)
    assert found["median_ttft_ms"]["verdict"] == "slower"
    assert found["request_throughput"]["verdict"] == "no difference"


def test_a_comparison_on_the_command_line(start, tmp_path: Path) -> None:
    first, second = start(), start()
    path = tmp_path / "result.json"
    arguments = ["--compare", first.url, second.url, "--concurrency", 1, "--num-requests", 2, "--rounds", 2]
    done = run_cli(*arguments, "--json", path)
    assert done.exit_code == 0, done.output
    assert "B over A" in done.output and "too few rounds" in done.output
    assert json.loads(path.read_text())["comparisons"][0]["speedup_level"] is None


def test_a_report_is_checked_first_and_written_last(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, calls = start(), []
    reports = SimpleNamespace(
        check_report=lambda folder: calls.append(("check", folder, len(server.seen))),
        write_report=lambda folder, results: calls.append((folder, [each.kind for each in results])),
    )
    monkeypatch.setitem(sys.modules, "sleb.benchmarks.show", reports)
    done = run_cli("--url", server.url, "--num-requests", 2, "--concurrency", 1, "--report", tmp_path / "r")
    assert done.exit_code == 0, done.output
    assert calls == [("check", tmp_path / "r", 0), (tmp_path / "r", ["serve"])]


def test_progress_is_told_as_the_load_goes_on(start) -> None:
    server, told = start(first=0.3), []
    run_serving(options(server, Level(2), num_requests=6), on_progress=told.append)
    loads = [progress.load for progress in told if progress.load is not None]
    assert told[0].what == "asking the server" and 1 <= len(loads) <= 4
    assert loads[-1].num_running == 2 and loads[-1].num_done >= 2
    assert loads[-1].first_seconds >= 0.3 and loads[-1].tokens_per_second > 0
