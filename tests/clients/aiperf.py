"""aiperf: short profiles by every format that it knows: every request is completed, its tokens counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_REQUESTS, OUTPUT_TOKENS = 12, 16
url, model = sys.argv[1:3]
command = str(Path(sys.executable).parent / "aiperf")


def profile(kind: str, *options: str) -> dict[str, dict[str, float]]:
    # A response that its limit cuts ends with response.incomplete, whose usage aiperf 0.13 does not read.
    counts = [] if kind == "responses" else ["--use-server-token-count"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                command, "profile", "--model", model, "--url", url.removesuffix("/v1"), "--endpoint-type", kind,
                "--concurrency", "4", "--request-count", str(NUM_REQUESTS), "--tokenizer", os.environ["TOKENIZER"],
                "--synthetic-input-tokens-mean", "48", "--output-tokens-mean", str(OUTPUT_TOKENS),
                "--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0",
                "--workers-max", "1", "--record-processors", "1", "--ui", "none",
                "--artifact-dir", folder, *counts, *options,
            ],
            cwd=folder, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        [report] = Path(folder).rglob("profile_export_aiperf.json")
        figures: dict[str, dict[str, float]] = json.loads(report.read_text())
    assert figures["request_count"]["avg"] == NUM_REQUESTS and not figures.get("error_request_count"), figures
    counted = figures["output_sequence_length"]["avg"]
    assert counted == OUTPUT_TOKENS or (not counts and 0 < counted <= OUTPUT_TOKENS), counted
    return figures


for kind in ("chat", "completions", "responses", "messages"):
    streamed = profile(kind, "--streaming")
    assert 0 < streamed["time_to_first_token"]["avg"] < streamed["request_latency"]["avg"]
    assert streamed["inter_token_latency"]["avg"] > 0
assert profile("chat")["output_token_throughput"]["avg"] > 0
print("aiperf ok")
