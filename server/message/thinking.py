"""Whether and how hard a model shall think, in the variables of its chat template."""

from __future__ import annotations

import re
from typing import Any

from sleb.server.message.reasoning import reasoning_marks

# Of Qwen 3, SmolLM 3 and GLM; of DeepSeek V3.1 and Granite.
_SWITCHES = ("enable_thinking", "thinking")
_EFFORT = "reasoning_effort"  # of gpt-oss
# What others call those of a template.
_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}


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
    return reasoning_marks(template, None) is not None or bool(thinking_variables(template, True, "low"))
