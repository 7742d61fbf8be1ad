"""Semantic Kernel: an agent's answer, stream and thread in its Responses mode, and a tool's call over chat completions.

Its Responses agent sends tools but never a tool_choice, and a small model calls none by itself.
"""

from __future__ import annotations

import asyncio
import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

from openai import AsyncOpenAI
from plain import QUESTION, chat
from semantic_kernel.agents import ChatCompletionAgent, OpenAIResponsesAgent
from semantic_kernel.connectors.ai.function_choice_behavior import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion
from semantic_kernel.functions import kernel_function

url, model = sys.argv[1:3]
SYSTEM = "Be brief."
FOLLOW_UP = "And of Italy?"


class Weather:
    """A plugin that remembers what it was asked."""

    def __init__(self) -> None:
        self.cities: list[str] = []

    @kernel_function(name="weather", description="The weather in a city.")
    def weather(self, city: str) -> str:
        self.cities.append(city)
        return f"Rain in {city}."


async def main() -> None:
    client = AsyncOpenAI(base_url=url, api_key="none")
    agent = OpenAIResponsesAgent(ai_model_id=model, client=client, name="brief", instructions=SYSTEM)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    first = await agent.get_response(messages=QUESTION)
    assert first.message.content == chat(url, model, messages), first
    pieces = [part.message.content async for part in agent.invoke_stream(messages=QUESTION)]
    assert len([piece for piece in pieces if piece]) > 2, pieces
    assert "".join(pieces) == first.message.content, pieces
    second = await agent.get_response(messages=FOLLOW_UP, thread=first.thread)  # by previous_response_id
    messages += [
        {"role": "assistant", "content": first.message.content},
        {"role": "user", "content": FOLLOW_UP},
    ]
    assert second.message.content == chat(url, model, messages), second
    tool = Weather()
    helper = ChatCompletionAgent(
        service=OpenAIChatCompletion(ai_model_id=model, async_client=client),
        name="helper",
        instructions=SYSTEM,
        plugins=[tool],
        function_choice_behavior=FunctionChoiceBehavior.Required(),
    )
    told = await helper.get_response(messages="How is the weather in Oslo?")
    assert tool.cities and told.message.content, (tool.cities, told)


asyncio.run(main())
print("semantic-kernel ok")
