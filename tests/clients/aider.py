"""aider: a question about a repository, and a request for a change, each as one `--message`.

What it shows is what came over the wire, and that is the greedy answer of the messages that it sent.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[0] += "/common"  # and so not this file, which has the package's name

from plain import Recorder, chat

url, model = sys.argv[1:3]
recorder = Recorder(url)
command = str(Path(sys.executable).parent / "aider")


def run(folder: str, *options: str) -> str:
    done = subprocess.run(
        [
            command, "--model", f"openai/{model}", "--openai-api-base", recorder.url, "--openai-api-key", "none",
            "--no-analytics", "--no-check-update", "--no-show-release-notes", "--no-show-model-warnings",
            "--no-pretty", "--no-fancy-input", "--yes-always", "--no-auto-commits", "--no-suggest-shell-commands",
            "--map-tokens", "0", *options,
        ],
        cwd=folder, env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


with tempfile.TemporaryDirectory() as folder:
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    Path(folder, "hello.py").write_text('print("hello")\n')
    for options in (
        ("--chat-mode", "ask", "--message", "What does this print?", "hello.py"),
        ("--edit-format", "whole", "--message", "Make it print goodbye.", "hello.py"),
        ("--no-stream", "--chat-mode", "ask", "--message", "What does this print?", "hello.py"),
    ):
        recorder.exchanges.clear()
        shown = run(folder, *options)
        exchange = recorder.posted("/v1/chat/completions")[0]
        assert exchange.body["temperature"] == 0, exchange.body
        told = chat(url, model, exchange.body["messages"])
        if exchange.body.get("stream"):
            events = exchange.events()
            text = "".join(
                event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]
            )
            assert text == told, (text, told)
        assert " ".join(told.split()[:8]) in " ".join(shown.split()), (shown, told)
print("aider ok")
