"""Claude Code: `claude -p` over Anthropic's messages; what it shows is what was streamed to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

sys.path[0] += "/common"

from plain import QUESTION, Recorder

url, model = sys.argv[1:3]
recorder = Recorder(url)


def run(name: str, *options: str) -> tuple[int, dict[str, object]]:
    environment = {
        "ANTHROPIC_BASE_URL": recorder.root,
        "ANTHROPIC_API_KEY": "none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "CLAUDE_CODE_MAX_RETRIES": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            # A small model's context has no room for a coding agent's own prompt and all of its tools.
            [
                "claude", "--bare", "-p", QUESTION, "--system-prompt", "Be brief.", "--model", name,
                "--output-format", "json", *options,
            ],
            cwd=folder, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=250,
        )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def flat(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "\n".join(block["text"] for block in content)


code, shown = run(model, "--tools", "")
assert code == 0 and not shown["is_error"], shown
exchange = recorder.posted("/v1/messages")[-1]
events = exchange.events()
assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop", events
deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
text = "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta")
assert text and shown["result"] == text.strip(), (shown, text)
[final] = [event for event in events if event["type"] == "message_delta"]
assert shown["usage"]["output_tokens"] == final["usage"]["output_tokens"] > 0, (shown, final)
assert shown["stop_reason"] == final["delta"]["stop_reason"] == "end_turn", (shown, final)

code, shown = run(model, "--tools", "Read")  # its schema is a large one's
assert code == 0 and recorder.posted("/v1/messages")[-1].body["tools"][0]["name"] == "Read", shown

code, shown = run("no-such-model", "--tools", "")
assert shown["is_error"] and shown["api_error_status"] == 404, shown
print("claude-code ok")
