"""The Anthropic SDK: messages, streams, a tool loop, its tool runner, count_tokens, thinking, stops, errors."""

from __future__ import annotations

import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

import anthropic
from anthropic import beta_tool
from plain import QUESTION, chat, refused

url, model = sys.argv[1:3]
client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
options = {
    "model": model,
    "max_tokens": 120,
    "extra_body": {"temperature": 0},
}  # which this SDK has no word for
messages = [{"role": "user", "content": QUESTION}]
TOOLS = [
    {
        "name": "weather",
        "description": "The weather in a city",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
]

whole = client.messages.create(messages=messages, **options)
[block] = whole.content
assert block.type == "text" and block.text == chat(url, model, max_tokens=120), whole
assert whole.stop_reason == "end_turn" and whole.usage.output_tokens > 0, whole
count = client.messages.count_tokens(model=model, messages=messages).input_tokens
assert count == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) > 0, (
    count,
    whole.usage,
)

events = list(client.messages.create(messages=messages, stream=True, **options))
assert events[0].type == "message_start" and events[-1].type == "message_stop"
pieces = [event.delta.text for event in events if event.type == "content_block_delta"]
assert len(pieces) > 2 and "".join(pieces) == block.text
with client.messages.stream(messages=messages, **options) as stream:
    assert "".join(stream.text_stream) == block.text
    final = stream.get_final_message()
assert final.stop_reason == "end_turn" and final.usage.output_tokens == whole.usage.output_tokens

# A system prompt as blocks, an answer that is begun, a stop sequence, a limit
system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
briefly = client.messages.create(messages=messages, system=system, **options).content[0].text
assert briefly == chat(
    url, model, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
)
word = block.text.split()[2]
stopped = client.messages.create(messages=messages, stop_sequences=[word], **options)
assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == word, stopped
assert stopped.content[0].text == block.text.partition(word)[0], stopped
assert client.messages.create(messages=messages, **options | {"max_tokens": 2}).stop_reason == "max_tokens"

# Tools: the call, its stream, its result
asked = [{"role": "user", "content": "How is the weather in Oslo?"}]
for choice in ({"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}):
    called = client.messages.create(messages=asked, tools=TOOLS, tool_choice=choice, **options)
    call = next(block for block in called.content if block.type == "tool_use")
    assert called.stop_reason == "tool_use" and call.name == "weather" and set(call.input) == {"city"}, called
    with client.messages.stream(messages=asked, tools=TOOLS, tool_choice=choice, **options) as stream:
        again = next(block for block in stream.get_final_message().content if block.type == "tool_use")
    assert again.input == call.input and again.name == call.name
result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
asked += [{"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
told = client.messages.create(messages=asked, tools=TOOLS, tool_choice={"type": "none"}, **options)
assert told.content[0].type == "text" and told.content[0].text and told.stop_reason == "end_turn", told


@beta_tool
def population(city: str) -> str:
    """How many people live in a city.

    Args:
        city: Its name
    """
    cities.append(city)
    return "700000"


cities: list[str] = []
runner = client.beta.messages.tool_runner(
    messages=[{"role": "user", "content": "How many people live in Oslo?"}], tools=[population],
    tool_choice={"type": "any"}, max_iterations=2, **options,
)  # fmt: skip
assert len(list(runner)) == 2 and len(cities) >= 1, cities

# Thinking is accepted of a model that does not; its own comes back in requests.
thinking = {"type": "enabled", "budget_tokens": 1024}
thought = client.messages.create(messages=messages, thinking=thinking, **options | {"max_tokens": 2048})
assert thought.content[-1].type == "text" and thought.content[-1].text, thought
error = refused(
    anthropic.NotFoundError,
    lambda: client.messages.create(messages=messages, **options | {"model": "no-such-model"}),
)
assert error.body["type"] == "error" and error.body["error"]["type"] == "not_found_error", error.body
assert error.request_id
error = refused(
    anthropic.BadRequestError,
    lambda: client.messages.create(messages=[{"role": "user", "content": "word " * 20_000}], **options),
)
assert error.body["error"]["type"] == "invalid_request_error", error.body
print("anthropic", anthropic.__version__, "ok")
