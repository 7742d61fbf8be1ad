"""promptfoo: evaluations over chat completions (of two depths), Responses and messages; text, and JSON by a schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path[0] += "/common"

from plain import chat

url, model = sys.argv[1:3]
with urllib.request.urlopen(url + "/models", timeout=30) as answer:
    tiers = [card["id"] for card in json.load(answer)["data"] if card["id"].startswith(model)][:2]
schema = {
    "type": "object",
    "properties": {"country": {"type": "string"}, "capital": {"type": "string"}},
    "required": ["country", "capital"],
    "additionalProperties": False,
}
PROMPT = "What is the capital of {{country}}?"
common = {"apiBaseUrl": url, "apiKey": "none", "temperature": 0, "max_tokens": 120}
form = {"type": "json_schema", "json_schema": {"name": "capital", "strict": True, "schema": schema}}
anthropic = {"apiBaseUrl": url.removesuffix("/v1"), "apiKey": "none", "temperature": 0, "max_tokens": 120}


def evaluate(providers: list[dict[str, object]], check: dict[str, object]) -> list[dict[str, object]]:
    """The results of a question about two countries, all of which must pass `check`."""
    with tempfile.TemporaryDirectory() as folder:
        tests = [{"vars": {"country": country}, "assert": [check]} for country in ("France", "Japan")]
        config = {"prompts": [PROMPT], "providers": providers, "tests": tests}
        Path(folder, "promptfooconfig.yaml").write_text(json.dumps(config))  # JSON is YAML
        quiet = {
            "PROMPTFOO_DISABLE_TELEMETRY": "1",
            "PROMPTFOO_DISABLE_UPDATE": "1",
            "PROMPTFOO_CONFIG_DIR": folder,
        }
        done = subprocess.run(
            ["promptfoo", "eval", "--no-cache", "--no-table", "--no-progress-bar", "--output", "out.json"],
            cwd=folder, env=os.environ | quiet, capture_output=True, text=True, timeout=250,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        results: list[dict[str, object]] = json.loads(Path(folder, "out.json").read_text())["results"][
            "results"
        ]
    assert len(results) == 2 * len(providers) and all(result["success"] for result in results), results
    return results


limit = {"max_output_tokens": 120}
plain = [
    *({"id": f"openai:chat:{tier}", "label": f"chat {tier}", "config": common} for tier in tiers),
    {"id": f"openai:responses:{model}", "label": f"responses {model}", "config": common | limit},
    {"id": f"anthropic:messages:{model}", "label": f"messages {model}", "config": anthropic},
]
for result in evaluate(plain, {"type": "regex", "value": r"\w+"}):
    name = result["provider"]["label"].split()[1]
    assert result["response"]["output"] == chat(
        url, name, PROMPT.replace("{{country}}", result["vars"]["country"])
    )
    assert result["response"]["tokenUsage"]["completion"] > 0, result["response"]
typed = [{"id": f"openai:chat:{model}", "config": common | {"response_format": form}}]
evaluate(typed, {"type": "is-json", "value": schema})
print("promptfoo ok")
