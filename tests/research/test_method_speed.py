"""The narrow model has lost as many parameters as the blocks had, counted by transformers; the script runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from method_speed import narrow_config
from transformers import LlamaConfig, LlamaForCausalLM

from sleb.benchmarks.old import load
from sleb.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 8, "vocab_size": 32,
}  # fmt: skip


def matrices_of_blocks(config):
    model = LlamaForCausalLM(LlamaConfig(**config))
    return sum(each.numel() for each in model.model.layers.parameters() if each.dim() == 2)


def test_the_share_is_that_of_the_parameters():
    narrow, share = narrow_config(SHAPE, 2)
    assert share == pytest.approx(1 - matrices_of_blocks(narrow) / matrices_of_blocks(SHAPE))
    assert share == pytest.approx(2 / 8, abs=0.03)  # the width is a multiple of 32
    with pytest.raises(ConfigError, match="smaller --count"):
        narrow_config(SHAPE, 8)


@pytest.mark.slow
def test_it_runs(tiny_model_dir, tmp_path):
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "research/method_speed.py"), str(tiny_model_dir), "--count", "1",
            "--batches", "2", "--prompt-tokens", "8", "--output-tokens", "2", "--repetitions", "1",
            "--max-repetitions", "1", "--json", str(tmp_path / "out.json"),
        ],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(each.case, each.subject): each for each in load(tmp_path / "out.json").measurements}
    cases = ("prompt 1 × 8", "generate 2 × 2 after 64")
    assert set(found) == {(case, subject) for case in cases for subject in ("dense", "blocks", "width")}
    assert all((each.ratio is None) == (subject == "dense") for (_, subject), each in found.items())
