"""Whether and how hard a model shall think, in the variables of its chat template."""

from __future__ import annotations

import re
from typing import Any

# Of Qwen 3, SmolLM 3 and GLM; of DeepSeek V3.1 and Granite.
_SWITCHES = ("enable_thinking", "thinking")
_EFFORT = "reasoning_effort"  # of gpt-oss
_MARKS = ("<think>", "<|channel|>analysis")
_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}  # what others call those of a template


def thinking_variables(template: str | None, think: bool | None, effort: str | None = None) -> dict[str, Any]:
    """The variables that tell a chat template what a request says of thinking; none that the template does not name.

    think, effort: None for what the request leaves open.
    """
    names = set(re.findall(r"\w+", template or ""))
    variables: dict[str, Any] = {}
    if think is not None:
        variables = {name: think for name in _SWITCHES if name in names}
    if effort is not None and _EFFORT in names:
        variables[_EFFORT] = _EFFORTS.get(effort, effort)
    return variables


def can_think(template: str | None) -> bool:
    """Whether a chat template shows that the model thinks before it answers."""
    text = template or ""
    return any(mark in text for mark in _MARKS) or bool(thinking_variables(text, True, "low"))
