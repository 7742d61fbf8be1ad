"""opencode: `opencode run` with a custom provider over chat completions; what it shows is what was streamed to it."""

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
config = {
    "provider": {
        "sleb": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": recorder.url, "apiKey": "none"},
            "models": {model: {"temperature": True, "limit": {"context": 8192, "output": 256}}},
        }
    },
    "model": f"sleb/{model}",
    "small_model": f"sleb/{model}",
    # A small model's context has no room for a coding agent's own prompt and tools.
    "agent": {"brief": {"mode": "primary", "prompt": "Be brief.", "temperature": 0, "tools": {"*": False}}},
    "share": "disabled",
    "autoupdate": False,
}
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "opencode.json").write_text(json.dumps(config))
    done = subprocess.run(
        ["opencode", "run", "--agent", "brief", "--format", "json", QUESTION],
        cwd=folder,
        env=os.environ | {"PWD": folder, "OPENCODE_DISABLE_MODELS_FETCH": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
assert done.returncode == 0, done.stdout + done.stderr
events = [json.loads(line) for line in done.stdout.splitlines()]
shown = "".join(event["part"]["text"] for event in events if event["type"] == "text")
exchanges = recorder.posted("/v1/chat/completions")
asked = [each for each in exchanges if each.body["messages"][0]["content"].startswith("Be brief.")]
assert len(asked) == 1 and asked[0].body["stream"], [each.body for each in exchanges]
chunks = asked[0].events()
text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
assert shown and shown.strip() == text.strip() == chat(url, model, asked[0].body["messages"]).strip(), (
    done.stdout
)
[finish] = [event["part"] for event in events if event["type"] == "step_finish"]
usage = next(chunk["usage"] for chunk in chunks if chunk.get("usage"))
assert finish["tokens"]["output"] == usage["completion_tokens"] > 0, (finish, usage)
print("opencode ok")
