"""The checks, a module a group, in the order in which they run."""

from __future__ import annotations

from sleb.doctor.checks import (
    chat,
    completions,
    errors,
    logprobs,
    messages,
    models,
    ollama,
    operation,
    responses,
    robustness,
    sampling,
    streaming,
    structured,
    tokenizer,
    tools,
)

GROUPS = (
    models.GROUP,
    chat.GROUP,
    completions.GROUP,
    streaming.GROUP,
    logprobs.GROUP,
    sampling.GROUP,
    structured.GROUP,
    tools.GROUP,
    tokenizer.GROUP,
    responses.GROUP,
    messages.GROUP,
    ollama.GROUP,
    errors.GROUP,
    operation.GROUP,
    robustness.GROUP,
)
