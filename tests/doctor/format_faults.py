"""Faults of a server in the further wire formats: what each spoils, and the checks that must see it.

Loaded by test_doctor_faults.py, with doctor_proxy.py; a module of its own only for its length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Body = dict[str, Any]


def change_body(path: str, change: Callable[[Body], Any]) -> Callable[[Any], None]:
    """The server reads another body than was sent."""

    def before(call: Any) -> None:
        if call.path.endswith(path) and call.body is not None:
            change(call.body)

    return before


def change_answer(path: str, change: Callable[[Any], Any], status: int = 200) -> Callable[[Any, Any], None]:
    """The JSON of whole answers is another."""

    def after(call: Any, reply: Any) -> None:
        kind = reply.headers.get("content-type", "")
        if path in call.path and reply.status == status and kind == "application/json":
            content = json.loads(reply.content)
            change(content)
            reply.content = json.dumps(content).encode()

    return after


def change_events(path: str, change: Callable[[list[Any]], Any]) -> Callable[[Any, Any], None]:
    """A stream's list of events, or of lines, is another."""

    def after(call: Any, reply: Any) -> None:
        kind = reply.headers.get("content-type", "")
        text = reply.content.decode()
        if path not in call.path:
            return
        if "event-stream" in kind:
            blocks = [
                block.split("\ndata: ", 1) for block in text.split("\n\n") if block.startswith("event: ")
            ]
            events = [json.loads(data) for _, data in blocks]
            change(events)
            text = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
        elif "ndjson" in kind:
            events = [json.loads(line) for line in text.splitlines()]
            change(events)
            text = "".join(json.dumps(event) + "\n" for event in events)
        reply.content = text.encode()

    return after


def become(path: str, old: int, new: int, content: Any) -> Callable[[Any, Any], None]:
    """Answers of one status have another, and another body."""

    def after(call: Any, reply: Any) -> None:
        if path in call.path and reply.status == old:
            reply.status, reply.content = new, json.dumps(content).encode()

    return after


def lose(field: str) -> Callable[[Any], Any]:
    return lambda holder: holder.pop(field, None)


def _set(**fields: Any) -> Callable[[Any], Any]:
    return lambda holder: holder.update(fields)


def _text_of_response(content: Any) -> None:
    for item in content.get("output", ()):
        for part in item.get("content", ()):
            part["text"] = "other"


def _calls_of_response(content: Any) -> None:
    for item in content.get("output", ()):
        if item["type"] == "function_call":
            item["arguments"] = "none"


def _lose_first(*kinds: str) -> Callable[[list[Any]], None]:
    def change(events: list[Any]) -> None:
        found = next((event for event in events if event.get("type") in kinds), None)
        if found is not None:
            events.remove(found)

    return change


def _blocks(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda content: [change(block) for block in content.get("content", ())]


def _lose_line(lines: list[Any]) -> None:
    told = [line for line in lines if not line["done"]]
    if told:
        lines.remove(told[0])


def _no_input(block: Any) -> None:
    if "input" in block:
        block["input"] = {}


def make(fault: Any, reply: Any) -> list[Any]:
    """The faults; `fault` and `reply` are the proxy's classes."""

    def refuse(path: str, when: Callable[[Body], Any], status: int = 400) -> Any:
        def before(call: Any) -> Any:
            return reply.error(status) if call.path.endswith(path) and when(call.body or {}) else None

        return before

    def bearer_alone(call: Any) -> Any:
        return reply.error(401) if not call.headers.get("authorization") else None

    of, messages, chat = "/responses", "/messages", "/api/chat"
    argue = "response.function_call_arguments.delta"
    json_delta, text_delta = {"type": "input_json_delta"}, "content_block_delta"

    def spoil_json(events: list[Any]) -> None:
        for event in events:
            if event.get("delta", {}).get("type") == json_delta["type"]:
                event["delta"]["partial_json"] = "x"

    return [
        fault(
            "responses of no kind",
            ("responses: a response has its shape",),
            after=change_answer(of, lose("object")),
        ),
        fault(
            "responses of other words",
            ("responses: the text is that of a chat", "responses: deltas are the text"),
            after=change_answer(of, _text_of_response),
        ),
        fault(
            "responses without details",
            ("responses: usage has details",),
            after=change_answer(of, lambda content: lose("input_tokens_details")(content.get("usage") or {})),
        ),
        fault(
            "every response is complete",
            ("responses: a cut response is incomplete",),
            after=change_answer(of, _set(status="completed")),
        ),
        fault(
            "instructions are nothing",
            ("responses: instructions are read",),
            before=change_body(of, lose("instructions")),
        ),
        fault(
            "one item",
            ("responses: items are read",),
            before=change_body(of, lambda body: body.update(input=body["input"][:1])),
        ),
        fault(
            "no response in progress",
            ("responses: events come in their order",),
            after=change_events(of, _lose_first("response.in_progress")),
        ),
        fault(
            "a delta is lost",
            ("responses: deltas are the text",),
            after=change_events(of, _lose_first("response.output_text.delta")),
        ),
        fault(
            "calls of nothing",
            ("responses: a required call is an item",),
            after=change_answer(of, _calls_of_response),
        ),
        fault(
            "half of the arguments",
            ("responses: a calls arguments stream",),
            after=change_events(of, _lose_first(argue)),
        ),
        fault("any text", ("responses: a schema is kept",), before=change_body(of, lose("text"))),
        fault(
            "nothing is stored",
            ("responses: a stored response is found",),
            before=change_body(of, _set(store=False)),
        ),
        fault(
            "nothing was before",
            ("responses: a conversation goes on",),
            before=change_body(of, lose("previous_response_id")),
        ),
        fault(
            "everything is stored",
            ("responses: what is not stored is gone",),
            before=change_body(of, _set(store=True)),
        ),
        fault(
            "one token of input",
            ("responses: input tokens are counted",),
            after=change_answer("/input_tokens", _set(input_tokens=1)),
        ),
        fault(
            "a 500 for every bad response", ("responses: bad input is 400",), after=become(of, 400, 500, {})
        ),
        fault(
            "functions alone",
            ("responses: an unknown tool type is no error",),
            before=refuse(
                of, lambda body: any(tool["type"] != "function" for tool in body.get("tools") or ())
            ),
        ),
        fault(
            "messages of no type",
            ("messages: a message has its shape",),
            after=change_answer(messages, lose("type")),
        ),
        fault(
            "messages of other words",
            ("messages: the text is that of a chat", "messages: deltas are the text"),
            after=change_answer(messages, _blocks(_set(text="other"))),
        ),
        fault(
            "every turn ends by itself",
            ("messages: max tokens ends a message",),
            after=change_answer(messages, _set(stop_reason="end_turn")),
        ),
        fault(
            "nothing stops a message",
            ("messages: a stop sequence is told",),
            before=change_body(messages, lose("stop_sequences")),
        ),
        fault("no system", ("messages: system is read",), before=change_body(messages, lose("system"))),
        fault(
            "blocks without an end",
            ("messages: events come in their order",),
            after=change_events(messages, _lose_first("content_block_stop")),
        ),
        fault(
            "a text delta is lost",
            ("messages: deltas are the text",),
            after=change_events(messages, _lose_first(text_delta)),
        ),
        fault(
            "tools without input",
            ("messages: a tool is used",),
            after=change_answer(messages, _blocks(_no_input)),
        ),
        fault(
            "partial JSON that is none",
            ("messages: a tools input streams",),
            after=change_events(messages, spoil_json),
        ),
        fault(
            "the first message alone",
            ("messages: a tools result is read",),
            before=change_body(messages, lambda body: body.update(messages=body["messages"][:1])),
        ),
        fault(
            "one token of a message",
            ("messages: tokens are counted",),
            after=change_answer("/count_tokens", _set(input_tokens=1)),
        ),
        fault(
            "errors of OpenAI's shape",
            ("messages: errors have their shape",),
            after=become(messages, 404, 404, {"error": {"message": "no", "type": "x"}}),
        ),
        fault("bearers alone", ("messages: a key may come as x api key",), before=bearer_alone),
        fault(
            "tags without details",
            ("ollama: models are tagged",),
            after=change_answer(
                "/api/tags", lambda content: [lose("details")(each) for each in content["models"]]
            ),
        ),
        fault(
            "no version of Ollama",
            ("ollama: the version is told",),
            after=change_answer("/api/version", _set(version="")),
        ),
        fault(
            "no capabilities",
            ("ollama: a model is shown",),
            after=change_answer("/api/show", lose("capabilities")),
        ),
        fault(
            "answers in no time",
            ("ollama: an answer has its shape",),
            after=change_answer(chat, lose("total_duration")),
        ),
        fault(
            "Ollama's other words",
            ("ollama: the text is that of a chat", "ollama: an answer streams in lines"),
            after=change_answer(chat, lambda content: content["message"].update(content="other")),
        ),
        fault(
            "every answer stops by itself",
            ("ollama: num predict ends an answer",),
            after=change_answer(chat, _set(done_reason="stop")),
        ),
        fault(
            "a line is lost", ("ollama: an answer streams in lines",), after=change_events(chat, _lose_line)
        ),
        fault(
            "another answer to a prompt",
            ("ollama: a prompt is answered",),
            after=change_answer("/api/generate", _set(response="other")),
        ),
        fault("any format", ("ollama: a format is kept",), before=change_body(chat, lose("format"))),
        fault("no tools", ("ollama: tools are offered",), before=change_body(chat, lose("tools"))),
        fault(
            "any model of Ollama's",
            ("ollama: an unknown model is 404",),
            after=become(chat, 404, 200, {"error": "no"}),
        ),
    ]
