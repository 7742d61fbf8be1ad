"""openai-agents over chat completions: an agent's answer, and a typed one."""

from __future__ import annotations

import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel


class Capital(BaseModel):
    country: str
    capital: str


set_tracing_disabled(True)
model = OpenAIChatCompletionsModel(
    sys.argv[2], openai_client=AsyncOpenAI(base_url=sys.argv[1], api_key="none")
)
settings = ModelSettings(temperature=0.0, max_tokens=200)
agent = Agent(name="plain", instructions="Be brief.", model=model, model_settings=settings)
assert Runner.run_sync(agent, "What is the capital of France?").final_output
typed = Agent(
    name="typed", instructions="Be brief.", model=model, model_settings=settings, output_type=Capital
)
assert isinstance(Runner.run_sync(typed, "What is the capital of France?").final_output, Capital)
print("openai-agents ok")
