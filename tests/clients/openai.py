"""The OpenAI SDK: chat, completions with ids and echo, and Responses; streams, parsed answers, tools, errors."""

from __future__ import annotations

import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

import openai
from plain import QUESTION, chat, refused
from pydantic import BaseModel

url, model = sys.argv[1:3]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
MESSAGES = [{"role": "user", "content": QUESTION}]


class Capital(BaseModel):
    country: str
    capital: str


def main() -> None:
    assert model in [each.id for each in client.models.list()]
    whole = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=24)
    assert whole.choices[0].message.content == chat(url, model, max_tokens=24)
    assert 0 < whole.usage.completion_tokens <= 24
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    # The prompt may be in the prefix cache by now: that count alone may differ.
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    several = client.chat.completions.create(model=model, messages=MESSAGES, n=3, seed=1, max_tokens=8)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    reported = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    assert all(len(entry.top_logprobs) == 2 for entry in reported.choices[0].logprobs.content)
    completion = client.completions.create(
        model=model, prompt=[[504, 28], [253]], max_tokens=2, echo=True, logprobs=1, temperature=0
    )
    first = completion.choices[0].logprobs
    assert len(first.tokens) == 4 and first.token_logprobs[0] is None and first.token_logprobs[1] < 0
    error = refused(
        openai.NotFoundError, lambda: client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    )
    assert error.code == "model_not_found", error
    parsed = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Capital, temperature=0, max_tokens=120
    )
    assert isinstance(parsed.choices[0].message.parsed, Capital), parsed
    tools = [openai.pydantic_function_tool(Capital)]
    called = client.chat.completions.create(
        model=model, messages=MESSAGES, tools=tools, tool_choice="required", parallel_tool_calls=False,
        temperature=0, max_tokens=120,
    )  # fmt: skip
    [call] = called.choices[0].message.tool_calls
    assert called.choices[0].finish_reason == "tool_calls" and call.function.name == "Capital"
    Capital.model_validate_json(call.function.arguments)


def responses() -> None:
    options = {"model": model, "temperature": 0, "max_output_tokens": 120}
    whole = client.responses.create(input=QUESTION, **options)
    assert whole.status == "completed" and whole.output_text == chat(url, model, max_tokens=120), whole
    assert whole.usage.output_tokens > 0 and whole.usage.input_tokens_details.cached_tokens >= 0, whole
    assert (
        client.responses.input_tokens.count(model=model, input=QUESTION).input_tokens
        == whole.usage.input_tokens
    )
    events = list(client.responses.create(input=QUESTION, stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(pieces) > 2 and "".join(pieces) == whole.output_text == events[-1].response.output_text
    with client.responses.stream(
        input=QUESTION, **options
    ) as stream:  # the SDK puts its own snapshot together
        assert stream.get_final_response().output_text == whole.output_text
    cut = client.responses.create(input="Count to a hundred.", **options | {"max_output_tokens": 16})
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens", cut
    parsed = client.responses.parse(input=QUESTION, text_format=Capital, **options)
    assert isinstance(parsed.output_parsed, Capital), parsed

    # A turn by the id of the one before is the turn with its whole history.
    follow = "And of Japan?"
    later = client.responses.create(input=follow, previous_response_id=whole.id, **options)
    history = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": whole.output_text},
        {"role": "user", "content": follow},
    ]
    assert later.output_text == chat(url, model, history, max_tokens=120), later
    assert later.output_text == client.responses.create(input=history, **options).output_text
    assert client.responses.retrieve(whole.id).output_text == whole.output_text
    client.responses.delete(whole.id)
    refused(openai.NotFoundError, lambda: client.responses.retrieve(whole.id))

    tool = openai.pydantic_function_tool(Capital)["function"]
    once = {"tools": [{"type": "function", **tool}], "tool_choice": "required", "parallel_tool_calls": False}
    called = client.responses.create(input=QUESTION, **once, **options)
    call = next(item for item in called.output if item.type == "function_call")
    Capital.model_validate_json(call.arguments)
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "Right."}
    asked = {"role": "user", "content": QUESTION}
    assert client.responses.create(input=[asked, *called.output, told], tools=once["tools"], **options).output
    events = list(client.responses.create(input=QUESTION, stream=True, **once, **options))
    joined = "".join(
        event.delta for event in events if event.type == "response.function_call_arguments.delta"
    )
    assert joined and joined == call.arguments, (joined, call)
    error = refused(
        openai.NotFoundError, lambda: client.responses.create(model="no-such-model", input=QUESTION)
    )
    assert error.code == "model_not_found", error


main()
responses()
print("openai", openai.__version__, "ok")
