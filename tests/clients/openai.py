"""The OpenAI SDK: chat, stream, parsed answers, tools, completions with ids and echo, errors."""

from __future__ import annotations

import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

import openai
from plain import QUESTION, chat
from pydantic import BaseModel

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
model = sys.argv[2]
MESSAGES = [{"role": "user", "content": QUESTION}]


class Capital(BaseModel):
    country: str
    capital: str


def main() -> None:
    assert model in [each.id for each in client.models.list()]
    whole = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=24)
    assert whole.choices[0].message.content == chat(sys.argv[1], model, max_tokens=24)
    assert 0 < whole.usage.completion_tokens <= 24
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    # The prompt may be in the prefix cache by now: that count alone may differ.
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    several = client.chat.completions.create(model=model, messages=MESSAGES, n=3, seed=1, max_tokens=8)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    reported = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    assert all(len(entry.top_logprobs) == 2 for entry in reported.choices[0].logprobs.content)
    completion = client.completions.create(
        model=model, prompt=[[504, 28], [253]], max_tokens=2, echo=True, logprobs=1, temperature=0
    )
    first = completion.choices[0].logprobs
    assert len(first.tokens) == 4 and first.token_logprobs[0] is None and first.token_logprobs[1] < 0
    code = None
    try:
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    except openai.NotFoundError as error:
        code = error.code
    assert code == "model_not_found", code
    parsed = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Capital, temperature=0, max_tokens=120
    )
    assert isinstance(parsed.choices[0].message.parsed, Capital), parsed
    tools = [openai.pydantic_function_tool(Capital)]
    called = client.chat.completions.create(
        model=model, messages=MESSAGES, tools=tools, tool_choice="required", parallel_tool_calls=False,
        temperature=0, max_tokens=120,
    )  # fmt: skip
    [call] = called.choices[0].message.tool_calls
    assert called.choices[0].finish_reason == "tool_calls" and call.function.name == "Capital"
    Capital.model_validate_json(call.function.arguments)
    print("openai", openai.__version__, "ok")


main()
