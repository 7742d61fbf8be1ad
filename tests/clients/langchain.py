"""langchain-openai: invoke, stream, batch, structured output by JSON schema and by a tool."""

from __future__ import annotations

import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

from langchain_openai import ChatOpenAI
from plain import QUESTION
from plain import chat as ask
from pydantic import BaseModel


class Capital(BaseModel):
    """A country and its capital."""

    country: str
    capital: str


chat = ChatOpenAI(
    base_url=sys.argv[1], api_key="none", model=sys.argv[2], temperature=0, max_tokens=120, max_retries=0
)
whole = chat.invoke(QUESTION)
assert whole.content == ask(*sys.argv[1:3])
assert whole.usage_metadata["output_tokens"] > 0
assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == whole.content
assert len(chat.batch(["Say one.", "Say two."])) == 2
for method in ("json_schema", "function_calling"):
    answer = chat.with_structured_output(Capital, method=method).invoke(QUESTION)
    assert isinstance(answer, Capital), (method, answer)
print("langchain-openai ok")
