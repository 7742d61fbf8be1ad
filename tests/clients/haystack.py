"""Haystack's generators for chat completions and Responses: answers, streams, tools, a schema, errors."""

from __future__ import annotations

import json
import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

import openai
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
from plain import QUESTION, chat, refused
from pydantic import BaseModel

url, model = sys.argv[1:3]


class Capital(BaseModel):
    country: str
    capital: str


def weather(city: str) -> str:
    """The weather in a city."""
    return f"Rain in {city}."


def check(kind: type, greedy: dict[str, object]) -> None:
    def generator(name: str = model, **fields: object) -> object:
        return kind(
            api_key=Secret.from_token("none"), api_base_url=url, model=name, max_retries=0,
            generation_kwargs=greedy | fields,
        )  # fmt: skip

    question = [ChatMessage.from_user(QUESTION)]
    [whole] = generator().run(question)["replies"]
    assert whole.text == chat(url, model), whole
    assert min(value for value in whole.meta["usage"].values() if isinstance(value, int)) > 0, whole.meta
    pieces: list[str] = []
    [streamed] = generator().run(question, streaming_callback=lambda chunk: pieces.append(chunk.content))[
        "replies"
    ]
    assert len(pieces) > 2 and "".join(pieces) == streamed.text == whole.text, pieces
    tool = create_tool_from_function(weather)
    asked = [ChatMessage.from_user("How is the weather in Oslo?")]
    [called] = generator(tool_choice="required").run(asked, tools=[tool])["replies"]
    call = called.tool_calls[0]
    assert call.tool_name == "weather" and set(call.arguments) == {"city"}, call
    result = ChatMessage.from_tool(tool.invoke(**call.arguments), origin=call)
    [told] = generator().run([*asked, called, result])["replies"]
    assert told.text
    error = refused(openai.NotFoundError, lambda: generator("no-such-model").run(question))
    assert "no-such-model" in str(error)


check(OpenAIChatGenerator, {"temperature": 0, "max_tokens": 200})
check(OpenAIResponsesChatGenerator, {"temperature": 0, "max_output_tokens": 200})
[typed] = OpenAIChatGenerator(
    api_key=Secret.from_token("none"), api_base_url=url, model=model,
    generation_kwargs={"temperature": 0, "max_tokens": 200, "response_format": Capital},
).run([ChatMessage.from_user(QUESTION)])["replies"]  # fmt: skip
Capital.model_validate(json.loads(typed.text))
print("haystack ok")
