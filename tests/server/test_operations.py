"""Running a server: warm-up, time limits, names, results, keys, origins, logs, and the description of the API."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import re
import select
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import openai
import orjson
import pytest

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.aliases import ALIASES
from sleb.server.bench_result import BenchResult
from sleb.server.engine_thread import chores
from sleb.server.errors import OverloadedError
from sleb.server.logs import JsonFormatter, SafeHandler, UnblockedStream
from sleb.terminal import LineFormatter

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


# Warm-up.


def test_ready_once_every_tier_has_answered(serve_engine, fake_engine, wait_until):
    fake_engine.hold.clear()
    server = serve_engine(fake_engine, warm_up=True)
    response = server.http.get("/ready")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "warming_up"
    assert response.headers["retry-after"]
    assert server.http.get("/health").status_code == 200
    fake_engine.hold.set()
    wait_until(lambda: server.http.get("/ready").status_code == 200)
    assert [depth for _, _, depth in fake_engine.seen] == [0, 1, 2]
    assert all(params.max_tokens <= 8 for _, params, _ in fake_engine.seen)


def test_requests_are_served_while_it_warms_up(serve_engine, fake_engine):
    fake_engine.delay = 0.03
    server = serve_engine(fake_engine, warm_up=True)
    assert server.complete("ab").json()["choices"][0]["text"] == "ab"


def test_a_server_that_could_not_warm_up_is_not_ready_and_says_why(
    serve_engine, fake_engine, wait_until, caplog
):
    from sleb.errors import RequestError

    fake_engine.add_error = RequestError("no")
    server = serve_engine(fake_engine, warm_up=True)
    wait_until(lambda: server.context.engine.warm)
    assert "warming up failed: no" in caplog.text
    response = server.http.get("/ready")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "warm_up_failed"
    assert response.json()["error"]["message"] == "the server could not warm up: no"
    fake_engine.add_error = None  # clients may try
    assert server.complete("ab").json()["choices"][0]["text"] == "ab"
    assert server.http.get("/health").status_code == 200


def test_a_full_queue_is_no_failure_to_warm_up():
    tries = []

    class Busy:
        model = SimpleNamespace(
            max_model_len=64,
            tiers=[SimpleNamespace(depth=0)],
            tokenizer=None,
            spec=SimpleNamespace(vocab_size=1),
            eos_token_ids=frozenset(),
        )
        warm, warm_up_failure = False, None

        def become_warm(self):
            self.warm = True

        async def submit(self, jobs):
            tries.append(jobs)
            if len(tries) < 3:
                raise OverloadedError("the queue is full")

            async def nothing():
                return []

            return SimpleNamespace(next=nothing, close=lambda: None)

    engine = Busy()
    asyncio.run(chores.warm_up(engine))
    assert len(tries) == 3 and engine.warm and engine.warm_up_failure is None


def test_a_dead_engine_is_never_ready(serve_engine, fake_engine, wait_until):
    fake_engine.error = RuntimeError("broken")
    server = serve_engine(fake_engine, warm_up=True)
    wait_until(lambda: server.context.engine.dead is not None)
    assert server.http.get("/ready").json()["error"]["code"] == "engine_dead"


def test_the_real_engine_warms_up_all_tiers_and_a_tiny_context(
    tiny_model_dir, tiny_chain, serve_engine, wait_until
):
    config = EngineConfig(
        str(tiny_model_dir),
        layer_map=tiny_chain,
        tiers=(0, 3),
        device="cpu",
        dtype="float32",
        kv_cache_memory=0.01,
        max_model_len=2,
    )
    server = serve_engine(Engine(config), warm_up=True)
    wait_until(lambda: server.http.get("/ready").status_code == 200)
    server.wait_idle()


# Time limits.


def test_a_whole_answer_that_takes_too_long(serve_engine, fake_engine, caplog):
    caplog.set_level("INFO")
    server = serve_engine(fake_engine, request_timeout=0.2)
    fake_engine.delay = 0.02
    begin = time.monotonic()
    response = server.complete("x" * 200)
    assert 0.15 < time.monotonic() - begin < 1
    assert response.status_code == 504
    error = response.json()["error"]
    assert error["code"] == "timeout"
    assert "0.2 seconds" in error["message"]
    server.wait_idle()
    assert re.search(
        r"request \S+: POST /v1/completions 504 timeout in .*, timeout$", caplog.text, re.MULTILINE
    )
    assert server.complete("ab").status_code == 200
    time.sleep(0.25)
    assert server.complete("ab").status_code == 200


def test_a_stream_that_takes_too_long(serve_engine, fake_engine):
    server = serve_engine(fake_engine, request_timeout=0.2)
    fake_engine.delay = 0.02
    response = server.complete("x" * 200, stream=True)
    assert response.status_code == 200
    events = response.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert 2 < len(events) < 20
    server.wait_idle()


def test_a_stream_whose_reader_sleeps_is_given_up_too(serve_engine, fake_engine):
    fake_engine.max_model_len = 10**7
    server = serve_engine(fake_engine, request_timeout=0.3)
    body = json.dumps({"prompt": "x" * 10**5, "max_tokens": 10**6, "ignore_eos": True, "stream": True})
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("POST", "/v1/completions", body)
        connection.getresponse().read(1)  # and no more
        server.wait_idle()


def test_an_engine_that_hangs_before_it_takes_the_request(serve_engine, fake_engine):
    server = serve_engine(fake_engine, request_timeout=0.2)
    fake_engine.hold.clear()
    with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}):
        response = server.complete("b")
        assert response.status_code == 504
        fake_engine.hold.set()
    server.wait_idle()


# Names.


def test_aliases_name_every_tier(serve_engine, fake_engine):
    server = serve_engine(fake_engine, served_model_names=("GPT-4", "other"))
    client = server.client()
    assert [model.id for model in client.models.list()] == [
        *("fake:sleb-1", "fake", "fake:sleb-2"),  # the default tier first
        *("GPT-4", "GPT-4:sleb-1", "GPT-4:sleb-2"),
        *("other", "other:sleb-1", "other:sleb-2"),
    ]
    card = client.models.retrieve("gpt-4:sleb-2")
    assert (card.id, card.root, card.pruning["depth"]) == ("GPT-4:sleb-2", "fake", 2)
    for name, depth in [("GPT-4", 0), ("gpt-4:SLEB-1", 1), ("other:sleb-2", 2), ("fake:sleb-2", 2)]:
        assert server.complete("a", model=name).status_code == 200
        assert fake_engine.seen[-1][2] == depth
    assert "GPT-4:sleb-1" in server.complete("a", model="gpt-5").json()["error"]["message"]


def test_an_alias_without_the_full_model_is_the_default_tier(serve_engine, fake_engine):
    fake_engine.tiers = fake_engine.tiers[1:]
    server = serve_engine(fake_engine, served_model_names=("gpt-4", "fake"))
    for name in ("gpt-4", "fake"):
        assert server.complete("a", model=name).json()["model"] == name
        assert fake_engine.seen[-1][2] == 1


def test_an_alias_that_another_tier_has(serve_engine, fake_engine):
    for names in (("fake:sleb-2",), ("FAKE=1",), ("a=1", "a=2"), ("a=1", "A")):
        with pytest.raises(ConfigError, match="choose another name"):
            serve_engine(fake_engine, served_model_names=names)


def test_a_name_of_one_depth(serve_engine, fake_engine):
    server = serve_engine(fake_engine, served_model_names=("Fast=2", "gpt=4=0", "Fast=2"))
    listed = [card["id"] for card in server.http.get("/v1/models").json()["data"]]
    assert listed == ["fake:sleb-1", "fake", "fake:sleb-2", "Fast", "gpt=4"]
    for name, depth in [("Fast", 2), ("gpt=4", 0)]:
        assert server.complete("a", model=name).json()["model"] == name
        assert fake_engine.seen[-1][2] == depth
    assert server.complete("a", model="Fast:sleb-1").status_code == 404


def test_a_name_of_a_depth_that_is_not_served(serve_engine, fake_engine):
    with pytest.raises(ConfigError, match=r"Fast=3 names a depth .* served depths: 0, 1, 2; choose one"):
        serve_engine(fake_engine, served_model_names=("Fast=3",))


def test_an_answer_names_the_model_as_it_was_asked_for(serve_engine, fake_engine):
    server = serve_engine(fake_engine, served_model_names=("GPT-4",))
    for name in ("gpt-4", "GPT-4:SLEB-2", "Fake:sleb-2"):
        assert server.chat("ab", model=name).json()["model"] == name
        assert server.complete("ab", model=name).json()["model"] == name
        events = server.chat("ab", model=name, stream=True).text.strip().split("\n\n")
        assert {json.loads(event.removeprefix("data: "))["model"] for event in events[:-1]} == {name}
    first = server.http.get("/v1/models").json()["data"][0]["id"]
    assert server.chat("ab").json()["model"] == first  # what a request without a model gets is listed first
    metrics = server.http.get("/metrics").text
    assert "GPT" not in metrics and "gpt" not in metrics


# Results of benchmarks.


def result(**changes):
    rows = [
        {"test": test, "depth": depth, "baseline_depth": 0, "batch": batch, "speedup": 1 + depth / batch / 10}
        for test in ("prompt", "generate")
        for batch in (8, 1)
        for depth in (0, 2)
    ]
    content = {
        "environment": {"gpu": None, "cpu": "Some CPU", "dtype": "bfloat16"},
        "model": {"name": "fake", "num_blocks": 6, "fingerprint": None, "removed": ["3", "1"]},
        "settings": {"dataset": "wikitext2"},
        "rows": rows,
    }
    return content | changes


@pytest.fixture
def load_result(tmp_path):
    def load(content):
        path = tmp_path / "result.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return BenchResult.load(str(path))

    return load


def test_speedups_come_from_a_result(serve_engine, fake_engine, load_result):
    measured = load_result(result())
    measured.check(fake_engine)
    server = serve_engine(fake_engine, bench_results=(measured.path,))
    cards = server.http.get("/v1/models").json()["data"]
    assert [card["pruning"]["speedup"] for card in cards[:2]] == [None, None]
    speedup = cards[2]["pruning"]["speedup"]
    assert (speedup["value"], speedup["test"], speedup["batch"]) == (1.2, "generate", 1)
    assert (speedup["device"], speedup["dtype"]) == ("Some CPU", "bfloat16")
    assert [(each["test"], each["batch"]) for each in speedup["measured"]] == [
        *(("generate", 1), ("generate", 8)),
        *(("prompt", 1), ("prompt", 8)),
    ]


def test_perplexities_come_from_a_result_too(serve_engine, fake_engine, load_result):
    rows = [{"depth": 0, "perplexity": 10.0}, {"depth": 2, "perplexity": 12.5}]
    path = load_result(result(rows=rows)).path
    server = serve_engine(fake_engine, bench_results=(path,))
    measured = {"dense": 10.0, "pruned": 12.5, "dataset": "wikitext2", "held_out": True}
    perplexity = server.http.get("/v1/models/fake:sleb-2").json()["pruning"]["perplexity"]
    assert perplexity["dataset"] == "another text" and perplexity["others"][0] == measured
    object.__setattr__(fake_engine.layer_map, "held_out", ())
    cards = server.http.get("/v1/models").json()["data"]
    assert cards[0]["pruning"]["perplexity"] is None
    assert "calibration text alone (some text)" in cards[0]["pruning"]["perplexity_unknown"]
    perplexity = cards[2]["pruning"]["perplexity"]
    assert perplexity.pop("others")[0]["dataset"] == "some text"
    assert perplexity == measured


def test_a_result_on_the_calibration_text_is_no_figure_to_go_by(serve_engine, fake_engine, load_result):
    rows = [{"depth": 0, "perplexity": 10.0}, {"depth": 2, "perplexity": 12.5}]
    object.__setattr__(fake_engine.layer_map, "held_out", ())
    for name, is_told in (("some text", False), ("b.txt+some text", False), ("b.txt", True), (None, False)):
        settings = {"dataset": name}
        path = load_result(result(rows=rows, settings=settings)).path
        server = serve_engine(fake_engine, bench_results=(path,))
        pruning = server.http.get("/v1/models/fake:sleb-2").json()["pruning"]
        assert (pruning["perplexity"] is not None) == is_told
        assert (pruning["perplexity_unknown"] is None) == is_told


def test_answers_to_questions_come_from_a_result_and_ship_with_a_map(serve_engine, fake_engine, load_result):
    rows = [
        {"depth": 2, "metric": "right", "value": 9.0},
        {"depth": 2, "metric": "right sampled", "value": 7.5},
        {"depth": 0, "metric": "right", "value": 18.0},
    ]
    asked = {"questions": 20, "question_samples": 4, "sampling": {"temperature": 0.5}}
    environment = {"command": "sleb eval fake --questions"}
    path = load_result(result(rows=rows, settings=asked, environment=environment)).path
    fake_engine.shipped_results = (Path(path),)
    cards = serve_engine(fake_engine).http.get("/v1/models").json()["data"]
    told = {card["id"]: card["pruning"]["questions"] for card in cards}
    same = {"of": 20, "samples": 4, "sampling": {"temperature": 0.5}, "command": environment["command"]}
    assert told == {
        "fake": same | {"right": 18.0, "right_sampled": None},
        "fake:sleb-1": None,
        "fake:sleb-2": same | {"right": 9.0, "right_sampled": 7.5},
    }
    for settings in ({}, {"questions": "many"}, asked | {"sampling": {"temperature": "hot"}}):
        with pytest.raises(ConfigError, match="is no result"):
            load_result(result(rows=rows, settings=settings, environment=environment))
    fake_engine.shipped_results = ()
    operators = serve_engine(fake_engine, bench_results=(load_result(result()).path,))
    assert operators.http.get("/v1/models/fake").json()["pruning"]["questions"] is None


def test_shipped_results_are_those_of_the_repository_and_fit_the_map():
    alias = ALIASES["smollm2"]
    [path] = alias.shipped_results
    newest = max(RESULTS.glob(f"*-questions-{alias.name}.json"))
    measured = json.loads(newest.read_text())
    for row in measured["rows"]:
        del row["wrong"]
    assert json.loads(path.read_text()) == measured
    layer_map = LayerMap.load(alias.shipped_map)
    settings = measured["settings"]
    assert settings["model"]["removed"] == [str(unit) for unit in layer_map.removed]
    assert settings["model"]["fingerprint"] == layer_map.fingerprint
    assert settings["sampling"] == {**settings["sampling"], **alias.sampling}
    assert set(BenchResult.load(str(path)).questions) == set(range(layer_map.max_depth + 1))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*throughput*.json")), ids=lambda path: path.stem)
def test_a_result_of_this_repository_can_be_read(path):
    found = json.loads(path.read_text())["rows"]
    depth = max(row["depth"] or 0 for row in found)  # of mixed batches it is null
    rows = [row for row in found if row["depth"] == depth]
    speedup = BenchResult.load(str(path)).speedup(depth)
    assert speedup["value"] in {row["speedup"] for row in rows}
    assert len(speedup["measured"]) == len(rows)
    assert speedup["device"]


@pytest.mark.parametrize(
    "model",
    [
        {"num_blocks": 7, "fingerprint": None, "removed": ["3", "1"]},
        {"num_blocks": 6, "fingerprint": None, "removed": ["3", "2"]},
        {"num_blocks": 6, "fingerprint": None, "removed": []},
    ],
)
def test_a_result_of_something_else(fake_engine, load_result, model):
    with pytest.raises(ConfigError, match=r"result\.json was measured"):
        load_result(result(model=model)).check(fake_engine)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": 1, "rows": []}', result(rows=[{}]), result(rows=3)]
)
def test_what_is_no_result(load_result, content):
    with pytest.raises(ConfigError, match=r"--bench-result .*result\.json"):
        load_result(content)
    with pytest.raises(ConfigError, match="No such file"):
        BenchResult.load("/no/such/file.json")


# Keys and origins.


def test_page_and_description_are_open_and_everything_else_guarded(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("key",))
    assert server.http.get("/").status_code == 200
    files = re.findall(r'(?:src|href)="(page/[^"]+)"', server.http.get("/").text)
    assert files
    for path in ("page/nothing", *files):
        assert server.http.get(f"/{path}").status_code in (200, 404)
    for path in ("/docs", "/openapi.json"):  # a browser's link bears no key; what is served they do not tell
        described = server.http.get(path)
        assert described.status_code == 200
        assert "x-api-key" in described.text or "Authorization" in described.text
        assert server.engine.model_name not in described.text
    for path in ("/metrics", "/tokenizer_info", "/page", "/page/../v1/models"):
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
            connection.request("GET", path)
            assert connection.getresponse().status in (401, 404), path
    for path in ("/tokenize", "/detokenize", "/v1/embeddings", "/v1/chat/completions"):
        assert server.http.post(path).status_code == 401


def preflight(server, origin):
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "authorization,content-type"
    return server.http.options("/v1/chat/completions", headers=headers)


def test_no_origin_may_unless_asked(server):
    response = server.http.get("/v1/models", headers={"Origin": "https://a.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in preflight(server, "https://a.example").headers


def test_origins_that_may(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("key",), cors_origins=("https://a.example",))
    response = preflight(server, "https://a.example")
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    assert "authorization" in response.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-origin" not in preflight(server, "https://b.example").headers
    headers = {"Origin": "https://a.example"}
    denied = server.http.get("/v1/models", headers=headers)
    assert denied.status_code == 401  # which the page must be able to read
    assert denied.headers["access-control-allow-origin"] == "https://a.example"
    allowed = server.http.get("/v1/models", headers=headers | {"Authorization": "Bearer key"})
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "x-request-id" in allowed.headers["access-control-expose-headers"].lower()


# Bodies and readers.


def test_a_body_of_five_megabytes(serve_engine, fake_engine):
    fake_engine.max_model_len = 10**7
    server = serve_engine(fake_engine)
    fields = {"user": "ü" * 5 * 2**20, "max_tokens": 3}
    assert server.complete("abc", **fields).json()["choices"][0]["text"] == "abc"
    tokens = list(range(256)) * 5500
    assert len(json.dumps(tokens)) > 5 * 2**20
    assert server.complete(tokens, max_tokens=1).json()["usage"]["prompt_tokens"] == len(tokens)
    answer = server.chat("Grüße " * 10**5, max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] == 8 * 10**5


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("data", [b"\xff\xfe", b'{"prompt": "\xc3\x28"}', b'{"a": "\xed\xa0\x80"}', b"\x00"])
def test_bytes_that_are_no_text(server, path, data):
    response = server.http.post(path, content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_a_body_that_stops_halfway_blocks_nobody(server):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert server.complete("ab").status_code == 200
    assert server.complete("ab").status_code == 200


def test_embeddings_are_refused_in_words(server):
    with server.client() as client, pytest.raises(openai.APIStatusError) as error:
        client.embeddings.create(model="fake", input="a")
    assert error.value.status_code == 501
    assert "no embeddings" in str(error.value)


# Logs.


def log_lines(program, **streams):
    code = f"import logging\nfrom sleb.server.logs import configure\nlog = logging.getLogger('x')\n{program}"
    return subprocess.run([sys.executable, "-c", code], timeout=30, text=True, **streams)


def test_a_json_line_has_every_fact():
    record = logging.LogRecord("a.b", logging.INFO, "f", 1, "request %s\nover", ("x",), None)
    record.facts = {"tokens": 3, "odd": Path("p")}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    content = json.loads(line)
    assert content["message"] == "request x\nover"
    assert (content["tokens"], content["odd"], content["level"]) == (3, "p", "info")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", content["time"])
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        record.exc_info = sys.exc_info()
    assert "ZeroDivisionError" in json.loads(JsonFormatter().format(record))["exception"]


def test_log_level_and_format():
    program = "configure('json', 'warning')\nlog.info('no')\nlog.warning('yes %d', 1)"
    done = log_lines(program, capture_output=True)
    assert [orjson.loads(line)["message"] for line in done.stderr.splitlines()] == ["yes 1"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_ends_nothing():
    program = (
        "import sys\nconfigure('text', 'info')\nfor _ in range(1000): log.info('x' * 1000)\nprint('alive')"
    )
    with open("/dev/full", "w") as full:
        done = log_lines(program, stdout=subprocess.PIPE, stderr=full)
    assert done.stdout == "alive\n"


def test_a_closed_stream_ends_nothing():
    program = (
        "import sys\nconfigure('text', 'info')\nlog.info('a')\nsys.stderr.close()\n"
        "log.info('b')\nlogging.getLogger().handlers[0].flush()\nprint('alive')"
    )
    assert log_lines(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout == "alive\n"


def test_lines_that_nobody_reads_are_dropped_and_counted(monkeypatch):
    reader, writer = os.pipe()
    logger = logging.getLogger("sleb.server")
    handler = logging.StreamHandler(UnblockedStream(os.fdopen(writer, "w")))
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    for number in range(200):
        logger.error("%d %s", number, "x" * 10_000)  # 2 MB into a pipe of 64 KiB and a queue of 1 MiB
        while number == 10 and select.select([], [writer], [], 0)[1]:
            time.sleep(0.001)  # until the pipe is full: what it takes later would make room between the drops
    read = b""
    while read.count(b"\n") < 50:  # now there is room
        read += os.read(reader, 1 << 16)
    logger.error("more")
    while not read.endswith(b"more\n"):
        read += os.read(reader, 1 << 16)
    *lines, notice, last = read.decode().splitlines()
    kept = [int(line.split()[0]) for line in lines]
    assert kept == list(range(len(kept)))  # what waits is not lost
    assert 100 < len(kept) < 120
    assert notice.startswith(f"{200 - len(kept)} lines were dropped here")
    assert last == "more"


def test_a_record_commands_no_terminal_and_looks_like_no_other():
    hostile = "\x1b]0;title\x07 \x9b2J \x7f \ud800 a\tb\n12:00:00 INFO forged"
    record = logging.LogRecord("a.b", logging.INFO, "f", 1, "model %s", (hostile,), None)
    assert LineFormatter("%(levelname)s %(message)s").format(record) == (
        "INFO model \\x1b]0;title\\x07 \\x9b2J \\x7f \\ud800 a\tb\n    12:00:00 INFO forged"
    )
    record.facts = {"path": "\x9b"}
    line = JsonFormatter().format(record)
    assert line.isprintable()
    assert json.loads(line)["message"] == f"model {hostile}"
    assert json.loads(line)["path"] == "\x9b"


def test_a_message_that_cannot_be_made_is_dropped(capsys):
    handler = SafeHandler()
    handler.handle(logging.LogRecord("a", logging.INFO, "f", 1, "%d", ("x",), None))
    assert capsys.readouterr().err == ""


def test_a_server_whose_reader_has_gone_goes_on(fake_engine_script):
    """As with `sleb serve … 2>&1 | head -3`."""
    script = Path(fake_engine_script)
    process = subprocess.Popen([sys.executable, str(script), "0"], stderr=subprocess.PIPE, text=True)
    with process:
        lines = iter(process.stderr.readline, "")
        url = next(found[1] for line in lines if (found := re.search(r"Serving at (http://\S+)/v1", line)))
        process.stderr.close()
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        for _ in range(3):
            connection.request("POST", "/v1/completions", json.dumps({"prompt": "ab"}))
            assert connection.getresponse().read()
        process.terminate()
        assert process.wait(20) == 0


@pytest.fixture
def lines(caplog, wait_until):
    """lines(count) -> that many lines of the log, which are written after their answers, with round times."""
    caplog.set_level("DEBUG", logger="sleb.server")

    def read(count):
        wait_until(lambda: len(caplog.records) >= count)
        texts = [f"{each.levelname} {each.getMessage()}" for each in caplog.records]
        caplog.clear()
        return [re.sub(r"(\d+|[\d.]+) (?=ms|tokens/s)", "N ", text) for text in texts]

    return read


def test_every_request_is_a_line_with_its_status(serve_engine, fake_engine, lines, tmp_path):
    file = tmp_path / "keys"
    file.write_text("alice: secret-a\nplain\n")
    server = serve_engine(fake_engine, api_key_files=(file,))
    lines(0)
    for path, key, more in [
        ("/v1/models?x=hidden", "secret-a", {}),
        ("/v1/models", "plain", {"X-Request-Id": "mine"}),
        ("/v1/models", "wrong", {}),
        ("/health", None, {}),
        ("/page/none.js", None, {}),
    ]:
        bearer = {} if key is None else {"Authorization": f"Bearer {key}"}
        server.http.get(path, headers={"X-Request-Id": "r"} | bearer | more)
    assert lines(5) == [
        "INFO request r: GET /v1/models 200 in N ms, from 127.0.0.1, key alice",
        "INFO request mine: GET /v1/models 200 in N ms, from 127.0.0.1",
        "WARNING request r: GET /v1/models 401 invalid_api_key in N ms, from 127.0.0.1",
        "DEBUG request r: GET /health 200 in N ms, from 127.0.0.1",
        "DEBUG request r: GET /page/none.js 404 in N ms, from 127.0.0.1",
    ]
    server.http.headers = {"x-api-key": "secret-a", "X-Request-Id": "r"}
    for stream in (False, True):
        server.complete("abc", stream=stream)
    answer = "model fake:sleb-1, prompt 3 tokens (0 cached), generated 3, first token N ms, N tokens/s, stop"
    assert (
        lines(2)
        == [f"INFO request r: POST /v1/completions 200 in N ms, from 127.0.0.1, key alice, {answer}"] * 2
    )
    server.complete("abc", temperature=-1)
    assert lines(1) == ["WARNING request r: POST /v1/completions 400 in N ms, from 127.0.0.1, key alice"]
    metrics = server.http.get("/metrics").text
    for kind, count in (("requests", 4), ("prompt_tokens", 6), ("generation_tokens", 6)):
        assert f'sleb:api_key_{kind}_total{{key="alice"}} {count}.0\n' in metrics
    assert "secret" not in metrics and 'key="plain"' not in metrics


def test_a_stream_that_ends_in_an_error_is_a_warning(serve_engine, fake_engine, lines):
    server = serve_engine(fake_engine, request_timeout=0.1)
    fake_engine.delay = 0.02
    lines(0)
    server.complete("x" * 200, stream=True)
    [line] = lines(1)
    assert line.startswith("WARNING ") and "completions 200 timeout in" in line and line.endswith(", timeout")


def test_a_proxys_word_for_the_client_forges_no_line(server, lines):
    lines(0)
    forwarded = b"1.2.3.4\x9b2J" + b"x" * 99
    server.http.get("/v1/models", headers={b"X-Forwarded-For": forwarded, b"X-Request-Id": b"r"})
    assert lines(1) == ["INFO request r: GET /v1/models 200 in N ms, from " + "1.2.3.4\\x9b2J".ljust(67, "x")]


# Metrics under another name.


def test_metrics_may_have_the_names_of_vllm(serve_engine, fake_engine):
    """Those that its example dashboard asks for; there is no cache in the memory of the CPU, and no swapping, here."""
    server = serve_engine(fake_engine, metrics_prefix="vllm")
    server.complete("abc")
    metrics = server.http.get("/metrics").text
    assert "sleb:" not in metrics
    names = set(re.findall(r"^([\w:]+)", metrics, re.MULTILINE))
    for histogram in (
        *("e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds"),
        *("time_per_output_token_seconds", "request_prompt_tokens", "request_generation_tokens"),
        *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_max_num_generation_tokens", "request_inference_time_seconds"),
    ):
        assert {f"vllm:{histogram}_{each}" for each in ("bucket", "sum", "count")} <= names
    for name in (
        *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    ):
        assert f"vllm:{name}" in names


def test_json_logs_of_a_whole_run(start_process, tiny_model_dir):
    flags = ["--port", 0, "--threads", 1, "--log-format", "json", "--kv-cache-memory", 0.01]
    process = start_process("-m", "sleb", "serve", tiny_model_dir, *flags)
    body = json.dumps({"prompt": "abc", "max_tokens": 2})
    connection = http.client.HTTPConnection(process.url.removeprefix("http://"), timeout=20)
    connection.request("POST", "/v1/completions", body, {"X-Request-Id": "mine"})
    assert connection.getresponse().status == 200
    process.signal()
    assert process.wait() == 0
    contents = [json.loads(line) for line in process.output.splitlines()]
    serving = next(each for each in contents if each["message"].startswith("Serving at"))
    assert serving["url"] == process.url
    request = next(each for each in contents if each.get("request") == "mine")
    assert (request["prompt_tokens"], request["generated_tokens"], request["reason"]) == (3, 2, "length")
    assert (request["method"], request["path"], request["status"]) == ("POST", "/v1/completions", 200)
    assert request["ms"] > request["first_token_ms"] and request["client"] == "127.0.0.1"
    assert [each["path"] for each in contents if "path" in each] == ["/v1/completions"]  # not /health
    assert request["first_token_ms"] > 0


# The description of the API.


def references(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from references(each)


def test_openapi_describes_bodies_answers_and_errors(server):
    document = server.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas
    chat = document["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatBody"}
    assert {"messages", "temperature", "tools", "stream"} <= set(schemas["ChatBody"]["properties"])
    assert {"200", "400", "404", "413", "503", "504"} <= set(chat["responses"])
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    for path in ("/tokenize", "/detokenize", "/metrics", "/ready", "/version", "/v1/models/{model_id}"):
        assert path in document["paths"]
    assert not [key for key in schemas if "Validation" in key]
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["responses"]
            assert "422" not in operation["responses"]
            assert operation["description"]


def check_fits(value, schema, schemas):
    """Asserts that a value is what a schema of the document says."""
    jsonschema.Draft202012Validator(schema | {"components": {"schemas": schemas}}).validate(value)


def test_answers_are_as_described(server):
    document = server.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def check(method, path, response, template=None):
        answers = document["paths"][template or path][method]["responses"]
        content = answers[str(response.status_code)]["content"]
        schema = content["application/json"]["schema"]
        check_fits(response.json(), schema, schemas)

    for path in ("/v1/models", "/health", "/ready", "/version"):
        check("get", path, server.http.get(path))
    check("get", "", server.http.get("/v1/models/fake"), "/v1/models/{model_id}")
    check("get", "", server.http.get("/v1/models/nobody"), "/v1/models/{model_id}")
    check("post", "/v1/chat/completions", server.chat("a"))
    check("post", "/v1/chat/completions", server.chat("a", n=0))
    check("post", "/v1/completions", server.complete("a", logprobs=1))
    check("post", "/tokenize", server.post("/tokenize", prompt="a", return_token_strs=True))
    check("post", "/detokenize", server.post("/detokenize", tokens=[1]))
    check("post", "/v1/embeddings", server.post("/v1/embeddings"))
    for path, request in [("/v1/chat/completions", server.chat), ("/v1/completions", server.complete)]:
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        item = schemas[content["text/event-stream"]["itemSchema"]["$ref"].rsplit("/", 1)[-1]]
        end, chunk = item["properties"]["data"]["anyOf"]
        events = request("ab", stream=True, stream_options={"include_usage": True}).text.strip().split("\n\n")
        data = [event.removeprefix("data: ") for event in events]
        check_fits(data.pop(), end, schemas)
        for each in data:
            check_fits(json.loads(each), chunk["contentSchema"], schemas)


def test_openapi_tells_of_keys_only_where_there_are_some(serve_engine, fake_engine, server):
    assert "securitySchemes" not in server.http.get("/openapi.json").json()["components"]
    guarded = serve_engine(fake_engine, api_keys=("key",))
    document = guarded.http.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}, {"x-api-key": []}]
    assert "401" in document["paths"]["/v1/models"]["get"]["responses"]
    assert "security" not in document["paths"]["/health"]["get"]
