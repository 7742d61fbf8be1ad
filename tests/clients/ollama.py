"""ollama's own package: chat, generate, streams, tools, a schema, the list and the description of models, errors."""

from __future__ import annotations

import asyncio
import json
import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

import ollama
from plain import QUESTION, chat, refused
from pydantic import BaseModel

url, model = sys.argv[1:3]
client = ollama.Client(host=url.removesuffix("/v1"))
greedy = {"temperature": 0, "num_predict": 120}
messages = [{"role": "user", "content": QUESTION}]


class Capital(BaseModel):
    country: str
    capital: str


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: Its name
    """
    return f"Rain in {city}."


names = [each.model for each in client.list().models]
assert any(name == model or name.startswith(model + ":") for name in names), names
shown = client.show(model)
assert "completion" in shown.capabilities and shown.details.parameter_size and shown.modelinfo, shown

whole = client.chat(model=model, messages=messages, options=greedy)
assert (
    whole.done and whole.done_reason == "stop" and whole.message.content == chat(url, model, max_tokens=120)
), whole
assert whole.eval_count > 0 and whole.prompt_eval_count > 0, whole
assert whole.total_duration >= whole.eval_duration > 0 and whole.model == model, whole
pieces = list(client.chat(model=model, messages=messages, options=greedy, stream=True))
assert len(pieces) > 2 and [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
assert pieces[-1].eval_count == whole.eval_count

generated = client.generate(model=model, prompt=QUESTION, options=greedy)
assert generated.response == whole.message.content, generated  # by the template, as chat
assert (
    "".join(
        piece.response for piece in client.generate(model=model, prompt=QUESTION, options=greedy, stream=True)
    )
    == generated.response
)
raw = client.generate(
    model=model, prompt="The capital of France is", raw=True, options=greedy | {"num_predict": 4}
)
assert raw.response and raw.done_reason == "length", raw

typed = client.chat(model=model, messages=messages, format=Capital.model_json_schema(), options=greedy)
Capital.model_validate_json(typed.message.content)
assert isinstance(
    json.loads(client.chat(model=model, messages=messages, format="json", options=greedy).message.content),
    dict,
)
# Ollama cannot require a call: that tools and their results are taken is what can be known of a small model.
asked = [{"role": "user", "content": "How is the weather in Oslo?"}]
free = client.chat(model=model, messages=asked, tools=[weather], options=greedy)
assert free.message.content or all(call.function.name == "weather" for call in free.message.tool_calls), free
call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
asked += [
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "tool_name": "weather", "content": weather("Oslo")},
]
assert client.chat(model=model, messages=asked, options=greedy).message.content


async def streamed() -> str:
    parts = await ollama.AsyncClient(host=url.removesuffix("/v1")).chat(
        model=model, messages=messages, options=greedy, stream=True
    )
    return "".join([part.message.content or "" async for part in parts])


assert asyncio.run(streamed()) == whole.message.content
error = refused(ollama.ResponseError, lambda: client.chat(model="no-such-model", messages=messages))
assert error.status_code == 404 and "no-such-model" in error.error, error
print("ollama ok")
