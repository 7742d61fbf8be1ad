"""Over HTTP: a request whose logits are not numbers gets an error, streamed or not, and the server goes on."""

from __future__ import annotations

import json
import shutil

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine

POISON = "~"  # the embedding of this byte is NaN
CODE = "invalid_model_output"


@pytest.fixture(scope="module")
def url(tiny_model_dir, tmp_path_factory, start_server):
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("poisoned") / "tiny-llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][ord(POISON)] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = EngineConfig(model=str(folder), dtype="float32", device="cpu", kv_cache_memory=0.01)
    running = start_server(Engine(config), max_num_seqs=8)
    yield running.url
    running.wait_idle()
    running.close()


BODIES = {
    "chat": ("chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]}),
    "sampled": (
        "chat/completions",
        lambda text: {"messages": [{"role": "user", "content": text}], "temperature": 1.0, "n": 2},
    ),
    "json": (
        "chat/completions",
        lambda text: {
            "messages": [{"role": "user", "content": text}],
            "response_format": {"type": "json_object"},
        },
    ),
    "completion": ("completions", lambda text: {"prompt": text}),
    "several": ("completions", lambda text: {"prompt": ["good", text]}),
    "echo": ("completions", lambda text: {"prompt": text, "echo": True, "logprobs": 1}),
    "score": ("completions", lambda text: {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", list(BODIES))
def test_an_error_and_then_a_healthy_answer(kind, stream, url):
    path, make = BODIES[kind]

    def ask(text):
        body = {"max_tokens": 6, "temperature": 0, "stream": stream} | make(text)
        return httpx.post(f"{url}/v1/{path}", json=body, timeout=30)

    before = failures(url)
    refused = ask(f"ab{POISON}c")
    if stream:
        assert refused.status_code == 200
        events = [line[6:] for line in refused.text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        error = json.loads(events[-2])["error"]
        assert not any("finish_reason" in event and '"stop"' in event for event in events)
    else:
        assert refused.status_code == 500
        error = refused.json()["error"]
    assert error["code"] == CODE and error["type"] == "server_error" and "not numbers" in error["message"]
    assert failures(url) == before + 1
    assert httpx.get(f"{url}/health").status_code == 200
    answered = ask("abc")
    assert answered.status_code == 200 and "error" not in answered.text and "NaN" not in answered.text
    if not stream:
        assert all(choice["finish_reason"] in ("length", "stop") for choice in answered.json()["choices"])


def failures(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("sleb:request_failure_total") and CODE in line]
    return float(found[0].split()[-1]) if found else 0.0
