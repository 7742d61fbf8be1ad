"""LiteLLM: completion, stream, errors, text completion, through its OpenAI-compatible provider."""

from __future__ import annotations

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks for a table of prices first
sys.path[0] += "/common"  # and so not this file, which has the package's name

import litellm
from plain import chat, refused

OPTIONS = {"api_base": sys.argv[1], "api_key": "none", "temperature": 0, "max_tokens": 16}
MESSAGES = [{"role": "user", "content": "Say hello."}]
name = f"openai/{sys.argv[2]}"
whole = litellm.completion(model=name, messages=MESSAGES, **OPTIONS)
chunks = list(litellm.completion(model=name, messages=MESSAGES, stream=True, **OPTIONS))
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
assert text == whole.choices[0].message.content, (text, whole)
assert text == chat(*sys.argv[1:3], MESSAGES, max_tokens=16)
assert whole.usage.completion_tokens > 0
refused(
    litellm.NotFoundError, lambda: litellm.completion(model="openai/no-such", messages=MESSAGES, **OPTIONS)
)
plain = litellm.text_completion(
    model=f"text-completion-openai/{sys.argv[2]}", prompt="The capital of France is", **OPTIONS
)
assert plain.choices[0].text
print("litellm ok")
