"""llm (Simon Willison's command line): an OpenAI-compatible model from its configuration, and a schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, model = sys.argv[1:3]
command = str(Path(sys.executable).parent / "llm")
with tempfile.TemporaryDirectory() as folder:
    entry = {"model_id": "local", "model_name": model, "api_base": url, "supports_schema": True}
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps([entry]))
    environment = os.environ | {"LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [command, "-m", "local", *arguments], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("Say hello.", "-o", "max_tokens", "16").strip()
    answer = json.loads(run("Invent a dog.", "--schema", "name, age int", "-o", "max_tokens", "200"))
    assert {"name", "age"} <= set(answer) and isinstance(answer["age"], int), answer
print("llm ok")
