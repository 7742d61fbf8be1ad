"""pydantic-ai: text, stream, and a typed result by its native structured output and by a tool."""

from __future__ import annotations

import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

from plain import chat
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Capital(BaseModel):
    country: str
    capital: str


model = OpenAIChatModel(sys.argv[2], provider=OpenAIProvider(base_url=sys.argv[1], api_key="none"))
settings = {"temperature": 0.0, "max_tokens": 200}
assert Agent(model, model_settings=settings).run_sync("Say hello.").output == chat(
    *sys.argv[1:3], "Say hello.", max_tokens=200
)
for kind in (NativeOutput, ToolOutput):
    agent = Agent(model, output_type=kind(Capital), model_settings=settings)
    answer = agent.run_sync("What is the capital of France?").output
    assert isinstance(answer, Capital), (kind, answer)
print("pydantic-ai ok")
