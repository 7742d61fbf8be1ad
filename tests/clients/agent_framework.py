"""Microsoft's Agent Framework in its Responses mode: an agent's answer, its stream, a tool's call, a typed answer."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

sys.path[0] += "/common"  # and so not this file, which has the package's name

from agent_framework import Agent
from agent_framework.openai import OpenAIChatClient
from plain import QUESTION, chat
from pydantic import BaseModel

url, model = sys.argv[1:3]
SYSTEM = "Be brief."
cities: list[str] = []


class Capital(BaseModel):
    country: str
    capital: str


def weather(city: str) -> str:
    """The weather in a city."""
    cities.append(city)
    return f"Rain in {city}."


async def main() -> None:
    client = OpenAIChatClient(model=model, base_url=url, api_key="none")
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 200}
    agent = Agent(client, SYSTEM, default_options=options)
    answer = await agent.run(QUESTION)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    assert answer.text == chat(url, model, messages, max_tokens=200), answer
    assert answer.usage_details["output_token_count"] > 0, answer.usage_details
    stream = agent.run(QUESTION, stream=True)
    parts = [part for update in [update async for update in stream] for part in update.contents]
    # The end of a text comes whole once more, to replace what was joined.
    pieces = [
        part.text for part in parts if part.type == "text" and part.merge_mode == "append" and part.text
    ]
    assert len(pieces) > 2 and "".join(pieces) == answer.text, pieces
    assert (await stream.get_final_response()).text == answer.text
    typed = await agent.run(QUESTION, options={"response_format": Capital})
    assert isinstance(typed.value, Capital), typed
    helper = Agent(client, SYSTEM, tools=[weather], default_options=options)
    told = await helper.run("How is the weather in Oslo?", options={"tool_choice": "required"})
    assert cities and told.messages, told


asyncio.run(main())
print("agent-framework ok")
