"""What is the same for every endpoint: paths, methods, request ids; and the small GET endpoints."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from dataclasses import replace
from datetime import datetime

import pytest

import sleb
from sleb.layer_map.layer_map import CalibrationRecord, TextLosses
from sleb.server.logs import curl_line


def test_models_tell_what_was_removed(server):
    answer = server.http.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["fake:sleb-1", "fake", "fake:sleb-2"]
    card = server.http.get("/v1/models/fake:sleb-2").json()
    assert card == answer["data"][2]
    created = card.pop("created")
    assert isinstance(created, int)
    assert datetime.fromisoformat(card.pop("created_at")).timestamp() == created
    assert card == {
        "id": "fake:sleb-2",
        "object": "model",
        "type": "model",
        "display_name": "fake:sleb-2",
        "lifecycle": "active",
        "max_input_tokens": 256,
        "owned_by": "sleb",
        "root": "fake",
        "parent": "fake",
        "max_model_len": 256,
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        "pruning": {
            "depth": 2,
            "num_blocks": 6,
            "blocks_kept": 4,
            "units_removed": ["3", "1"],
            "weight_bytes": 4000,
            "kv_bytes_per_token": 40,
            "perplexity": {
                "dense": pytest.approx(math.exp(2.1)),
                "pruned": pytest.approx(math.exp(2.5)),
                "dataset": "another text",
                "held_out": True,
                "others": [
                    {
                        "dense": pytest.approx(math.exp(2.0)),
                        "pruned": pytest.approx(math.exp(2.3)),
                        "dataset": "some text",
                        "held_out": False,
                    }
                ],
            },
            "perplexity_unknown": None,
            "speedup": None,
            "questions": None,
        },
    }
    assert [card["parent"] for card in answer["data"]] == ["fake", None, "fake"]


def test_a_perplexity_of_the_calibration_text_is_not_told_alone(serve_engine, fake_engine):
    """Whatever makes it the only one: no other text, the same tokens, the same source, or no name."""
    server = serve_engine(fake_engine)
    known = fake_engine.layer_map.held_out[0]

    def told(calibration: CalibrationRecord, *held_out: TextLosses) -> dict:
        made = replace(fake_engine.layer_map, calibration=calibration, held_out=held_out)
        object.__setattr__(fake_engine, "layer_map", made)
        return server.http.get("/v1/models/fake:sleb-2").json()["pruning"]

    def of(**changes) -> TextLosses:
        return replace(known, record=replace(known.record, **changes))

    seen = CalibrationRecord(source="wiki.txt=0.5,self=0.5", seqlen=50, windows=2, token_hash="sha256:1")
    for texts in (
        (),
        (of(source="wiki.txt"),),
        (of(token_hash="sha256:1"),),
        (of(source=None),),
        (of(windows=None),),
    ):
        pruning = told(seen, *texts)
        assert pruning["perplexity"] is None
        assert "on the calibration text alone (" in pruning["perplexity_unknown"]
        assert "--held-out" in pruning["perplexity_unknown"]
    pruning = told(seen, of(source="wiki.txt"), of(source="self"))
    assert pruning["perplexity_unknown"] is None and pruning["perplexity"]["dataset"] == "self"
    assert [(each["dataset"], each["held_out"]) for each in pruning["perplexity"]["others"]] == [
        ("wiki.txt", False),
        ("wiki.txt=0.5,self=0.5", False),
    ]
    pruning = told(CalibrationRecord())
    assert pruning["perplexity"] is None and "not known of any text" in pruning["perplexity_unknown"]


@pytest.mark.parametrize(
    "path", ["/health", "/v1/health", "/ready", "/version", "/", "/v1//models", "//v1/models/"]
)
def test_get_and_head(server, path):
    response = server.http.get(server.url + path)
    assert response.status_code == 200
    head = server.http.head(server.url + path)
    assert head.status_code == 200
    assert head.content == b""


def test_version(server):
    assert server.http.get("/version").json() == {"version": sleb.__version__}


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/openapi.json", "GET, HEAD, OPTIONS"),
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/nowhere", None),
    ],
)
def test_options(server, path, allow):
    response = server.http.options(path)
    assert response.status_code == (204 if allow else 404)
    assert response.headers.get("allow") == allow


def test_request_id_is_echoed_made_and_cleaned(server):
    def sent(value):
        return server.http.get("/health", headers={"X-Request-Id": value}).headers["x-request-id"]

    assert sent("abc-1.2:3") == "abc-1.2:3"
    assert sent("a b\tc<d>") == "abcd"
    assert len(sent("x" * 1000)) == 128
    made = {server.http.get("/health").headers["x-request-id"], sent("<>")}
    assert len(made) == 2
    assert all(len(each) > 20 for each in made)
    assert server.chat("a", stream=True).headers["x-request-id"]
    assert server.http.get("/nowhere").headers["x-request-id"]


def test_pipelined_requests_on_one_connection(server):
    for _ in range(20):
        assert server.complete("ab").json()["choices"][0]["text"] == "ab"


@pytest.mark.parametrize("can_chat", [True, False])
def test_the_curl_line_works_as_printed(server, can_chat):
    line = curl_line(server.url, "fake", can_chat, needs_key=False)
    done = subprocess.run(["bash", "-c", line.replace("curl", "curl -s", 1)], capture_output=True, timeout=20)
    if done.returncode == 127:
        pytest.skip("curl is not installed")
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_throughput_is_logged_while_there_is_any(serve_engine, fake_engine, wait_until, caplog):
    caplog.set_level("INFO")
    server = serve_engine(fake_engine, log_interval=0.05)
    fake_engine.delay = 0.01
    server.complete("x" * 30, max_tokens=30)

    def lines():
        return [each.getMessage() for each in caplog.records if "running" in each.getMessage()]

    wait_until(lines)
    assert re.search(r"generation \d+\.\d tokens/s, running \d, waiting \d", lines()[0])
    server.wait_idle()
    time.sleep(0.15)
    before = len(lines())
    time.sleep(0.15)
    assert len(lines()) == before


def test_the_engine_is_touched_by_one_thread_only(server):
    server.chat("a")
    assert len(server.engine.threads) == 1
    assert server.thread.ident not in server.engine.threads
