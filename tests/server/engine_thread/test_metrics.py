"""GET /metrics, read by prometheus_client's own parsers, and what each answer tells of its speed."""

from __future__ import annotations

import http.client
import json
import random
import re
import time
from types import SimpleNamespace

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from sleb.engine.outputs import Timings
from sleb.server.answer.timings import Span, llama_timings, request_metrics
from sleb.server.engine_thread.metrics import REQUEST_BOUNDS, TOKEN_BOUNDS, Histogram, TierMetrics

MODEL = "fake:sleb-1"


def scrape(server):
    """Value by sample name and labels."""
    response = server.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name.removeprefix("sleb:"), frozenset(sample.labels.items())): sample.value
        for family in parse(response.text)
        for sample in family.samples
    }


def value(samples, name, **labels):
    return samples[name, frozenset(labels.items())]


def count(samples, name, model=MODEL):
    return value(samples, f"{name}_count", model_name=model)


@pytest.fixture
def server(serve_engine, fake_engine):
    return serve_engine(fake_engine)


def test_an_answer_is_counted_under_its_tier(server, wait_until):
    before = scrape(server)
    server.complete("hello", max_tokens=3)
    server.complete("hello", model="fake", n=2)
    server.complete("hello", max_tokens=3, stream=True)
    requests = {"method": "POST", "path": "/v1/completions", "status": "200"}
    wait_until(lambda: scrape(server).get(("http_requests_total", frozenset(requests.items()))) == 3)
    after = scrape(server)
    assert value(before, "generation_tokens_total", model_name=MODEL) == 0
    assert value(after, "generation_tokens_total", model_name=MODEL) == 6
    assert value(after, "generation_tokens_total", model_name="fake") == 10
    assert value(after, "prompt_tokens_total", model_name=MODEL) == 10
    assert value(after, "request_success_total", model_name=MODEL, finished_reason="length") == 2
    assert value(after, "request_success_total", model_name="fake", finished_reason="stop") == 2
    assert value(after, "request_success_total", model_name="fake:sleb-2", finished_reason="stop") == 0
    assert count(after, "time_to_first_token_seconds") == 2
    assert count(after, "inter_token_latency_seconds") == count(after, "time_per_output_token_seconds") == 4
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert count(after, f"{name}_seconds") == 2
    assert value(after, "request_prompt_tokens_bucket", model_name=MODEL, le="2.0") == 0
    assert value(after, "request_prompt_tokens_bucket", model_name=MODEL, le="5.0") == 2
    assert value(after, "request_generation_tokens_sum", model_name=MODEL) == 6


def test_times_are_those_that_passed(serve_engine, fake_engine):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.03
    begin = time.monotonic()
    server.complete("hello")
    spent = time.monotonic() - begin
    samples = scrape(server)
    first = value(samples, "time_to_first_token_seconds_sum", model_name=MODEL)
    decode = value(samples, "request_decode_time_seconds_sum", model_name=MODEL)
    total = value(samples, "e2e_request_latency_seconds_sum", model_name=MODEL)
    assert first >= 0.03
    assert 4 * 0.03 <= decode < spent
    assert first + decode == pytest.approx(total)
    between = value(samples, "inter_token_latency_seconds_sum", model_name=MODEL)
    assert between == pytest.approx(decode, abs=0.02)
    assert value(samples, "inter_token_latency_seconds_bucket", model_name=MODEL, le="0.025") == 0
    mean = value(samples, "request_time_per_output_token_seconds_sum", model_name=MODEL)
    assert mean == pytest.approx(decode / 4)


def test_queues_are_gauges_of_each_tier_and_the_cache_of_all(serve_engine, fake_engine, wait_until):
    fake_engine.max_running = 2
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.02
    body = {"prompt": "x" * 200, "stream": True}
    with (
        server.http.stream("POST", "/v1/completions", json=body | {"model": "fake"}),
        server.http.stream("POST", "/v1/completions", json=body | {"n": 5}),
    ):
        wait_until(lambda: server.context.engine.stats.num_waiting == 4)
        samples = scrape(server)
        for state, counts in {"running": (1, 1, 0), "waiting": (0, 4, 0)}.items():
            tiers = ("fake", "fake:sleb-1", "fake:sleb-2")
            found = [value(samples, f"num_requests_{state}", model_name=tier) for tier in tiers]
            assert found == list(counts)
            assert picked(server.http.get("/metrics").text, f"sleb:engine_requests_{state}") == sum(counts)
        assert value(samples, "kv_cache_usage_perc", model_name="fake") == 0
        assert value(samples, "num_preemptions_total", model_name="fake") == 0
    server.wait_idle()
    wait_until(lambda: value(scrape(server), "request_aborted_total", model_name=MODEL) == 5)
    assert value(scrape(server), "num_requests_running", model_name=MODEL) == 0


def picked(text, name):
    """What the endpoint picker of the Gateway API takes for a metric without time stamps: the first series of its name
    (gateway-api-inference-extension, pkg/epp/backend/metrics, getLatestMetric)."""
    first = next(line for line in text.splitlines() if re.match(rf"{name}[ {{]", line))
    return float(first.split()[-1])


def test_under_vllms_prefix_the_first_series_is_the_total(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine, metrics_prefix="vllm")
    fake_engine.delay = 0.02
    body = {"prompt": "x" * 200, "stream": True}
    with (
        server.http.stream("POST", "/v1/completions", json=body | {"model": "fake:sleb-2", "n": 3}),
        server.http.stream("POST", "/v1/completions", json=body | {"n": 5}),
    ):
        wait_until(lambda: server.context.engine.stats.num_waiting == 4)
        text = server.http.get("/metrics").text
        assert picked(text, "vllm:num_requests_waiting") == picked(text, "vllm:num_requests_running") == 4
    assert 'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1.0' in text


def test_failures_are_counted_by_code(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine, api_keys=("key",), max_num_seqs=1, max_queue=0)
    server.http.headers["Authorization"] = "Bearer key"
    server.complete("x" * 300)
    server.complete("a", model="nobody")
    server.complete("a", model="nobody", stream=True)
    server.complete("a", temperature=-1)
    server.http.post("/v1/completions", content=b"{")
    server.http.get("/v1/models", headers={"Authorization": "Bearer wrong"})
    fake_engine.delay = 0.02
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "x" * 100, "stream": True}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.complete("a")
        samples = scrape(server)
        fake_engine.error = RuntimeError("broken")
        assert any("engine_dead" in line for line in lines)
    failures = {
        "context_length_exceeded": 1,
        "model_not_found": 2,
        "400": 1,
        "invalid_json": 1,
        "invalid_api_key": 1,
        "overloaded": 1,
    }
    for code, number in failures.items():
        assert value(samples, "request_failure_total", code=code) == number
    wait_until(lambda: ("request_failure_total", frozenset({("code", "engine_dead")})) in scrape(server))
    samples = scrape(server)
    assert value(samples, "request_aborted_total", model_name=MODEL) == 0
    requests = {"method": "POST", "path": "/v1/completions"}
    assert value(samples, "http_requests_total", status="404", **requests) == 2
    assert value(samples, "http_requests_total", status="503", **requests) == 1
    assert value(samples, "http_requests_total", method="GET", path="other", status="401") == 1


def test_paths_and_methods_of_strangers_make_no_series(server):
    for number in range(20):
        server.http.get(f"/nowhere/{number}")
        server.http.get(f"/v1/models/nobody-{number}")
    server.http.request("PROPFIND", "/health")
    seen = [dict(labels) for name, labels in scrape(server) if name == "http_requests_total"]
    assert {labels["path"] for labels in seen} == {"other", "/v1/models/{model_id:path}", "/health"}
    assert {labels["method"] for labels in seen} == {"GET", "other"}


def test_unknown_fields_are_counted(server):
    server.complete("a", colour="red", flavour="blue")
    server.complete("a", colour="green")
    assert value(scrape(server), "unknown_request_fields_total") == 3


def test_names_keep_their_colon_whatever_is_accepted(server):
    """Prometheus itself prefers OpenMetrics, in which prometheus-client would rename the samples."""
    accept = "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8, text/plain; q=0.5"
    response = server.http.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {sample.name for family in parse(response.text) for sample in family.samples}
    assert {"sleb:time_to_first_token_seconds_count", "sleb:generation_tokens_total"} <= names


def test_bounds_are_those_of_vllm(server):
    """From its documentation's dump of /metrics: e2e from 0.3 to 7680 s, tokens from 0.01 to 80 s."""
    samples = scrape(server)

    def bounds(name):
        found = [dict(labels) for each, labels in samples if each == f"{name}_bucket"]
        return [labels["le"] for labels in found if labels["model_name"] == MODEL]

    assert bounds("e2e_request_latency_seconds")[:3] == ["0.3", "0.5", "0.8"]
    assert bounds("e2e_request_latency_seconds")[-2:] == ["7680.0", "+Inf"]
    assert bounds("time_to_first_token_seconds")[:2] == ["0.001", "0.005"]
    assert len(bounds("time_to_first_token_seconds")) == 23
    assert bounds("inter_token_latency_seconds") == [*map(str, TOKEN_BOUNDS), "+Inf"]
    assert bounds("request_prompt_tokens") == [
        "1.0",
        "2.0",
        "5.0",
        "10.0",
        "20.0",
        "50.0",
        "100.0",
        "200.0",
        "+Inf",
    ]


def test_histogram_counts_as_prometheus_client_does():
    registry = prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("h", "h", buckets=REQUEST_BOUNDS, registry=registry)
    ours = Histogram(REQUEST_BOUNDS)
    numbers = random.Random(0)
    for number in [*REQUEST_BOUNDS, 0.0, 1e9, *(numbers.uniform(0, 100) for _ in range(500))]:
        theirs.observe(number)
        ours.observe(number)
    samples = next(iter(registry.collect())).samples
    assert dict(ours.buckets()) == {each.labels["le"]: each.value for each in samples if "le" in each.labels}
    assert ours.sum == pytest.approx(registry.get_sample_value("h_sum"))


def test_counting_a_token_is_cheap():
    metrics = TierMetrics(1000)
    output = SimpleNamespace(
        new_token_ids=[1],
        finish_reason=None,
        timings=Timings(arrival=0.0),
        num_prompt_tokens=1,
        num_cached_tokens=0,
    )
    begin = time.perf_counter()
    for number in range(20_000):
        metrics.observe(output, 0.0, number * 0.01, number * 0.01 + 0.02)
    assert (time.perf_counter() - begin) / 20_000 < 20e-6


def test_the_header_tells_where_time_went(serve_engine, fake_engine):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.02
    begin = time.monotonic()
    response = server.complete("hello")
    spent = (time.monotonic() - begin) * 1e3
    phases = {
        name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"])
    }
    assert list(phases) == ["queue", "prefill", "decode", "total"]
    assert phases["decode"] >= 80
    assert sum(list(phases.values())[:3]) <= phases["total"] + 0.1 <= spent + 0.2
    for path in ("/health", "/nowhere"):
        assert re.fullmatch(r"total;dur=[\d.]+", server.http.get(path).headers["server-timing"])


def test_request_metrics_by_hand():
    """Arrival at 10 s, first step at 12, first tokens at 13 and 14, ends at 18 and 17: 5 tokens of two choices."""
    span = Span.of([Timings(10.5, 12.0, 13.0, 18.0), Timings(10.5, 12.5, 14.0, 17.0)])
    usage = {"prompt_tokens": 8, "completion_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3}}
    assert request_metrics(usage, 2, span, 10.0, 1e9) == {
        "arrival_time": 1e9,
        "time_in_queue": 2.0,
        "time_to_first_token": 3.0,
        "generation_time": 5.0,
        "tokens_per_second": 2.0,
    }
    timings = llama_timings(usage, 2, span)
    assert (timings["prompt_n"], timings["prompt_ms"], timings["prompt_per_second"]) == (5, 1000.0, 5.0)
    assert (timings["predicted_n"], timings["predicted_ms"]) == (12, 5000.0)
    assert (timings["predicted_per_second"], timings["predicted_per_token_ms"]) == (2.0, 500.0)


def test_the_log_tells_the_speed_of_an_answer_that_was_given_up(
    serve_engine, fake_engine, wait_until, caplog
):
    """A step takes 0.05 s: 20 tokens a second, or fewer on a busy machine."""
    caplog.set_level("INFO")
    fake_engine.delay = 0.05
    server = serve_engine(fake_engine)
    body = {"prompt": "x" * 100, "max_tokens": 100, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        for _, line in zip(range(6), filter(None, response.iter_lines()), strict=False):
            assert '"text":"x"' in line
    wait_until(lambda: "disconnected" in caplog.text)
    [told] = re.findall(r"generated (\d+), first token \d+ ms, ([\d.]+) tokens/s, disconnected", caplog.text)
    assert 6 <= int(told[0]) < 100
    assert 2 < float(told[1]) < 21


def test_request_metrics_before_anything_is_known():
    usage = {"prompt_tokens": 8, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
    metrics = request_metrics(usage, 0, Span.of([], 10.0), 10.0, 1e9)
    assert metrics["time_in_queue"] == metrics["generation_time"] == 0.0
    assert metrics["tokens_per_second"] is None


def test_a_slow_reader_does_not_stretch_the_time_between_tokens(serve_engine, wait_until):
    from contextlib import closing

    server = serve_engine(_wordy_engine())
    body = json.dumps({"prompt": "x" * 20_000, "max_tokens": 20_000, "ignore_eos": True, "stream": True})
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("POST", "/v1/completions", body)
        connection.getresponse().read(1)  # and no more
        wait_until(lambda: not server.engine.has_unfinished(), 20)
        time.sleep(0.3)
        begin = time.monotonic()
        assert server.complete("quick").status_code == 200
        assert time.monotonic() - begin < 1
        samples = scrape(server)
        assert count(samples, "inter_token_latency_seconds") == 20_000 - 1 + 4
        assert value(samples, "inter_token_latency_seconds_bucket", model_name=MODEL, le="0.3") >= 20_000


def _wordy_engine():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location(
        "wordy_engine", Path(__file__).parents[1] / "fake_engine.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FakeEngine(max_model_len=50_000)
