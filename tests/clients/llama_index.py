"""LlamaIndex over chat completions: chat, stream, completion, a typed answer, a required tool call, errors."""

from __future__ import annotations

import sys

sys.path[0] += "/common"  # and so not this file, which may have a package's name

import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from plain import QUESTION, chat, refused
from pydantic import BaseModel

url, model = sys.argv[1:3]


class Capital(BaseModel):
    """A country and its capital."""

    country: str
    capital: str


def weather(city: str) -> str:
    """The weather in a city."""
    return f"Rain in {city}."


options = {"api_base": url, "api_key": "none", "temperature": 0, "max_tokens": 200, "max_retries": 0}
llm = OpenAILike(model=model, is_chat_model=True, is_function_calling_model=True, **options)
messages = [ChatMessage(role="user", content=QUESTION)]
whole = llm.chat(messages)
assert whole.message.content == chat(url, model)
assert whole.raw.usage.completion_tokens > 0
assert "".join(piece.delta or "" for piece in llm.stream_chat(messages)) == whole.message.content
completion = OpenAILike(model=model, is_chat_model=False, **options | {"max_tokens": 8})
assert completion.complete("The capital of France is").text
answer = llm.chat_with_tools(
    [FunctionTool.from_defaults(weather)], user_msg="How is the weather in Oslo?", tool_required=True
)
[call] = llm.get_tool_calls_from_response(answer)
assert call.tool_name == "weather" and set(call.tool_kwargs) == {"city"}, call
typed = llm.as_structured_llm(Capital).chat(messages)
assert isinstance(typed.raw, Capital), typed
nobody = OpenAILike(model="no-such-model", is_chat_model=True, **options)
assert "no-such-model" in str(refused(openai.NotFoundError, lambda: nobody.chat(messages)))
print("LlamaIndex ok")
