"""instructor: a typed answer in JSON-schema mode and in tools mode."""

from __future__ import annotations

import sys

sys.path[0] += "/common"  # and so not this file, which has the package's name

import instructor
import openai
from pydantic import BaseModel


class Capital(BaseModel):
    country: str
    capital: str


for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(openai.OpenAI(base_url=sys.argv[1], api_key="none"), mode=mode)
    answer = client.chat.completions.create(
        model=sys.argv[2],
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        response_model=Capital,
        temperature=0,
        max_tokens=200,
        max_retries=1,
    )
    assert isinstance(answer, Capital), (mode, answer)
print("instructor ok")
