"""The description of the API is true: all checks of schemathesis, in all its phases, over a socket.

Valid requests are accepted and invalid ones refused, by what /openapi.json says; statuses, headers, bodies and events
are as described. The exceptions are in schemathesis.toml and schemathesis_hooks.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine

pytest.importorskip("schemathesis", reason="needs schemathesis, which the extra 'dev' brings")

HERE = Path(__file__).parent
PHASES = ("examples", "coverage", "fuzzing", "stateful")
# As many answers as a request that fits may ask for: prompts times n, in lists as long as schemathesis makes them.
MAX_QUEUE = 100_000
# The formats beside OpenAI's first one share its checks and its fields of sampling: they are met at length only.
OTHER_FORMATS = "^/(v1/messages|api/)"
# So do completions, value by value, with chats.
WITHOUT_COMPLETIONS = """
[[operations]]
include-path = "/v1/completions"
phases.coverage.enabled = false
"""


@pytest.fixture(scope="module")
def engine(tiny_model_dir, tiny_chain, tmp_path_factory):
    """A random model that takes every role, and whose answers end soon: at every other byte."""
    folder = tmp_path_factory.mktemp("brief") / "tiny-llama"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for message in messages %}{{ message['role'] ~ ': ' ~ message['content'] ~ '\n' }}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 256, "eos_token_id": [*range(0, 256, 2), 256, 258]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return Engine(
        EngineConfig(
            model=str(folder),
            layer_map=tiny_chain,
            tiers=(0, 3, 5),
            dtype="float32",
            device="cpu",
            kv_cache_memory=0.05,
            max_num_seqs=64,
        )
    )


def run_schemathesis(server, folder, model, *options, key=None, stream=False, exceptions=""):
    """Runs all phases and asserts that every check passed; returns the report. exceptions: more of the settings."""
    (folder / "schemathesis.toml").write_text((HERE / "schemathesis.toml").read_text("utf-8") + exceptions)
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color"]
    command += ["--config-file", folder / "schemathesis.toml", "run", f"{server.url}/openapi.json"]
    command += ["--report", "json", "--report-json-path", folder / "report.json", "--continue-on-failure"]
    environment = os.environ | {
        "SLEB_SCHEMATHESIS_HOOKS": str(HERE / "schemathesis_hooks.py"),
        "SLEB_SCHEMATHESIS_MODEL": model,
        "SLEB_SCHEMATHESIS_STREAM": "1" if stream else "",
    }
    if key is not None:
        command += ["--header", f"Authorization: Bearer {key}"]
    done = subprocess.run(
        [*map(str, command), *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["complete"], done.stdout
    assert {phase: report["phases"][phase]["status"] for phase in PHASES} == dict.fromkeys(PHASES, "success")
    assert report["operations"]["tested"] == report["operations"]["selected"]
    server.wait_idle()
    return report


def test_real_engine_with_keys(serve_engine, engine, tmp_path):
    server = serve_engine(engine, max_num_seqs=64, max_queue=MAX_QUEUE, api_keys=("key",))
    options = ("--max-examples", "2", "--generation-deterministic", "--exclude-path-regex", OTHER_FORMATS)
    report = run_schemathesis(
        server, tmp_path, "tiny-llama:sleb-3", *options, key="key", exceptions=WITHOUT_COMPLETIONS
    )
    assert report["test_cases"]["generated"] > 1000
    assert not any(report["warnings"].values()), report["warnings"]
    # The exceptions have not become the rule.
    for path in ("/v1/chat/completions", "/v1/responses"):
        rate = report["valid_rates"][f"POST {path}"]["coverage"]
        assert rate["accepted"] > 4 * rate["rejected"]
    engine.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_real_engine_at_length(serve_engine, engine, tmp_path, stream):
    server = serve_engine(engine, max_num_seqs=64, max_queue=MAX_QUEUE)
    run_schemathesis(server, tmp_path, "tiny-llama:sleb-5", "--max-examples", "150", stream=stream)
    engine.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_fake_engine_at_length(serve_engine, fake_engine, tmp_path, stream):
    """Its answers repeat the prompt, and follow no grammar."""
    fake_engine.max_model_len = 100_000
    server = serve_engine(fake_engine, max_num_seqs=64, max_queue=MAX_QUEUE)
    run_schemathesis(server, tmp_path, "fake:sleb-2", "--max-examples", "100", stream=stream)
