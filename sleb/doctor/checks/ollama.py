"""Ollama's API, above /v1: /api/chat and what stands beside it."""

from __future__ import annotations

import json
from typing import Any

from sleb.doctor.check import Group
from sleb.doctor.checks.structured import SCHEMA, expect_colour
from sleb.doctor.checks.tools import PARAMETERS, expect_call
from sleb.doctor.outcome import expect
from sleb.doctor.target import GREEDY, PROMPT, QUESTION, Json, Target, ok, shown

GROUP = Group("ollama", further=True)

_GREEDY: Json = {"options": {"temperature": 0, "num_predict": 24}}
_DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
_WEATHER = "What is the weather in Paris?"


def _post(target: Target, name: str, **fields: Any) -> Any:
    return target.post(f"{target.root}/api/{name}", **fields)


def _chat(target: Target, content: str = QUESTION, **fields: Any) -> Json:
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    return ok(_post(target, "chat", messages=messages, stream=False, **fields))


def _stream(target: Target, name: str, **fields: Any) -> list[Json]:
    """The lines of an answer that nobody asked to be whole."""
    response = _post(target, name, **fields)
    if response.status_code != 200:
        ok(response)
    kind = response.headers.get("content-type", "of no type")
    expect("application/x-ndjson" in kind, f"the content type is {kind}")
    return [json.loads(line) for line in response.text.splitlines()]


@GROUP.required
def models_are_tagged(target: Target) -> None:
    """/api/tags lists models with name, model, modified_at, size, digest and details. Source: Ollama API."""
    models = ok(target.get_root("/api/tags"))["models"]
    expect(models, "there is no model")
    for model in models:
        for name in ("name", "model", "modified_at", "size", "digest", "details"):
            expect(name in model, f"{name} is missing")


@GROUP.required
def the_version_is_told(target: Target) -> None:
    """/api/version has a version. Source: Ollama API."""
    version = ok(target.get_root("/api/version"))["version"]
    expect(isinstance(version, str) and version, f"version is {shown(version)}")


@GROUP.required
def a_model_is_shown(target: Target) -> None:
    """/api/show has details, model_info and capabilities. Source: Ollama API."""
    found = ok(_post(target, "show"))
    expect(isinstance(found["details"], dict), f"details are {shown(found['details'])}")
    expect(isinstance(found["model_info"], dict), f"model_info is {shown(found['model_info'])}")
    expect("completion" in found["capabilities"], f"capabilities are {shown(found['capabilities'])}")


@GROUP.required
def an_answer_has_its_shape(target: Target) -> None:
    """model, created_at, message, done, done_reason, counts and durations. Source: Ollama API."""
    answer = _chat(target, **_GREEDY)
    expect(isinstance(answer["model"], str), f"model is {shown(answer['model'])}")
    expect(isinstance(answer["created_at"], str), f"created_at is {shown(answer['created_at'])}")
    expect(answer["message"]["role"] == "assistant", f"role is {shown(answer['message']['role'])}")
    expect(answer["done"] is True, f"done is {shown(answer['done'])}")
    expect(answer["done_reason"] in ("stop", "length"), f"done_reason is {shown(answer['done_reason'])}")
    for name in _DURATIONS:
        expect(type(answer[name]) is int and answer[name] >= 0, f"{name} is {shown(answer[name])}")


@GROUP.required
def the_text_is_that_of_a_chat(target: Target) -> None:
    """A greedy answer has the text and the counts of the same chat. Source: Ollama API."""
    chat, answer = target.chat(**GREEDY), _chat(target, **_GREEDY)
    content, own = chat["choices"][0]["message"].get("content") or "", answer["message"]["content"]
    expect(own == content, f"{shown(own)}, and the chat {shown(content)}")
    counts = (answer["prompt_eval_count"], answer["eval_count"])
    others = (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"])
    expect(counts == others, f"{counts} tokens of prompt and answer, and {others} of the chat")


@GROUP.required
def num_predict_ends_an_answer(target: Target) -> None:
    """options.num_predict cuts, and done_reason says so. Source: Ollama API."""
    answer = _chat(target, options={"temperature": 0, "num_predict": 3})
    expect(answer["eval_count"] <= 3, f"there are {answer['eval_count']} tokens")
    if target.chat(temperature=0, max_tokens=4)["usage"]["completion_tokens"] > 3:
        expect(answer["done_reason"] == "length", f"done_reason is {shown(answer['done_reason'])}")


@GROUP.required
def an_answer_streams_in_lines(target: Target) -> None:
    """Unless stream is false a JSON object a line, done with the last alone, of the same text. Source: Ollama API."""
    lines = _stream(target, "chat", messages=[{"role": "user", "content": QUESTION}], **_GREEDY)
    expect(
        [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True],
        "done is not with the last alone",
    )
    joined = "".join(line["message"]["content"] for line in lines)
    whole = _chat(target, **_GREEDY)
    expect(
        joined == whole["message"]["content"], f"{shown(joined)}, whole {shown(whole['message']['content'])}"
    )
    expect(lines[-1]["eval_count"] == whole["eval_count"], f"the last line is {shown(lines[-1])}")


@GROUP.required
def a_prompt_is_answered(target: Target) -> None:
    """/api/generate answers a prompt, whole and in lines. Source: Ollama API."""
    whole = ok(_post(target, "generate", prompt=PROMPT, stream=False, **_GREEDY))
    joined = "".join(line["response"] for line in _stream(target, "generate", prompt=PROMPT, **_GREEDY))
    expect(joined == whole["response"], f"{shown(joined)}, whole {shown(whole['response'])}")
    raw = ok(_post(target, "generate", prompt=PROMPT, raw=True, stream=False, **_GREEDY))
    wanted = target.complete(**GREEDY)["choices"][0]["text"]
    expect(raw["response"] == wanted, f"raw is {shown(raw['response'])}, the completion {shown(wanted)}")


@GROUP.required
def a_format_is_kept(target: Target) -> None:
    """format with a schema gives JSON that fits. Source: Ollama API."""
    expect_colour(_chat(target, format=SCHEMA, options={"temperature": 0})["message"]["content"])


@GROUP.required
def tools_are_offered(target: Target) -> None:
    """Tools add to the prompt; arguments of a call are an object. Source: Ollama API."""
    function = {"name": "get_weather", "description": "The weather in a city.", "parameters": PARAMETERS}
    tools = [{"type": "function", "function": function}]
    plain = _chat(target, _WEATHER, **_GREEDY)["prompt_eval_count"]
    answer = _chat(target, _WEATHER, tools=tools, **_GREEDY)
    expect(answer["prompt_eval_count"] > plain, f"the prompt has {plain} tokens with and without tools")
    for call in answer["message"].get("tool_calls") or ():
        expect_call(call["function"]["name"], json.dumps(call["function"]["arguments"]))


@GROUP.required
def an_unknown_model_is_404(target: Target) -> None:
    """{"error": "…"} with status 404. Source: Ollama API."""
    _chat(target, **_GREEDY)  # not everything is refused
    messages = [{"role": "user", "content": QUESTION}]
    response = target.http.post(
        f"{target.root}/api/chat", json={"model": "no-such-model", "messages": messages}
    )
    expect(response.status_code == 404, f"HTTP {response.status_code}: {shown(response.text)}")
    expect(isinstance(response.json()["error"], str), f"the body is {shown(response.text)}")
