"""A checkpoint of depth 6 in another engine: vLLM's greedy tokens in float32 are ours. Minutes.

Runs where SLEB_VLLM names the Python of an environment with vLLM (`sleb bench peers --how` says how to make one).
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sleb import LLM, LayerMap, SamplingParams
from sleb.formats.exporting import export_model
from sleb.layer_map.layer_map import shipped_maps

NUM_TOKENS = 48
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, num_tokens, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, dtype="float32", max_model_len=256, enforce_eager=True, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    print("tokens:", json.dumps([list(each.outputs[0].token_ids) for each in outputs]))
"""


@pytest.mark.slow
@pytest.mark.skipif("SLEB_VLLM" not in os.environ, reason="SLEB_VLLM names no Python with vLLM")
@pytest.mark.parametrize("notation", ["hf", "zeroed"])
def test_depth_6_gives_the_same_greedy_text_in_vllm(notation, tmp_path):
    folder = tmp_path / "smaller"
    layer_map = replace(LayerMap.load(shipped_maps()["smollm2-135m-instruct"]), patches=None)
    export_model("smollm2", notation, folder, layer_map=layer_map, depth=6)
    llm = LLM("smollm2", layer_map, [6], dtype="float32", max_model_len=256)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    tokenizer = llm.engine.tokenizer
    prompts = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]
    ours = [output.token_ids for output in llm.generate(prompts, params)]
    assert vllm_tokens(folder, prompts) == ours


def vllm_tokens(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What vLLM generates for token ids."""
    python = os.environ["SLEB_VLLM"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    command = [python, "-c", SCRIPT, str(folder), str(NUM_TOKENS), json.dumps(prompts)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("tokens:")]
    return json.loads(line.removeprefix("tokens:"))
