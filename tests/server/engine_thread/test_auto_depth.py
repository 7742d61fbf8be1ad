"""A model whose depth the server chooses: idle, in a burst, in a conversation, in every wire format."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from sleb.errors import ConfigError
from sleb.server.conversation_key import conversation_keys
from sleb.server.options import ServeOptions

POLICY = "depths=0,1,2 ttft=1500ms max-perplexity=200% hold=30s"
AUTO = "fake:auto"


@pytest.fixture
def auto(serve_engine, make_fake_engine):
    """Its pace says: a second for each request that waits; four run at once."""
    return serve_engine(make_fake_engine(4096), auto=POLICY, max_queue=20)


def shown(response):
    return re.sub(r'"(id|created|timings|metrics)":("[^"]*"|\d+|\{[^}]*\})', "", response.text)


@pytest.mark.parametrize("stream", [False, True])
def test_an_idle_server_answers_as_depth_0_to_the_byte(auto, stream):
    for _ in range(3):
        ours = auto.chat("hello", model=AUTO, stream=stream)
        exact = auto.chat("hello", model="fake", stream=stream)
        assert shown(ours) == shown(exact)
        assert ours.headers["x-sleb-depth"] == exact.headers["x-sleb-depth"] == "0"
        assert "x-sleb-degraded" not in ours.headers


def ask(server, pool, wait_until, **fields):
    """A request that has been admitted, or refused, and takes long."""
    server.engine.delay = 0.01
    before = len(server.engine.seen)
    answer = pool.submit(server.complete, "abc", max_tokens=1000, ignore_eos=True, **fields)
    wait_until(lambda: len(server.engine.seen) > before or answer.done())
    return answer


def test_a_burst_goes_down_one_level_at_a_time_then_is_refused(auto, wait_until):
    with ThreadPoolExecutor(20) as pool:
        *waiting, last = [ask(auto, pool, wait_until, model=AUTO) for _ in range(8)]
        refused = last.result()
        depths = [depth for _, _, depth in auto.engine.seen]
        auto.engine.delay = 0.0
        answers = [each.result() for each in waiting]
    # The fifth waits a second for a seat, the sixth two: past the target. The eighth finds no depth.
    assert depths == [0, 0, 0, 0, 0, 1, 2]
    assert [answer.json()["model"] for answer in answers] == ["fake"] * 5 + ["fake:sleb-1", "fake:sleb-2"]
    assert [answer.headers["x-sleb-depth"] for answer in answers] == ["0"] * 5 + ["1", "2"]
    assert [answer.headers.get("x-sleb-degraded") for answer in answers] == [None] * 5 + ["queue"] * 2
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "overloaded" and "retry-after" in refused.headers
    text = auto.http.get("/metrics").text
    assert 'sleb:degraded_requests_total{from="0",to="1"} 1.0' in text
    assert 'sleb:degraded_requests_total{from="0",to="2"} 1.0' in text
    spent = re.findall(r'sleb:auto_depth_seconds_total\{depth="(\d)"\} (\S+)', text)
    assert [depth for depth, _ in spent] == ["0", "1", "2"] and all(float(each) > 0 for _, each in spent)


def test_an_exact_id_and_a_request_that_says_so_keep_their_depth(auto, wait_until):
    with ThreadPoolExecutor(20) as pool:
        waiting = [ask(auto, pool, wait_until, model=AUTO) for _ in range(7)]
        exact = [ask(auto, pool, wait_until, model=name) for name in ("fake", "fake:sleb-1")]
        fixed = ask(auto, pool, wait_until, model=AUTO, depth="fixed")
        auto.engine.delay = 0.0
        assert [each.result().json()["model"] for each in exact] == ["fake", "fake:sleb-1"]
        assert fixed.result().json()["model"] == "fake"
        assert "x-sleb-degraded" not in fixed.result().headers
        assert all(each.result().status_code == 200 for each in waiting)


@pytest.mark.parametrize(
    ("fronts", "stream"), [(0, False), (0, True), (2, True), pytest.param(2, False, marks=pytest.mark.slow)]
)
def test_every_wire_format_tells_the_depth_that_ran(
    serve_engine, make_fake_engine, wait_until, fronts, stream
):
    server = serve_engine(make_fake_engine(4096), auto=POLICY, max_queue=40, fronts=fronts)
    said = [{"role": "user", "content": "abc"}]
    bodies = {
        "/v1/chat/completions": {"messages": said, "max_tokens": 3},
        "/v1/completions": {"prompt": "abc", "max_tokens": 3},
        "/v1/responses": {"input": "abc", "max_output_tokens": 3},
        "/v1/messages": {"messages": said, "max_tokens": 3},
        "/api/chat": {"messages": said, "options": {"num_predict": 3}},
        "/api/generate": {"prompt": "abc", "options": {"num_predict": 3}},
    }
    server.engine.seen.clear()
    with ThreadPoolExecutor(40) as pool:
        waiting = [ask(server, pool, wait_until, model=AUTO) for _ in range(6)]  # the intake is at depth 1
        server.engine.pace.seat_seconds = 0.01  # and stays there
        answers = {}
        for path, body in bodies.items():
            before = len(server.engine.seen)
            answers[path] = pool.submit(
                server.http.post, path, json=body | {"model": AUTO.upper(), "stream": stream}
            )
            wait_until(lambda before=before: len(server.engine.seen) > before)
        server.engine.delay = 0.0
        for path, answer in answers.items():
            response = answer.result()
            assert response.status_code == 200, response.text
            assert response.headers["x-sleb-depth"] == "1", path
            assert response.headers["x-sleb-degraded"] == "queue"
            assert '"model":"fake:sleb-1"' in response.text, path
            assert "fake:auto" not in response.text.lower()
        assert all(each.result().status_code == 200 for each in waiting)


def test_a_conversation_keeps_its_depth(auto, wait_until):
    first = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    again = [*first, {"role": "assistant", "content": "1"}, {"role": "user", "content": "two"}]
    other = [{"role": "user", "content": "elsewhere"}]
    path, limit = "/v1/chat/completions", {"model": AUTO, "max_tokens": 3}
    with ThreadPoolExecutor(20) as pool:
        waiting = [ask(auto, pool, wait_until, model=AUTO) for _ in range(6)]
        auto.engine.pace.seat_seconds = 0.01
        begun = pool.submit(auto.http.post, path, json=limit | {"messages": first})
        wait_until(lambda: len(auto.engine.seen) == 7)
        auto.engine.delay = 0.0
        assert begun.result().headers["x-sleb-depth"] == "1"
        [each.result() for each in waiting]
    auto.context.engine.auto._governor._level = 0  # as after the hold
    assert auto.http.post(path, json=limit | {"messages": other}).headers["x-sleb-depth"] == "0"
    assert auto.http.post(path, json=limit | {"messages": again}).headers["x-sleb-depth"] == "1"
    assert auto.http.post(path, json=limit | {"messages": again[2:]}).headers["x-sleb-depth"] == "0"


def test_keys_of_a_conversation_go_on_and_tell_owners_apart():
    first = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    again = [*first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    [key] = conversation_keys(b"me", first)
    assert conversation_keys(b"me", again)[0] == key
    assert conversation_keys(b"you", first) != (key,)
    assert len(conversation_keys(b"me", [*again] * 50)) == 8
    assert conversation_keys(b"me", first[:1]) == ()


def test_models_tell_the_policy(auto):
    models = {model["id"]: model for model in auto.http.get("/v1/models").json()["data"]}
    assert models[AUTO]["policy"] == {
        "depths": [0, 1, 2],
        "allowed": [0, 1, 2],
        "target_ttft_ms": 1500.0,
        "max_perplexity_increase": 2.0,
        "hold_seconds": 30.0,
    }
    assert models[AUTO]["pruning"] == models["fake"]["pruning"]
    assert all("policy" not in model for name, model in models.items() if name != AUTO)
    assert auto.http.get(f"/v1/models/{AUTO}").json() == models[AUTO]


def test_the_bound_on_quality_leaves_depths_out(serve_engine, make_fake_engine, caplog):
    """Held out, depth 1 has exp(0.1) times the perplexity, depth 2 exp(0.4)."""
    allowed = {"5%": [0], "11%": [0, 1], "60%": [0, 1, 2]}
    for bound, depths in allowed.items():
        policy = f"depths=0,1,2 ttft=1s max-perplexity={bound}"
        server = serve_engine(make_fake_engine(), auto=policy)
        assert server.http.get(f"/v1/models/{AUTO}").json()["policy"]["allowed"] == depths
    from sleb.server.logs import describe_auto

    server = serve_engine(make_fake_engine(), auto="depths=0,2 ttft=1s max-perplexity=5%")
    assert "is always depth 0" in describe_auto(server.context.auto)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto": "depths=0,5 ttft=1s max-perplexity=5%"}, "--auto names depth 5, which is not served"),
        ({"auto": "depths=2,1 ttft=1s max-perplexity=5%"}, "the shallowest cut first"),
        ({"auto": "depths=1,2 ttft=1s max-perplexity=5%"}, "begin with depth 0"),
        ({"auto": POLICY, "served_model_names": ("fake:AUTO=1",)}, "which is the name that --auto gives"),
    ],
)
def test_a_policy_that_this_server_cannot_have_is_refused(serve_engine, make_fake_engine, options, message):
    def serve():
        ServeOptions(**options).check()
        serve_engine(make_fake_engine(), **options)

    with pytest.raises(ConfigError, match=message):
        serve()
