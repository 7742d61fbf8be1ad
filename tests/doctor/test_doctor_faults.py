"""Every check of `sleb doctor` catches a wrong server: a check that cannot fail would be worth nothing.

A proxy stands before our own server with a tiny model. Without a fault it is right in everything; with one it
spoils a request on its way in, or an answer on its way out, and the checks that the fault names must fail.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sleb.client.connection import open_client
from sleb.doctor.outcome import Outcome
from sleb.doctor.run import choose_checks, examine, run_check
from sleb.doctor.target import Target
from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine
from sleb.server.context import ServerContext
from sleb.server.options import ServeOptions
from sleb.server.run import base_url, bind_socket, make_server


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(
        f"sleb_tests_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there for their annotations
    spec.loader.exec_module(module)
    return module


proxies = _load("doctor_proxy")
Call, Reply, Fault, Proxy = proxies.Call, proxies.Reply, proxies.Fault, proxies.Proxy
Before = Callable[[Any], Any]
After = Callable[[Any, Any], None]

CHECKS = {f"{check.group}: {check.name}": check for check in choose_checks(())}
# What the proxy answers itself; that the other checks pass is tested on our own server.
STAND_IN = ("structured", "tools", "tokenizer", "operation")
# What our own server gives no occasion for there: it has a key and a longer context.
SKIPPED = ("errors: any key opens an open server", "completions: the context is filled at most")

# What faults are made of.


def drop(*names: str, when: Callable[[dict[str, Any]], bool] = lambda _: True) -> Before:
    """The server does not know these fields."""

    def before(call: Call) -> None:
        if call.body is not None and when(call.body):
            for name in names:
                call.body.pop(name, None)

    return before


def force(**fields: Any) -> Before:
    """The server believes that these were sent, for answers of a model."""

    def before(call: Call) -> None:
        if call.body is not None and "completions" in call.path:
            call.body.update(fields)

    return before


def refuse(when: Callable[[dict[str, Any]], Any], status: int = 400) -> Before:
    """The server refuses bodies that it should serve."""

    def before(call: Call) -> Reply | None:
        return Reply.error(status) if call.body is not None and when(call.body) else None

    return before


def edit(change: Callable[[Any], None], status: int = 200) -> After:
    """Changes the JSON of whole answers, or of every chunk of a stream."""

    def after(call: Call, reply: Reply) -> None:
        kind = reply.headers.get("content-type", "")
        if reply.status != status:
            return
        if "json" in kind:
            content = json.loads(reply.content)
            change(content)
            reply.content = json.dumps(content).encode()
        elif "event-stream" in kind:
            edit_chunks(lambda chunks: [change(chunk) for chunk in chunks])(call, reply)

    return after


def edit_chunks(change: Callable[[list[Any]], Any]) -> After:
    """Changes the list of a stream's chunks in place."""

    def after(_: Call, reply: Reply) -> None:
        if "event-stream" in reply.headers.get("content-type", ""):
            data = [e.removeprefix("data: ") for e in reply.content.decode().split("\n\n") if e]
            chunks = [json.loads(each) for each in data if each != "[DONE]"]
            change(chunks)
            lines = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"]
            reply.content = "".join(f"data: {line}\n\n" for line in lines).encode()

    return after


def edit_choices(change: Callable[[dict[str, Any]], Any]) -> After:
    """Changes every choice of whole answers and chunks."""
    return edit(lambda answer: [change(choice) for choice in answer.get("choices", ())])


def edit_logprobs(change: Callable[[dict[str, Any]], Any]) -> After:
    """Changes `logprobs` wherever it is not null."""
    return edit_choices(lambda choice: change(choice["logprobs"]) if choice.get("logprobs") else None)


def edit_raw(change: Callable[[bytes], bytes]) -> After:
    """Changes the bytes of streams."""

    def after(_: Call, reply: Reply) -> None:
        if "event-stream" in reply.headers.get("content-type", ""):
            reply.content = change(reply.content)

    return after


def become(status: int, when: Callable[[Call, Reply], Any] = lambda c, r: True, content: Any = None) -> After:
    """Answers have another status, and a body that says nothing."""

    def after(call: Call, reply: Reply) -> None:
        if when(call, reply):
            reply.status = status
            reply.content = json.dumps(content if content is not None else {"detail": "no"}).encode()
            reply.headers["content-type"] = "application/json"

    return after


def change_header(name: str, value: str | None) -> After:
    def after(_: Call, reply: Reply) -> None:
        reply.headers = {n: v for n, v in reply.headers.items() if n.lower() != name}
        if value is not None:
            reply.headers[name] = value

    return after


def put(holder: Any, key: Any, value: Any) -> None:
    """An assignment as an expression, where there is such a key."""
    if key in holder if isinstance(holder, dict) else key < len(holder):
        holder[key] = value


def at_path(*paths: str) -> Callable[[Call, Reply], bool]:
    return lambda call, _: call.path in paths


def _swap_limits(call: Call) -> None:
    if call.body is not None and "max_completion_tokens" in call.body and "max_tokens" in call.body:
        del call.body["max_completion_tokens"]


def _limits_of_12(call: Call) -> None:
    if call.body is not None:
        call.body.pop("max_completion_tokens", None)
        call.body["max_tokens"] = 12


def _last_message_only(call: Call) -> None:
    if call.body is not None and call.path.startswith("/v1/chat"):
        call.body["messages"] = call.body["messages"][-1:]


def _parts_as_repr(call: Call) -> None:
    for message in (call.body or {}).get("messages") or ():
        message["content"] = str(message["content"])


def _no_continuous_usage(call: Call) -> None:
    if call.body is not None and call.body.get("stream_options"):
        call.body["stream_options"].pop("continuous_usage_stats", None)


def _one_piece(chunks: list[Any]) -> None:
    texts = [choice for chunk in chunks for choice in chunk["choices"] if choice.get("text")]
    whole = "".join(choice["text"] for choice in texts)
    for choice in texts:
        choice["text"] = ""
    if texts:
        texts[-1]["text"] = whole


def _lose_a_piece(chunks: list[Any]) -> None:
    held = [
        c
        for c in chunks
        if c["choices"] and (c["choices"][0].get("text") or c["choices"][0].get("delta", {}).get("content"))
    ]
    if held:
        chunks.remove(held[0])


def _same_text(answer: dict[str, Any]) -> None:
    for choice in answer["choices"]:
        put(choice, "text", answer["choices"][0].get("text"))


def _shift_scores(choice: dict[str, Any]) -> None:
    logprobs = choice.get("logprobs") or {}
    if (logprobs.get("token_logprobs") or [0])[0] is None:
        logprobs["token_logprobs"] = [None, *[value - 1 for value in logprobs["token_logprobs"][1:]]]


def _answer_of(message: dict[str, Any], reason: str = "stop") -> Before:
    """Every chat gets this message."""

    def before(call: Call) -> Reply | None:
        if call.path == "/v1/chat/completions" and call.body and call.body.get("messages"):
            return proxies.chat_answer(call.body, message, reason)
        return None

    return before


def _call_of(name: str, arguments: str) -> Before:
    function = {"name": name, "arguments": arguments}
    call = {"index": 0, "id": "call_1", "type": "function", "function": function}
    return _answer_of({"content": None, "tool_calls": [call]}, "tool_calls")


def _needs_key(code: int) -> Before:
    def before(call: Call) -> Reply | None:
        key = call.headers.get("authorization", "")
        return Reply.error(code, "invalid_api_key") if "right" not in key else None

    return before


def _is_generation(call: Call, reply: Reply) -> bool:
    return call.path.endswith("completions") and call.method == "POST"


def _without(name: str) -> After:
    return edit(lambda answer: answer.pop(name, None))


def _card(name: str, value: Any) -> After:
    return edit(lambda answer: [put(card, name, value) for card in answer.get("data", [answer])])


def _content(text: str | None) -> After:
    return edit_choices(lambda choice: put(choice.get("message", {}), "content", text))


REFUSALS = (
    *(name for name in CHECKS if name.startswith("errors: ") and ("400" in name or "refused before" in name)),
    "errors: an error has all its fields",
    "errors: the message tells both lengths",
    "errors: a refused input is not repeated",
    "structured: a bad schema is refused",
    "structured: an unknown format is refused",
    "tools: an unknown tool is refused",
    "robustness: invalid utf 8 is 400",
    "robustness: deep nesting is no crash",
    "robustness: not a number is 400",
    "robustness: huge integers are no crash",
)
CRASHES = tuple(name for name in CHECKS if name.startswith("robustness: ") and "no crash" in name)
COLOUR = (
    "structured: a schema is kept",
    "structured: a schema is kept when hot",
    "structured: a schema is kept in a stream",
)
FORCED = ("tools: a required call is made", "tools: a named call is made", "tools: a call streams")
SAME_TEXT = ("streaming: a chat stream is the same text", "streaming: a completion stream is the same text")

FAULTS = [
    Fault("lists are no lists", ("models: models are listed",), after=_card("object", "thing")),
    Fault(
        "one id for all",
        ("models: ids are distinct", "models: a model can be asked for"),
        after=_card("id", "x"),
    ),
    Fault(
        "what is unknown is fine",
        (
            "models: an unknown model is 404",
            "errors: an unknown model is 404",
            "errors: an unknown path has an error body",
        ),
        after=become(200, lambda _, reply: reply.status == 404),
    ),
    Fault("no context length", ("models: the context length is told",), after=_card("max_model_len", None)),
    Fault("no pruning", ("models: pruning is told",), after=_card("pruning", None)),
    Fault(
        "another object",
        (
            "chat: an answer has its shape",
            "completions: a completion has its shape",
            "streaming: chunks have their shape",
        ),
        after=_without("object"),
    ),
    Fault("no text", ("chat: an answer has text",), after=_content("")),
    Fault(
        "no refusal",
        ("chat: empty keys are null",),
        after=edit_choices(lambda choice: choice.get("message", {}).pop("refusal", None)),
    ),
    Fault(
        "a wrong total",
        ("chat: usage adds up", "completions: a completion has its shape"),
        after=edit(lambda answer: put(answer.get("usage") or {}, "total_tokens", 1)),
    ),
    Fault(
        "no details",
        ("chat: cached tokens are counted",),
        after=edit(lambda answer: (answer.get("usage") or {}).pop("prompt_tokens_details", None)),
    ),
    Fault("max_tokens is unknown", ("chat: max tokens ends an answer",), before=force(max_tokens=12)),
    Fault(
        "max_completion_tokens is unknown",
        ("chat: max completion tokens ends an answer", "chat: max completion tokens wins"),
        before=_limits_of_12,
    ),
    Fault("max_tokens wins", ("chat: max completion tokens wins",), before=_swap_limits),
    Fault(
        "every answer ends by stop",
        ("chat: max tokens ends an answer", "chat: max completion tokens ends an answer"),
        after=edit_choices(lambda choice: put(choice, "finish_reason", "stop")),
    ),
    Fault(
        "only the last message counts",
        ("chat: a system message is read", "chat: earlier turns are read"),
        before=_last_message_only,
    ),
    Fault(
        "only the first message counts",
        ("tools: a result is read",),
        before=force(messages=[{"role": "user", "content": "x"}]),
    ),
    Fault("parts are no text", ("chat: content may be parts",), before=_parts_as_repr),
    Fault(
        "null is refused",
        ("chat: null means missing",),
        before=refuse(lambda body: None in body.values()),
    ),
    Fault(
        "one id for all answers",
        ("chat: answers have their own ids",),
        after=edit(lambda answer: put(answer, "id", "x")),
    ),
    Fault(
        "a model must be named",
        ("chat: the model may be left out",),
        before=refuse(lambda body: "model" not in body),
    ),
    Fault(
        "another model is named",
        ("chat: the answer names its model",),
        after=edit(lambda answer: put(answer, "model", "x")),
    ),
    Fault(
        "no timings",
        ("chat: timings are told", "streaming: the last chunk has timings"),
        after=_without("timings"),
    ),
    Fault("no metrics", ("chat: request metrics are told",), after=_without("metrics")),
    Fault(
        "no continuing",
        ("chat: the last message can be continued",),
        before=drop("continue_final_message", "add_generation_prompt"),
    ),
    Fault(
        "choices in the wrong order",
        ("completions: prompts may be a list",),
        after=edit(lambda answer: answer.get("choices", []).reverse()),
    ),
    Fault(
        "token ids are refused",
        ("completions: a prompt may be token ids", "completions: prompts may be lists of token ids"),
        before=refuse(lambda body: not isinstance(body.get("prompt", ""), str)),
    ),
    Fault("long by default", ("completions: sixteen tokens by default",), before=force(max_tokens=20)),
    Fault(
        "n is unknown",
        (
            "completions: n is per prompt",
            "streaming: n streams side by side",
            "sampling: n gives as many choices",
            "sampling: choices differ",
        ),
        before=drop("n"),
    ),
    Fault(
        "echo is unknown",
        (
            "completions: echo puts the prompt first",
            "completions: n is per prompt",
            "streaming: echo streams",
            "logprobs: echo covers the prompt",
            "logprobs: a prompt can be scored alone",
            "robustness: unicode comes back whole",
        ),
        before=drop("echo"),
    ),
    Fault("no token ids", ("completions: token ids are returned",), before=drop("return_token_ids")),
    Fault(
        "beyond the context",
        ("completions: the context is filled at most",),
        after=edit(lambda answer: put(answer.get("usage") or {}, "total_tokens", 9999)),
    ),
    Fault(
        "no role",
        ("streaming: the first delta has the role",),
        after=edit_choices(lambda choice: choice.get("delta", {}).pop("role", None)),
    ),
    Fault(
        "no end",
        ("streaming: one chunk tells the end",),
        after=edit_choices(lambda choice: put(choice, "finish_reason", None)),
    ),
    Fault(
        "no [DONE]",
        ("streaming: done is the last event",),
        after=edit_raw(lambda content: content.replace(b"data: [DONE]\n\n", b"")),
    ),
    Fault("a piece is lost", SAME_TEXT, after=edit_chunks(_lose_a_piece)),
    Fault(
        "stream_options is unknown",
        (
            "streaming: usage comes when asked for",
            "streaming: log probabilities stream",
            "streaming: usage can come with every chunk",
        ),
        before=drop("stream_options"),
    ),
    Fault(
        "usage unasked",
        ("streaming: usage stays away otherwise",),
        before=lambda call: (
            call.body.update(stream_options={"include_usage": True})
            if call.body is not None and call.body.get("stream")
            else None
        ),
    ),
    Fault("no running usage", ("streaming: usage can come with every chunk",), before=_no_continuous_usage),
    Fault("all in one piece", ("streaming: text comes in pieces",), after=edit_chunks(_one_piece)),
    Fault(
        "stop is unknown to streams",
        ("streaming: a stop string is held back",),
        before=drop("stop", when=lambda body: bool(body.get("stream"))),
    ),
    Fault(
        "streams without probabilities",
        ("streaming: log probabilities stream",),
        before=drop("logprobs", when=lambda body: bool(body.get("stream"))),
    ),
    Fault(
        "bytes that are no text",
        ("streaming: characters are whole",),
        after=edit_raw(lambda content: b": \xe4\xb8\n\n" + content),
    ),
    Fault(
        "half characters",
        ("streaming: characters are whole",),
        after=edit_choices(lambda choice: put(choice, "text", "\ud83c")),
    ),
    Fault(
        "CR LF",
        ("streaming: lines end in lf",),
        after=edit_raw(lambda content: content.replace(b"\n", b"\r\n")),
    ),
    Fault(
        "entries are lost",
        ("logprobs: chat tells every token", "logprobs: chat bytes are the text"),
        after=edit_logprobs(lambda logprobs: put(logprobs, "content", (logprobs.get("content") or [])[3:])),
    ),
    Fault(
        "alternatives rise",
        ("logprobs: chat tells alternatives",),
        after=edit_logprobs(lambda lp: [each["top_logprobs"].reverse() for each in lp.get("content") or ()]),
    ),
    Fault(
        "lists of different lengths",
        ("logprobs: completions tell parallel lists", "logprobs: alternatives hold the token"),
        after=edit_logprobs(lambda logprobs: put(logprobs, "top_logprobs", [{}])),
    ),
    Fault(
        "the token is not among the alternatives",
        ("logprobs: alternatives hold the token",),
        after=edit_logprobs(lambda lp: put(lp, "top_logprobs", [{"x": -1.0} for _ in lp.get("tokens", ())])),
    ),
    Fault(
        "the first token has a probability",
        ("logprobs: echo covers the prompt",),
        after=edit_logprobs(lambda logprobs: put(logprobs.get("token_logprobs", []), 0, -1.0)),
    ),
    Fault(
        "0 tokens are 1",
        ("logprobs: a prompt can be scored alone",),
        before=lambda call: (
            put(call.body, "max_tokens", 1) if call.body and call.body.get("max_tokens") == 0 else None
        ),
    ),
    Fault(
        "offsets beside the text",
        ("logprobs: offsets point into the text",),
        after=edit_logprobs(
            lambda lp: put(lp, "text_offset", [each + 1 for each in lp.get("text_offset", ())])
        ),
    ),
    Fault("other scores", ("logprobs: scoring agrees with generating",), after=edit_choices(_shift_scores)),
    Fault("always hot", ("sampling: temperature 0 repeats",), before=force(temperature=1.5, ignore_eos=True)),
    Fault("no seed", ("sampling: a seed repeats",), before=drop("seed")),
    Fault("always the same seed", ("sampling: seeds differ",), before=force(seed=1)),
    Fault(
        "cuts are unknown",
        ("sampling: a tiny top p is greedy", "sampling: top k 1 is greedy", "sampling: min p 1 is greedy"),
        before=drop("top_p", "top_k", "min_p"),
    ),
    Fault(
        "stop is unknown",
        (
            "sampling: a stop string ends an answer",
            "sampling: the first of several stops counts",
            "sampling: a stop string can be kept",
            "streaming: a stop string is held back",
        ),
        before=drop("stop"),
    ),
    Fault(
        "a stop says length",
        ("sampling: a stop string ends an answer",),
        after=edit_choices(lambda choice: put(choice, "finish_reason", "length")),
    ),
    Fault(
        "stops are cut off",
        ("sampling: a stop string can be kept",),
        before=drop("include_stop_str_in_output"),
    ),
    Fault("one text for all", ("sampling: choices differ",), after=edit(_same_text)),
    Fault(
        "biases and penalties are unknown",
        ("sampling: logit bias forces a token", "sampling: a repetition penalty is accepted"),
        before=drop("logit_bias", "repetition_penalty"),
    ),
    Fault("no frequency penalty", ("sampling: a frequency penalty works",), before=drop("frequency_penalty")),
    Fault(
        "penalties are refused",
        ("sampling: penalties are accepted",),
        before=refuse(lambda body: "presence_penalty" in body),
    ),
    Fault("no stop tokens", ("sampling: a stop token ends an answer",), before=drop("stop_token_ids")),
    Fault("short answers", ("sampling: the end can be ignored",), before=force(max_tokens=9)),
    Fault("no least length", ("sampling: min tokens holds the end back",), before=drop("min_tokens")),
    Fault(
        "no JSON",
        (*COLOUR, "structured: json object gives an object"),
        before=_answer_of({"content": "The sky is blue."}),
    ),
    Fault("other JSON", COLOUR, before=_answer_of({"content": '{"colour": "pink", "is_warm": true}'})),
    Fault(
        "text is another format",
        ("structured: text is the usual format",),
        before=refuse(lambda body: "response_format" in body),
    ),
    Fault("no calls", FORCED, before=_answer_of({"content": "Sunny."})),
    Fault("calls of nothing", FORCED, before=_call_of("get_nothing", '{"city": "Paris"}')),
    Fault("broken arguments", FORCED, before=_call_of("get_weather", '{"city": ')),
    Fault("calls without being asked", ("tools: none calls nothing",), before=_call_of("get_weather", "{}")),
    Fault("neither text nor call", ("tools: auto answers or calls",), before=_answer_of({"content": None})),
    Fault("no tools at all", ("tools: no tools are no tools",), before=refuse(lambda body: "tools" in body)),
    Fault(
        "tokenizer endpoints are something else",
        tuple(name for name in CHECKS if name.startswith("tokenizer: ")),
        after=become(200, lambda call, _: "tokenize" in call.path, {}),
    ),
    Fault(
        "miscounted tokens",
        (
            "tokenizer: a text is tokenized",
            "tokenizer: messages are tokenized",
            "tokenizer: counts agree with usage",
        ),
        after=edit(lambda answer: put(answer, "count", 1)),
    ),
    Fault(
        "an error is taken for a success", REFUSALS, after=become(200, lambda _, reply: reply.status == 400)
    ),
    Fault("FastAPI's own errors", REFUSALS, after=become(422, lambda _, reply: reply.status == 400)),
    Fault(
        "errors without fields",
        ("errors: an error has all its fields", "errors: the message tells both lengths"),
        after=become(400, lambda _, reply: reply.status == 400, {"error": {"message": "no"}}),
    ),
    Fault(
        "inputs are repeated",
        ("errors: a refused input is not repeated",),
        after=become(400, lambda _, reply: reply.status == 400, {"error": {"message": "no" * 9999}}),
    ),
    Fault("a wrong key is 403", ("errors: a wrong key is 401",), before=_needs_key(403)),
    Fault(
        "an empty key is a wrong one",
        ("errors: any key opens an open server",),
        before=lambda call: Reply.error(401) if call.headers.get("authorization") == "Bearer" else None,
    ),
    Fault(
        "405 is 200",
        ("errors: a wrong method is 405",),
        after=become(200, lambda _, reply: reply.status == 405),
    ),
    Fault(
        "no embeddings at all",
        ("errors: embeddings are refused clearly",),
        after=become(404, at_path("/v1/embeddings")),
    ),
    Fault(
        "ill",
        ("operation: health is 200", "operation: health needs no key", "operation: ready is 200"),
        after=become(503, at_path("/health", "/ready")),
    ),
    Fault("no version", ("operation: the version is told",), after=become(200, at_path("/version"))),
    Fault(
        "a page from afar",
        ("operation: the documentation needs no network",),
        before=lambda call: (
            Reply(b'<script src="https://cdn.example/x.js">') if call.path == "/docs" else None
        ),
    ),
    Fault(
        "empty metrics",
        (
            "operation: metrics are told",
            "operation: metrics count tokens",
            "operation: a closed stream is aborted",
            "operation: a closed request is aborted",
        ),
        before=lambda call: Reply() if call.path == "/metrics" else None,
    ),
    Fault(
        "metrics that stand still",
        ("operation: metrics count tokens",),
        before=lambda call: Reply(b"x:generation_tokens_total 5.0") if call.path == "/metrics" else None,
    ),
    Fault(
        "GET and POST alone",
        ("operation: head is answered", "operation: options are answered"),
        after=become(405, lambda call, _: call.method in ("HEAD", "OPTIONS")),
    ),
    Fault(
        "slashes count",
        ("operation: a double slash is one",),
        after=become(404, lambda call, _: "//" in call.path),
    ),
    Fault(
        "one request id",
        ("operation: a request has an id", "operation: a request id comes back"),
        after=change_header("x-request-id", "always"),
    ),
    Fault("no request id", ("operation: a request has an id",), after=change_header("x-request-id", None)),
    Fault(
        "no Server-Timing", ("operation: server timing is told",), after=change_header("server-timing", None)
    ),
    Fault(
        "answers of others",
        ("operation: requests do not mix",),
        after=edit_choices(lambda choice: put(choice, "text", str(random.random())[2:])),
    ),
    Fault(
        "clients that leave are not noticed",
        ("operation: a closed stream is aborted", "operation: a closed request is aborted"),
    ),
    Fault(
        "long answers are refused",
        ("robustness: huge max tokens are clamped",),
        before=refuse(lambda body: body.get("max_tokens", 0) > 2048),
    ),
    Fault(
        "only known fields",
        ("robustness: unknown fields are ignored", "robustness: user and metadata are accepted"),
        before=refuse(lambda body: {"no_such_field", "metadata"} & set(body)),
    ),
    Fault(
        "every generation fails",
        (*CRASHES, "robustness: the server still answers"),
        after=become(500, _is_generation),
    ),
]


FORMAT_FAULTS = _load("format_faults").make(Fault, Reply)


@pytest.fixture(scope="module")
def proxy(tiny_model_dir: Any, tiny_chain: Any) -> Iterator[Proxy]:
    yield from _run_proxy(tiny_model_dir, tiny_chain)


@pytest.fixture(scope="module")
def wide_proxy(tiny_model_dir: Any, tiny_chain: Any, tmp_path_factory: Any) -> Iterator[Proxy]:
    """Before a server whose context holds tools, a byte a token, so that all answers are its own."""
    folder = tmp_path_factory.mktemp("wide") / "tiny-llama"
    shutil.copytree(tiny_model_dir, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 1300}))
    yield from _run_proxy(folder, tiny_chain)


def _run_proxy(folder: Path, chain: Any) -> Iterator[Proxy]:
    config = EngineConfig(
        model=str(folder),
        layer_map=chain,
        tiers=(0, 3),
        dtype="float32",
        device="cpu",
        kv_cache_memory=0.03,
    )
    context = ServerContext.create(Engine(config), ServeOptions(port=0, warm_up=False), 64)
    sock = bind_socket("127.0.0.1", 0)
    server = make_server(context)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running = Proxy(base_url(sock))
    yield running
    running.close()
    server.should_exit = True
    thread.join(10)
    sock.close()


@pytest.fixture
def target(proxy: Proxy) -> Iterator[Target]:
    """A target of its own: what it remembers of the server would outlive a fault."""
    proxy.fault, proxy.num_running = None, 0
    with open_client(proxy.url, "right", 30) as http:
        yield Target(http, "tiny-llama", "right")


@pytest.fixture
def wide_target(wide_proxy: Proxy) -> Iterator[Target]:
    wide_proxy.fault = None
    with open_client(wide_proxy.url, "right", 30) as http:
        yield Target(http, "tiny-llama", "right")


@pytest.mark.parametrize("name", [*SKIPPED, *(name for name in CHECKS if name.split(":")[0] in STAND_IN)])
def test_a_check_passes_on_a_right_server(name: str, target: Target) -> None:
    assert run_check(CHECKS[name], target) == (Outcome.PASS, "")


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_wrong_server_is_caught(
    fault: Fault, proxy: Proxy, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleb.doctor.checks.operation._ABORT_SECONDS", 0.3)
    proxy.fault = fault
    _expect_caught(fault, target)


@pytest.mark.parametrize("fault", FORMAT_FAULTS, ids=[fault.name for fault in FORMAT_FAULTS])
def test_a_wrong_further_format_is_caught(fault: Fault, wide_proxy: Proxy, wide_target: Target) -> None:
    wide_proxy.fault = fault
    _expect_caught(fault, wide_target)


@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if check.further])
def test_a_further_format_passes_on_a_right_server(name: str, wide_target: Target) -> None:
    assert run_check(CHECKS[name], wide_target) == (Outcome.PASS, "")


def test_a_further_format_may_be_missing(wide_proxy: Proxy, wide_target: Target) -> None:
    wide_proxy.fault = Fault("chat alone", (), before=lambda call: Reply.error(404))
    further = [check for check in CHECKS.values() if check.further]
    for strict in (False, True):
        examination = examine(wide_target, further, strict=strict)
        assert {each.outcome for each in examination.results} <= {Outcome.MISSING, Outcome.DIFFERS}
        assert bool(examination.problems) == strict


def _expect_caught(fault: Fault, target: Target) -> None:
    for name in fault.checks:
        check = CHECKS[name]
        outcome, reason = run_check(check, target)
        wanted = [Outcome.FAIL if check.required else Outcome.DIFFERS]
        wanted += [] if check.further else [Outcome.MISSING]  # which would fail nothing
        assert outcome in wanted, f"{name}: {outcome} {reason}"
        assert reason


def test_every_check_can_fail() -> None:
    caught = {name for fault in (*FAULTS, *FORMAT_FAULTS) for name in fault.checks}
    assert caught <= set(CHECKS)
    assert set(CHECKS) - caught == set()
