"""openai-agents over Responses (its default) and chat completions: answers, streams, typed answers, a tool's loop."""

from __future__ import annotations

import asyncio
import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from plain import QUESTION, chat
from pydantic import BaseModel

url, model = sys.argv[1:3]
SYSTEM = "Be brief."


class Capital(BaseModel):
    country: str
    capital: str


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    cities.append(city)
    return f"Rain in {city}."


cities: list[str] = []
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
set_default_openai_client(client)
settings = ModelSettings(temperature=0.0, max_tokens=200)
greedy = chat(
    url, model, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}], max_tokens=200
)


async def check(name: str | OpenAIChatCompletionsModel) -> None:
    common = {"instructions": SYSTEM, "model": name}
    plain = Agent(name="plain", model_settings=settings, **common)
    answer = await Runner.run(plain, QUESTION)
    usage = answer.context_wrapper.usage
    assert answer.final_output == greedy and usage.output_tokens > 0 and usage.input_tokens > 0, (
        answer,
        usage,
    )
    streamed = Runner.run_streamed(plain, QUESTION)
    events = [event.data async for event in streamed.stream_events() if event.type == "raw_response_event"]
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == streamed.final_output == greedy, pieces
    typed = Agent(name="typed", model_settings=settings, output_type=Capital, **common)
    assert isinstance((await Runner.run(typed, QUESTION)).final_output, Capital)
    # Required in the first turn; the agents' loop takes that back itself once a tool was called.
    required = ModelSettings(
        temperature=0.0, max_tokens=200, tool_choice="required", parallel_tool_calls=False
    )
    tools = Agent(name="tools", model_settings=required, tools=[weather], **common)
    cities.clear()
    told = await Runner.run(tools, "How is the weather in Oslo?", max_turns=8)
    assert cities and told.final_output, told


async def main() -> None:
    await check(model)
    await check(OpenAIChatCompletionsModel(model, openai_client=client))


asyncio.run(main())
print("openai-agents ok")
