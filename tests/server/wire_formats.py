"""Every wire format from a client's side, written from its published description and independent of the server's code.

A `Question` is asked in any of FORMATS; what comes back, whole or streamed, is read into a `Told`. Reading is strict:
the frames of a stream, the order of its events, what an event repeats of earlier ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from jiter import from_json

CLIENT_TOOL = "weather"


@dataclass(frozen=True)
class Question:
    """What is asked. choice: auto, required or the name of a tool. more: fields that every format takes as they are."""

    text: str = "hello"
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()  # functions: name, description, parameters
    choice: str = "auto"
    schema: dict[str, Any] | None = None
    model: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def but(self, **fields: Any) -> Question:
        return replace(self, **fields)


@dataclass
class Told:
    """What an answer says. finish: stop, length or calls. Arguments are text where the format has them as text."""

    text: str = ""
    thoughts: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    finish: str | None = None
    stopped_by: str | None = None
    num_prompt: int | None = None
    num_output: int | None = None
    model: str | None = None
    token_ids: list[int] | None = None

    def end(self, reason: str, *, calls: str = "calls") -> None:
        names = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", calls: "calls"}
        assert self.finish is None
        self.finish = names.get(reason, reason)
        assert self.finish in ("stop", "length", "calls"), reason


class StreamError(Exception):
    """An error inside of a stream: `body` is its event's data."""

    def __init__(self, body: dict[str, Any], told: Told) -> None:
        super().__init__(body)
        self.body, self.told = body, told


def sse(data: bytes) -> list[tuple[str | None, str]]:
    """(event, data) of a stream of server-sent events; comments are left out."""
    assert b"\r" not in data
    assert data.endswith(b"\n\n")
    found = []
    for block in data.decode().removesuffix("\n\n").split("\n\n"):
        name, lines = None, []
        for line in block.split("\n"):
            key, colon, value = line.partition(": ")
            assert colon, line
            assert key in ("", "event", "data"), line
            if key == "event":
                name = value
            elif key == "data":
                lines.append(value)
        if lines:
            found.append((name, "\n".join(lines)))
    return found


def typed(data: bytes) -> list[dict[str, Any]]:
    """Events that say their type twice."""
    events = []
    for name, text in sse(data):
        events.append(json.loads(text))
        assert events[-1]["type"] == name
    return events


# OpenAI's chat.completions and completions.


def _usage(told: Told, usage: dict[str, Any], prompt: str = "prompt", output: str = "completion") -> None:
    told.num_prompt, told.num_output = usage[f"{prompt}_tokens"], usage[f"{output}_tokens"]
    assert usage["total_tokens"] == told.num_prompt + told.num_output


def _chat_body(question: Question) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": question.text}]}
    body |= {"max_completion_tokens": question.max_tokens, "stop": list(question.stop) or None}
    if question.tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in question.tools]
        body["tool_choice"] = _choice(question.choice, lambda name: {"function": {"name": name}})
    if question.schema is not None:
        described = {"name": "answer", "schema": question.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": described}
    return body


def _choice(choice: str, named: Callable[[str], dict[str, Any]]) -> Any:
    return choice if choice in ("auto", "required", "none") else {"type": "function"} | named(choice)


def _chat_whole(answer: dict[str, Any]) -> Told:
    [choice] = answer["choices"]
    message = choice["message"]
    told = Told(message["content"] or "", message.get("reasoning_content") or "", model=answer["model"])
    for call in message.get("tool_calls", ()):
        told.calls.append((call["function"]["name"], call["function"]["arguments"]))
    told.end(choice["finish_reason"], calls="tool_calls")
    told.stopped_by, told.token_ids = choice["stop_reason"], choice.get("token_ids")
    _usage(told, answer["usage"])
    return told


def _chunks(data: bytes, told: Told) -> list[dict[str, Any]]:
    """The choices of a stream that ends with usage and [DONE]."""
    *events, (_, done) = sse(data)
    assert done == "[DONE]"
    chunks = [json.loads(text) for name, text in events if name is None]
    if "error" in chunks[-1]:
        raise StreamError(chunks[-1], told)
    assert chunks[-1]["choices"] == []
    _usage(told, chunks[-1]["usage"])
    assert len({(chunk["id"], chunk["model"], chunk["created"]) for chunk in chunks}) == 1
    told.model = chunks[0]["model"]
    return [choice for chunk in chunks[:-1] for choice in chunk["choices"]]


def _end_of_choices(choices: list[dict[str, Any]], told: Told) -> None:
    *others, last = choices
    assert all(choice["finish_reason"] is None for choice in others)
    told.end(last["finish_reason"], calls="tool_calls")
    told.stopped_by = last["stop_reason"]
    ids = [token for choice in choices for token in choice.get("token_ids") or ()]
    told.token_ids = ids if any("token_ids" in choice for choice in choices) else None


def _chat_stream(data: bytes) -> Told:
    told = Told()
    choices = _chunks(data, told)
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    for choice in choices:
        delta = choice["delta"]
        told.text += delta.get("content", "")
        told.thoughts += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(told.calls)
                told.calls.append((call["function"]["name"], ""))
            name, arguments = told.calls[call["index"]]
            told.calls[call["index"]] = (name, arguments + call["function"]["arguments"])
    _end_of_choices(choices, told)
    return told


def _completion_body(question: Question) -> dict[str, Any]:
    assert not question.tools
    body: dict[str, Any] = {"prompt": question.text, "max_tokens": question.max_tokens}
    if question.schema is not None:
        described = {"name": "answer", "schema": question.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": described}
    return body | {"stop": list(question.stop) or None}


def _completion_whole(answer: dict[str, Any]) -> Told:
    [choice] = answer["choices"]
    told = Told(choice["text"], model=answer["model"], stopped_by=choice["stop_reason"])
    told.token_ids = choice.get("token_ids")
    told.end(choice["finish_reason"])
    _usage(told, answer["usage"])
    return told


def _completion_stream(data: bytes) -> Told:
    told = Told()
    choices = _chunks(data, told)
    told.text = "".join(choice["text"] for choice in choices)
    _end_of_choices(choices, told)
    return told


# OpenAI's Responses.


def _responses_body(question: Question) -> dict[str, Any]:
    body: dict[str, Any] = {"input": question.text, "max_output_tokens": question.max_tokens, "store": False}
    if question.stop:
        body["stop"] = list(question.stop)  # a field of ours
    if question.tools:
        body["tools"] = [{"type": "function"} | tool for tool in question.tools]
        body["tool_choice"] = _choice(question.choice, lambda name: {"name": name})
    if question.schema is not None:
        body["text"] = {"format": {"type": "json_schema", "name": "answer", "schema": question.schema}}
    return body


def _responses_whole(answer: dict[str, Any]) -> Told:
    told = Told(model=answer["model"])
    for item in answer["output"]:
        if item["type"] == "function_call":
            told.calls.append((item["name"], item["arguments"]))
        elif item["type"] == "reasoning":
            told.thoughts += "".join(part["text"] for part in item["content"])
        else:
            assert (item["type"], item["role"]) == ("message", "assistant")
            told.text += "".join(part["text"] for part in item["content"])
    if answer["status"] == "incomplete":
        assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
        told.end("length")
    else:
        assert answer["status"] == "completed", answer["status"]
        assert answer["incomplete_details"] is answer["error"] is None
        told.end("calls" if told.calls else "stop")
    _usage(told, answer["usage"], "input", "output")
    return told


# The events that continue an item, by the type of what they continue; each ends with one that says it all.
_PARTS = {
    "output_text": "response.output_text",
    "reasoning_text": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


def _responses_stream(data: bytes) -> Told:
    """Folds the deltas; whatever an event repeats must be what they made."""
    events = typed(data)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert all(event["response"]["status"] == "in_progress" for event in events[:2])
    items: list[dict[str, Any]] = []
    kind = text = None  # of the part that is open
    for event in events[2:-1]:
        what = event["type"].removeprefix("response.")
        if what == "error":
            assert event is events[-2]
            assert events[-1]["type"] == "response.failed"
            raise StreamError(events[-1]["response"], Told())
        assert event["output_index"] == len(items) - (what != "output_item.added")
        if what == "output_item.added":
            assert kind is None
            items.append(event["item"])
            assert event["item"]["status"] == "in_progress"
            if event["item"]["type"] == "function_call":
                kind, text = "function_call", ""
                assert event["item"]["arguments"] == ""
            else:
                assert event["item"]["content"] == []
        elif what == "output_item.done":
            assert kind is None
            item = event["item"]
            made = items[-1] | {"status": item["status"]}
            assert item == made
            assert item["status"] in ("completed", "incomplete")
            items[-1] = item
        elif what == "content_part.added":
            assert kind is None
            kind, text = event["part"]["type"], ""
            assert event["part"]["text"] == ""
        elif what == "content_part.done":
            assert kind is None
            assert event["part"]["text"] == text
            items[-1] = items[-1] | {"content": [*items[-1]["content"], event["part"]]}
        else:
            assert kind is not None
            assert event["item_id"] == items[-1]["id"]
            if event["type"] == f"{_PARTS[kind]}.delta":
                assert event["delta"]
                text += event["delta"]
            else:
                assert event["type"] == f"{_PARTS[kind]}.done"
                assert event["arguments" if kind == "function_call" else "text"] == text
                if kind == "function_call":
                    items[-1] = items[-1] | {"arguments": text}
                kind = None
    response = events[-1]["response"]
    assert events[-1]["type"] == f"response.{response['status']}"
    assert response["output"] == items
    assert response["id"] == events[0]["response"]["id"]
    return _responses_whole(response)


# Anthropic's Messages.


def _messages_body(question: Question) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": question.text}]}
    body |= {"max_tokens": question.max_tokens}
    if question.stop:
        body["stop_sequences"] = list(question.stop)
    if question.tools:
        body["tools"] = [
            {"name": tool["name"], "input_schema": tool.get("parameters", {"type": "object"})}
            | ({"description": tool["description"]} if "description" in tool else {})
            for tool in question.tools
        ]
        kinds = {"auto": "auto", "required": "any", "none": "none"}
        body["tool_choice"] = {"type": kinds.get(question.choice, "tool")}
        if question.choice not in kinds:
            body["tool_choice"]["name"] = question.choice
    if question.schema is not None:
        body["output_config"] = {"format": {"type": "json_schema", "schema": question.schema}}
    return body


def _messages_whole(message: dict[str, Any]) -> Told:
    assert (message["type"], message["role"]) == ("message", "assistant")
    told = Told(model=message["model"], stopped_by=message["stop_sequence"])
    for block in message["content"]:
        if block["type"] == "tool_use":
            told.calls.append((block["name"], block["input"]))
        elif block["type"] == "thinking":
            told.thoughts += block["thinking"]
        else:
            assert block["type"] == "text"
            told.text += block["text"]
    told.end(message["stop_reason"], calls="tool_use")
    assert (message["stop_reason"] == "stop_sequence") == (message["stop_sequence"] is not None)
    usage = message["usage"]
    told.num_prompt, told.num_output = (
        usage["input_tokens"] + usage["cache_read_input_tokens"],
        usage["output_tokens"],
    )
    return told


_BLOCKS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}


def _messages_stream(data: bytes) -> Told:
    events = [event for event in typed(data) if event["type"] != "ping"]
    if events[-1]["type"] == "error":
        raise StreamError(events[-1], Told())
    first, *middle, delta, stop = events
    assert (first["type"], delta["type"], stop) == (
        "message_start",
        "message_delta",
        {"type": "message_stop"},
    )
    message = first["message"]
    assert message["content"] == []
    assert message["stop_reason"] is message["stop_sequence"] is None
    blocks: list[dict[str, Any]] = []
    open_, partial = False, ""
    for event in middle:
        assert event["index"] == len(blocks) - (event["type"] != "content_block_start")
        if event["type"] == "content_block_start":
            assert not open_
            open_, partial = True, ""
            blocks.append(dict(event["content_block"]))
            assert not any(blocks[-1].get(name) for name in ("text", "thinking", "signature", "input"))
        elif event["type"] == "content_block_stop":
            assert open_
            open_ = False
            if blocks[-1]["type"] == "tool_use":
                # As the SDK reads it: a call that was cut or broke off keeps the fields that are whole.
                blocks[-1]["input"] = from_json(partial.encode() or b"{}", partial_mode=True)
        else:
            assert open_
            assert event["type"] == "content_block_delta"
            part = event["delta"]
            if part["type"] == "input_json_delta":
                assert blocks[-1]["type"] == "tool_use"
                partial += part["partial_json"]
            else:
                name = _BLOCKS[part["type"]]
                assert name in blocks[-1]
                blocks[-1][name] += part[name]
    assert not open_
    return _messages_whole(message | {"content": blocks} | delta["delta"] | {"usage": delta["usage"]})


# Ollama's.


def _ollama_options(question: Question) -> dict[str, Any]:
    body: dict[str, Any] = {"options": {"num_predict": question.max_tokens}}
    if question.stop:
        body["options"]["stop"] = list(question.stop)
    if question.schema is not None:
        body["format"] = question.schema
    if question.tools:
        assert question.choice == "auto"  # it knows no other
        body["tools"] = [{"type": "function", "function": tool} for tool in question.tools]
    return body


def _ollama_chat_body(question: Question) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question.text}]} | _ollama_options(question)


def _ollama_generate_body(question: Question) -> dict[str, Any]:
    return {"prompt": question.text} | _ollama_options(question)


def _ollama_whole(answer: dict[str, Any]) -> Told:
    message = answer.get("message") or {"content": answer["response"], "thinking": answer.get("thinking")}
    told = Told(message["content"], message.get("thinking") or "", model=answer["model"])
    told.calls = [
        (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()
    ]
    assert answer["done"] is True
    told.end("calls" if told.calls and answer["done_reason"] == "stop" else answer["done_reason"])
    told.num_prompt, told.num_output = answer["prompt_eval_count"], answer["eval_count"]
    assert all(
        answer[f"{name}_duration"] > 0 for name in ("total", "load", "prompt_eval", "eval")
    )  # nanoseconds
    return told


def _ollama_stream(data: bytes) -> Told:
    assert data.endswith(b"\n")
    lines = [json.loads(line) for line in data.splitlines()]
    if "error" in lines[-1]:
        raise StreamError(lines[-1], Told())
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    parts = [line.get("message") or {"content": line["response"]} | line for line in lines]
    whole = {"content": "".join(part["content"] for part in parts)}
    whole["thinking"] = "".join(part.get("thinking") or "" for part in parts)
    whole["tool_calls"] = [call for part in parts for call in part.get("tool_calls") or ()]
    return _ollama_whole(lines[-1] | {"message": whole})


@dataclass(frozen=True)
class Format:
    """A wire format. `error` gives the message of an error, and checks its shape."""

    path: str
    body: Callable[[Question], dict[str, Any]]
    whole: Callable[[dict[str, Any]], Told]
    stream: Callable[[bytes], Told]
    error: Callable[[dict[str, Any], int], str]
    more: dict[str, Any] = field(default_factory=dict)  # of a stream
    reads_messages: bool = True
    chooses_tools: bool = True
    tells_stop: bool = False

    def fields(self, question: Question, stream: bool) -> dict[str, Any]:
        """The body of a question."""
        body = {"stream": stream} | self.body(question) | question.more | (self.more if stream else {})
        return body if question.model is None else body | {"model": question.model}

    def ask(self, server: Any, question: Question, stream: bool) -> Told:
        """The answer of a server of the tests, whose connection it uses."""
        response = server.http.post(self.path, json=self.fields(question, stream))
        assert response.status_code == 200, response.text
        kind = "application/x-ndjson" if self.path.startswith("/api") else "text/event-stream"
        assert response.headers["content-type"].split(";")[0] == (kind if stream else "application/json")
        return self.stream(response.content) if stream else self.whole(response.json())


def _openai_error(body: dict[str, Any], status: int) -> str:
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    message: str = body["error"]["message"]
    return message


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def _anthropic_error(body: dict[str, Any], status: int) -> str:
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == _ANTHROPIC_TYPES[status]
    message: str = body["error"]["message"]
    return message


def _ollama_error(body: dict[str, Any], status: int) -> str:
    assert body.keys() == {"error"}
    message: str = body["error"]
    assert isinstance(message, str)
    return message


_COUNTED = {"stream_options": {"include_usage": True}}
FORMATS = {
    "chat.completions": Format(
        "/v1/chat/completions",
        _chat_body,
        _chat_whole,
        _chat_stream,
        _openai_error,
        _COUNTED,
        tells_stop=True,
    ),
    "completions": Format(
        "/v1/completions",
        _completion_body,
        _completion_whole,
        _completion_stream,
        _openai_error,
        _COUNTED,
        reads_messages=False,
        chooses_tools=False,
        tells_stop=True,
    ),
    "responses": Format("/v1/responses", _responses_body, _responses_whole, _responses_stream, _openai_error),
    "messages": Format(
        "/v1/messages", _messages_body, _messages_whole, _messages_stream, _anthropic_error, tells_stop=True
    ),
    "ollama chat": Format(
        "/api/chat", _ollama_chat_body, _ollama_whole, _ollama_stream, _ollama_error, chooses_tools=False
    ),
    "ollama generate": Format(
        "/api/generate",
        _ollama_generate_body,
        _ollama_whole,
        _ollama_stream,
        _ollama_error,
        chooses_tools=False,
    ),
}
