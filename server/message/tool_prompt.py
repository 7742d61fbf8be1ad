"""Tools for models whose chat template knows none: explained and told in plain messages, in Hermes's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

# The words that Hermes models, and Qwen's after them, are trained with.
_EXPLANATION = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def offer_in_text(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages with `tools` explained in the system message, and earlier calls and their results as text."""
    told = [_tell(message) for message in messages]
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        explanation = _EXPLANATION.format(tools=listed)
        if told and told[0].get("role") in ("system", "developer"):
            told[0] = told[0] | {"content": f"{told[0].get('content') or ''}\n\n{explanation}"}
        else:
            told.insert(0, {"role": "system", "content": explanation})
    return told


def _tell(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content')}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    texts = [message["content"]] if message.get("content") else []
    for call in message["tool_calls"]:
        shown = json.dumps(call["function"], ensure_ascii=False)
        texts.append(f"<tool_call>\n{shown}\n</tool_call>")
    return {"role": "assistant", "content": "\n".join(texts)}
