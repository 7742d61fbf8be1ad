"""LiteLLM: completion, stream, text completion, through its OpenAI-compatible provider."""

from __future__ import annotations

import sys

sys.path.pop(0)

import litellm

OPTIONS = {"api_base": sys.argv[1], "api_key": "none", "temperature": 0, "max_tokens": 16}
MESSAGES = [{"role": "user", "content": "Say hello."}]
name = f"openai/{sys.argv[2]}"
whole = litellm.completion(model=name, messages=MESSAGES, **OPTIONS)
chunks = list(litellm.completion(model=name, messages=MESSAGES, stream=True, **OPTIONS))
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
assert text and text == whole.choices[0].message.content, (text, whole)
plain = litellm.text_completion(
    model=f"text-completion-openai/{sys.argv[2]}", prompt="The capital of France is", **OPTIONS
)
assert plain.choices[0].text
print("litellm ok")
