"""LlamaIndex over chat completions, Responses and Ollama's format: answers, streams, types, tools, errors."""

from __future__ import annotations

import sys

sys.path[0] += "/common"  # and so not this file, which may have a package's name

import ollama
import openai
from llama_index.core.llms import LLM, ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike
from plain import QUESTION, chat, refused
from pydantic import BaseModel

url, model = sys.argv[1:3]
messages = [ChatMessage(role="user", content=QUESTION)]
common = {"api_base": url, "api_key": "none", "temperature": 0, "max_retries": 0}


class Capital(BaseModel):
    """A country and its capital."""

    country: str
    capital: str


def weather(city: str) -> str:
    """The weather in a city."""
    return f"Rain in {city}."


def check(llm: LLM) -> None:
    whole = llm.chat(messages)
    assert whole.message.content == chat(url, model, max_tokens=200)
    pieces = [piece.delta or "" for piece in llm.stream_chat(messages)]
    assert len(pieces) > 2 and "".join(pieces) == whole.message.content, pieces


def check_tools(llm: LLM) -> None:
    answer = llm.chat_with_tools(
        [FunctionTool.from_defaults(weather)], user_msg="How is the weather in Oslo?", tool_required=True
    )
    [call] = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather" and set(call.tool_kwargs) == {"city"}, call
    typed = llm.as_structured_llm(Capital).chat(messages)
    assert isinstance(typed.raw, Capital), typed


like = OpenAILike(model=model, is_chat_model=True, is_function_calling_model=True, max_tokens=200, **common)
check(like)
check_tools(like)
assert like.chat(messages).raw.usage.completion_tokens > 0
assert (
    OpenAILike(model=model, is_chat_model=False, max_tokens=8, **common)
    .complete("The capital of France is")
    .text
)
nobody = OpenAILike(model="no-such-model", is_chat_model=True, **common)
assert "no-such-model" in str(refused(openai.NotFoundError, lambda: nobody.chat(messages)))

responses = OpenAIResponses(model=model, max_output_tokens=200, context_window=8192, **common)
check(responses)
check_tools(responses)
assert responses.chat(messages).raw.usage.output_tokens > 0
nobody = OpenAIResponses(model="no-such-model", context_window=8192, **common)
assert "no-such-model" in str(refused(openai.NotFoundError, lambda: nobody.chat(messages)))

root = url.removesuffix("/v1")
local = Ollama(
    model=model, base_url=root, temperature=0, context_window=8192, additional_kwargs={"num_predict": 200}
)
check(local)
assert isinstance(local.as_structured_llm(Capital).chat(messages).raw, Capital)  # by Ollama's `format`
nobody = Ollama(model="no-such-model", base_url=root, context_window=8192)
assert refused(ollama.ResponseError, lambda: nobody.chat(messages)).status_code == 404
print("LlamaIndex ok")
