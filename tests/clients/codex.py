"""Codex: `codex exec` over Responses; what it shows is what was streamed to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[0] += "/common"

from plain import QUESTION, Recorder, chat

url, model = sys.argv[1:3]
recorder = Recorder(url)
CONFIG = """
model = "{model}"
model_provider = "sleb"
# A small model's context has no room for a coding agent's own prompt.
model_instructions_file = "{folder}/brief.md"

[model_providers.sleb]
name = "sleb"
base_url = "{url}"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0

[features]
goals = false
multi_agent = false
"""


def run(name: str, *options: str) -> tuple[int, list[dict[str, object]]]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "brief.md").write_text("Be brief.\n")
        Path(folder, "config.toml").write_text(CONFIG.format(folder=folder, url=recorder.url, model=name))
        done = subprocess.run(
            ["codex", "exec", "--json", "--skip-git-repo-check", *options, QUESTION],
            cwd=folder, env=os.environ | {"CODEX_HOME": folder}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=250,
        )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def messages_of(body: dict[str, object]) -> list[dict[str, object]]:
    """The items of a request as chat's messages."""
    items = body["input"]
    assert isinstance(items, list) and all(item["type"] == "message" for item in items), items
    return [
        {"role": item["role"], "content": "".join(part["text"] for part in item["content"])} for item in items
    ]


code, events = run(model)
assert code == 0, events
[shown] = [event["item"]["text"] for event in events if event.get("item", {}).get("type") == "agent_message"]
[exchange] = recorder.posted("/v1/responses")
streamed = exchange.events()
assert streamed[0]["type"] == "response.created" and streamed[-1]["type"] == "response.completed", streamed
text = "".join(event["delta"] for event in streamed if event["type"] == "response.output_text.delta")
assert shown and shown == text, (shown, text)
[turn] = [event for event in events if event["type"] == "turn.completed"]
usage = streamed[-1]["response"]["usage"]
assert turn["usage"]["output_tokens"] == usage["output_tokens"] > 0, (turn, usage)
assert turn["usage"]["input_tokens"] == usage["input_tokens"] > 0, (turn, usage)
functions = [
    {"type": "function", "function": {name: tool[name] for name in ("name", "description", "parameters")}}
    for tool in exchange.body["tools"]
    if tool["type"] == "function"
]
assert text == chat(url, model, messages_of(exchange.body), tools=functions), text

code, events = run("no-such-model")
[failed] = [event for event in events if event["type"] == "turn.failed"]
assert code != 0 and "no-such-model" in failed["error"]["message"], failed
print("codex ok")
