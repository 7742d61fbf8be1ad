"""Traces, as a collector gets them: OTLP over a real socket from a server in a process of its own."""

from __future__ import annotations

import gzip
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sleb.server import traces

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector(monkeypatch):
    """Its address, and the paths and bodies that were sent there."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()


def spans(received):
    found = []
    for path, body in received:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            found += [span for scope in resource.scope_spans for span in scope.spans]
    return found


def attributes(span):
    values = {each.key: each.value for each in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


def test_spans_of_requests_reach_a_collector(start_process, fake_engine_script, collector):
    address, received = collector
    server = start_process(fake_engine_script, 0, environment={"OTEL_EXPORTER_OTLP_ENDPOINT": address})
    url = f"{server.url}/v1/completions"
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    assert httpx.post(url, json={"prompt": "abc"}, headers=headers).status_code == 200
    assert "[DONE]" in httpx.post(url, json={"prompt": "abcd", "stream": True}, headers=headers).text
    assert httpx.post(url, json={"prompt": "a", "model": "none"}).status_code == 404
    assert httpx.get(f"{server.url}/page/app.js").status_code == 200
    server.signal()
    assert server.wait() == 0  # what is left is sent before the end
    whole, stream, failed = sorted(spans(received), key=lambda span: span.start_time_unix_nano)
    for span, num_prompt in [(whole, 3), (stream, 4)]:
        assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == (
            *("POST /v1/completions", TRACE),
            PARENT,
        )
        found = attributes(span)
        assert found["http.response.status_code"] == 200
        assert found["http.route"] == "/v1/completions"
        assert found["sleb.request_id"] == "mine"
        assert found["gen_ai.response.model"] == "fake:sleb-1"
        assert found["gen_ai.usage.input_tokens"] == num_prompt
        assert found["gen_ai.usage.output_tokens"] == num_prompt
        assert [each.string_value for each in found["gen_ai.response.finish_reasons"].values] == ["stop"]
        assert 0 < found["gen_ai.latency.time_to_first_token"] < 20
        assert not any("abc" in str(value) for value in found.values())
    found = attributes(failed)
    assert (found["http.response.status_code"], found["sleb.error"]) == (404, "model_not_found")
    assert server.output.count(f", trace {TRACE}, model fake:sleb-1") == 2


def test_without_a_collector_nothing_is_recorded(server, monkeypatch):
    assert server.http.get("/v1/models").status_code == 200
    assert traces.current_span() is None
    assert not traces.settings(lambda scope: False)["telemetry"]["auto_configure"]


def test_a_missing_extra_is_told(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with caplog.at_level(logging.WARNING, logger="sleb.server"):
        assert not traces.settings(lambda scope: False)["telemetry"]["auto_configure"]
    assert 'pip install "sleb[otel]"' in caplog.text
