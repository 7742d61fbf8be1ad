"""guidellm: every request of a benchmark is completed, with the token counts that the server itself gives.

Prompts come from a file, which needs no tokenizer. If TOKENIZER names a model's folder (`sleb fetch smollm2` prints
one), its synthetic data is tried too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NUM_REQUESTS, NUM_STREAMS, OUTPUT_TOKENS = 24, 4, 16

url, model = sys.argv[1].rstrip("/"), sys.argv[2]
command = str(Path(sys.executable).parent / "guidellm")


def count_tokens(body: dict[str, Any]) -> int:
    """The length of a request's prompt, from /tokenize and so independent of any answer's usage."""
    fields = {name: body[name] for name in ("model", "messages", "prompt") if name in body}
    request = urllib.request.Request(
        url.removesuffix("/v1") + "/tokenize",
        json.dumps(fields).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        count: int = json.load(answer)["count"]
    return count


def benchmark(folder: Path, backend: dict[str, Any], data: str, *options: str) -> list[dict[str, Any]]:
    """The statistics of the requests of one run, all of which must have been completed."""
    report = folder / "report.json"
    done = subprocess.run(
        [
            command, "run", "--disable-progress",
            "--backend", json.dumps({"kind": "openai_http", "target": url, "model": model} | backend),
            "--profile", f"kind=concurrent,streams={NUM_STREAMS}",
            "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
            "--data", data, "--output", f"kind=json,path={report}", *options,
        ],
        env=os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = json.loads(report.read_text())["benchmarks"]
    requests = run["requests"]
    assert not requests["errored"] and not requests["incomplete"], requests
    assert len(requests["successful"]) == NUM_REQUESTS, run["metrics"]["request_totals"]
    completed: list[dict[str, Any]] = requests["successful"]
    return completed


def check(requests: list[dict[str, Any]], *, stream: bool, exact: bool) -> None:
    for each in requests:
        assert each["output"], each
        assert each["prompt_tokens"] == count_tokens(json.loads(each["request_args"])["body"]), each
        # Where the data says how long an answer is, guidellm sends ignore_eos.
        produced = each["output_tokens"]
        assert produced == OUTPUT_TOKENS if exact else 0 < produced <= OUTPUT_TOKENS, each
        # A token that is no text yet comes with the next one: never more pieces than tokens.
        if stream:
            assert 1 <= each["info"]["timings"]["token_iterations"] <= produced, each


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    lines = [{"prompt": f"Name {i} things that are blue. " * (i % 5 + 1)} for i in range(NUM_REQUESTS)]
    free, exact = folder / "free.jsonl", folder / "exact.jsonl"
    free.write_text("".join(json.dumps(line) + "\n" for line in lines))
    exact.write_text(
        "".join(json.dumps(line | {"output_tokens_count": OUTPUT_TOKENS}) + "\n" for line in lines)
    )
    for form, stream in ((CHAT, True), (TEXT, True), (CHAT, False)):
        backend = {"request_format": form, "stream": stream}
        check(benchmark(folder, backend, f"kind=json_file,path={exact}"), stream=stream, exact=True)
    backend = {"request_format": CHAT, "max_tokens": OUTPUT_TOKENS}
    check(benchmark(folder, backend, f"kind=json_file,path={free}"), stream=True, exact=False)
    if tokenizer := os.environ.get("TOKENIZER"):
        data = f"kind=synthetic_text,prompt_tokens=48,output_tokens={OUTPUT_TOKENS}"
        options = ("--tokenizer", f"kind=huggingface_auto,model={tokenizer}")
        requests = benchmark(folder, {"request_format": TEXT}, data, *options)
        check(requests, stream=True, exact=True)
        assert all(each["prompt_tokens"] == 48 for each in requests)
print("guidellm ok")
