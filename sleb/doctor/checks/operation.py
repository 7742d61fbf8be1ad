"""What keeps a server running: health, metrics, headers, and clients that leave."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import httpx

from sleb.doctor.check import Group
from sleb.doctor.outcome import MissingFeatureError, expect, skip
from sleb.doctor.target import CHAT, COMPLETIONS, GREEDY, PROMPT, Json, Target, ok, shown

GROUP = Group("operation")

# vLLM, SGLang and sleb; llama.cpp; TGI.
_RUNNING = re.compile(
    r"^(?:\w+:num_(?:requests_running|running_reqs)|llamacpp:requests_processing|tgi_batch_current_size)"
    r"(?:\{[^}]*\})? +([0-9.e+]+)",
    re.MULTILINE,
)
_ABORT_SECONDS = 3.0
_LONG: Json = {"max_tokens": 1000, "temperature": 1.0, "ignore_eos": True}


def _there(target: Target, path: str) -> str:
    """The body of a 200; ends the check otherwise, without asking for JSON."""
    response = target.get_root(path)
    if response.status_code in (404, 405, 501):
        raise MissingFeatureError(f"GET {path}: HTTP {response.status_code}")
    expect(response.status_code == 200, f"GET {path}: HTTP {response.status_code}")
    return response.text


@GROUP.sleb_only
def health_is_200(target: Target) -> None:
    """GET /health of a living server is 200. Source: vLLM, llama.cpp, SGLang, TGI, sleb."""
    _there(target, "/health")


@GROUP.sleb_only
def health_needs_no_key(target: Target) -> None:
    """GET /health is 200 without a key, for load balancers. Source: vLLM, llama.cpp, sleb."""
    response = target.http.get(f"{target.root}/health", headers={"Authorization": ""})
    if response.status_code == 404:
        raise MissingFeatureError("GET /health: HTTP 404")
    expect(response.status_code == 200, f"HTTP {response.status_code}")


@GROUP.sleb_only
def ready_is_200(target: Target) -> None:
    """GET /ready of a server that takes requests is 200. Source: sleb."""
    _there(target, "/ready")


@GROUP.sleb_only
def the_version_is_told(target: Target) -> None:
    """GET /version is {"version": …}. Source: vLLM, sleb."""
    version = ok(target.get_root("/version"))["version"]
    expect(isinstance(version, str) and version, f"version is {shown(version)}")


@GROUP.sleb_only
def the_documentation_needs_no_network(target: Target) -> None:
    """GET /docs is a page that loads nothing from another server. Source: sleb."""
    page = _there(target, "/docs")
    foreign = re.findall(r"""(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""", page)
    loaded = [each for each in foreign if re.search(r"\.(js|css)\b", each)]
    expect(not loaded, f"it loads {shown(loaded)}")


@GROUP.sleb_only
def metrics_are_told(target: Target) -> None:
    """GET /metrics is Prometheus text with running requests, prompt and generated tokens. Source: vLLM, sleb."""
    text = _there(target, "/metrics")
    for suffix in (
        "num_requests_running",
        "num_requests_waiting",
        "prompt_tokens_total",
        "generation_tokens_total",
    ):
        expect(re.search(rf"^\w+:{suffix}[{{ ]", text, re.MULTILINE), f"{suffix} is missing")


@GROUP.sleb_only
def metrics_count_tokens(target: Target) -> None:
    """generation_tokens_total rises by the tokens of an answer. Source: vLLM, sleb."""

    def count() -> float:
        values = re.findall(
            r"^\w+:generation_tokens_total(?:\{[^}]*\})? +([0-9.e+]+)",
            _there(target, "/metrics"),
            re.MULTILINE,
        )
        expect(values, "generation_tokens_total is missing")
        return sum(map(float, values))

    before = count()
    number = target.complete(**GREEDY)["usage"]["completion_tokens"]
    deadline = time.monotonic() + _ABORT_SECONDS
    while count() < before + number and time.monotonic() < deadline:
        time.sleep(0.05)
    expect(count() >= before + number, f"it rose by {count() - before:g} for {number} tokens")


@GROUP.sleb_only
def head_is_answered(target: Target) -> None:
    """HEAD of /models is 200 without a body. Source: sleb."""
    response = target.http.head("models")
    expect(response.status_code == 200, f"HTTP {response.status_code}")
    expect(not response.content, "there is a body")


@GROUP.sleb_only
def options_are_answered(target: Target) -> None:
    """OPTIONS of the chat's path is 200 or 204 and allows POST. Source: sleb."""
    response = target.http.options(CHAT)
    expect(response.status_code in (200, 204), f"HTTP {response.status_code}")
    expect("POST" in response.headers.get("allow", ""), f"Allow is {shown(response.headers.get('allow'))}")


@GROUP.sleb_only
def a_double_slash_is_one(target: Target) -> None:
    """/v1//models is /v1/models: clients join addresses carelessly. Source: sleb."""
    response = target.http.get(f"{target.url}//models")
    expect(response.status_code == 200, f"HTTP {response.status_code}")


@GROUP.sleb_only
def a_request_has_an_id(target: Target) -> None:
    """Every answer has a header X-Request-Id of its own, errors too. Source: OpenAI API, sleb."""
    responses = [
        target.http.get("models"),
        target.http.get("models"),
        target.http.get("models/no-such-model"),
    ]
    ids = [response.headers.get("x-request-id") for response in responses]
    expect(all(ids), f"the ids are {ids}")
    expect(len(set(ids)) == 3, f"the ids are {ids}")


@GROUP.sleb_only
def a_request_id_comes_back(target: Target) -> None:
    """A client's X-Request-Id is the answer's. Source: vLLM (--enable-request-id-headers), sleb."""
    headers = {"X-Request-Id": "doctor-1"}
    found = target.http.get("models", headers=headers).headers.get("x-request-id")
    expect(found == "doctor-1", f"it is {shown(found)}")


@GROUP.sleb_only
def server_timing_is_told(target: Target) -> None:
    """A whole answer has the header Server-Timing. Source: sleb."""
    headers = target.post(CHAT, messages=[{"role": "user", "content": "Hello!"}], max_tokens=1).headers
    expect("server-timing" in headers, "it is missing")


@GROUP.required
def requests_do_not_mix(target: Target) -> None:
    """Eight requests at once get the answers that they get alone. Source: OpenAI API."""
    prompts = [f"{number}, {number + 1}, " * (number + 1) for number in range(8)]

    def ask(prompt: str) -> tuple[int, str]:
        answer = target.complete(prompt, temperature=0, max_tokens=8)
        return answer["usage"]["prompt_tokens"], answer["choices"][0]["text"]

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(ask, prompts))
    for prompt, (number, text), (number_now, text_now) in zip(prompts, alone, together, strict=True):
        expect(number_now == number, f"{shown(prompt)} has {number} tokens, among others {number_now}")
        same = text_now[:3] == text[:3]  # rounding in a batch may change a later token
        expect(same, f"{shown(prompt)} got {shown(text)}, among others {shown(text_now)}")


@GROUP.sleb_only
def a_closed_stream_is_aborted(target: Target) -> None:
    """When a client leaves a stream, the number of running requests falls. Source: vLLM, sleb."""
    idle = _running(target)
    with target.open_stream(**_LONG) as chunks:
        list(islice(chunks, 2))
        if _running(target) <= idle:
            skip("the answer was over, or not yet counted, before it could be left")
    _expect_idle(target, idle)


@GROUP.sleb_only
def a_closed_request_is_aborted(target: Target) -> None:
    """When a client gives up a whole answer, the number of running requests falls. Source: vLLM, sleb."""
    idle = _running(target)
    with ThreadPoolExecutor(1) as pool:
        given_up = pool.submit(_give_up, target)
        most = idle
        while not given_up.done() and most <= idle:
            most = max(most, _running(target))
        if not given_up.result() or most <= idle:
            skip("the answer was over, or not yet counted, before it could be given up")
    _expect_idle(target, idle)


def _give_up(target: Target) -> bool:
    """Whether a long request was still unanswered after half a second; then its connection is closed."""
    body = target.fields(prompt=PROMPT, **_LONG)
    try:
        target.http.post(COMPLETIONS, json=body, timeout=httpx.Timeout(10.0, read=0.5))
    except httpx.ReadTimeout:
        return True
    return False


def _running(target: Target) -> float:
    values = _RUNNING.findall(_there(target, "/metrics"))
    expect(values, "/metrics does not tell how many requests run")
    return sum(map(float, values))


def _expect_idle(target: Target, idle: float) -> None:
    deadline = time.monotonic() + _ABORT_SECONDS
    while (now := _running(target)) > idle:
        expect(
            time.monotonic() < deadline,
            f"{now:g} requests still run {_ABORT_SECONDS:g} s after the client left",
        )
        time.sleep(0.05)
