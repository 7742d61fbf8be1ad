"""The scripts of research/ on a tiny model, as commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sleb.benchmarks.old import load
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.patches import Patch, Patches
from sleb.layer_map.units import Unit

pytestmark = pytest.mark.slow  # each is a process that searches; lint and types cover them by default

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, *arguments: object, status: int = 0) -> str:
    """What a script says on both outputs."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "research" / f"{name}.py"), *map(str, arguments)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def texts(tmp_path):
    paths = (tmp_path / "one.txt", tmp_path / "two.txt")
    for number, path in enumerate(paths):
        codes = torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(number)).tolist()
        path.write_text("".join(map(chr, codes)))
    return paths


def test_compare(tiny_model_dir, texts, tmp_path):
    """Maps, one with patches, and every rule: what each depth gives, and speed beside it."""
    removed = (Unit(2), Unit(3), Unit(1, "attention"))
    plain = LayerMap("tiny-llama", None, 6, removed)
    plain.save(tmp_path / "plain.json")
    shift = {"scale": np.zeros(32, np.float32), "bias": np.ones(32, np.float32)}
    patch = Patch((2, "attention"), (3, "mlp"), 2, None, "scale", False, shift)
    replace(plain, patches=Patches.of([patch])).save(tmp_path / "patched.json")
    path, maps = tmp_path / "compared.json", f"{tmp_path / 'plain.json'},{tmp_path / 'patched.json'}"
    arguments = (
        tiny_model_dir, "--calibration", texts[0], "--text", texts[1], "--maps", maps,
        "--depths", "1,2", "--seqlen", "100", "--windows", "6", "--text-windows", "3", "--output-tokens", "3",
        "--device", "cpu", "--repetitions", "1", "--max-repetitions", "1",
    )  # fmt: skip
    more = ("--rules", "shortgpt,run,replaceme", "--json", path, "--plot", tmp_path / "plot")
    shown = run_script("compare", *arguments, *more)
    assert "two perplexity" in shown
    result = load(path)
    rows = {each.key: each for each in result.measurements}
    ways = ("plain", "patched", "shortgpt", "run", "replaceme")
    subjects = {("dense", "depth 0"), *((way, f"depth {depth}") for way in ways for depth in (1, 2))}
    metrics = ("two perplexity", "looped", "decode tokens/s", "prompt tokens/s")
    assert set(rows) == {(*subject, metric) for subject in subjects for metric in metrics}
    assert all(each.value is not None for each in rows.values())
    for way in ("patched", "run"):
        assert rows[way, "depth 1", "decode tokens/s"].facts["speed of"] == "plain 1"
    assert "speed of" not in rows["patched", "depth 2", "decode tokens/s"].facts
    assert (
        rows["run", "depth 2", "two perplexity"].value != rows["replaceme", "depth 2", "two perplexity"].value
    )
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert str(tmp_path) not in json.dumps(json.loads(path.read_text()))
    assert "known are" in run_script("compare", *arguments, "--rules", "guess", status=2)


def test_formats(tiny_model_dir, texts, tmp_path):
    """Each map in each format of weights; one that is quantised here is near the model that it was."""
    folder, path = tmp_path / "tiny-llama", tmp_path / "compared.json"
    shutil.copytree(tiny_model_dir, folder)
    config = LlamaConfig.from_pretrained(folder, intermediate_size=64)  # whole groups of 32
    LlamaForCausalLM(config).save_pretrained(folder)
    LayerMap("tiny-llama", None, 6, (Unit(2), Unit(3))).save(tmp_path / "plain.json")
    run_script(
        "compare", folder, "--calibration", texts[0], "--text", texts[1], "--maps", tmp_path / "plain.json",
        "--formats", "float32,awq", "--group-size", "32", "--depths", "1", "--seqlen", "100", "--windows", "6",
        "--text-windows", "3", "--output-tokens", "3", "--device", "cpu", "--repetitions", "1",
        "--max-repetitions", "1", "--json", path,
    )  # fmt: skip
    rows = {each.key: each.value for each in load(path).measurements}
    cases = {case for case, _, _ in rows}
    assert cases == {"dense float32", "dense awq", "plain float32", "plain awq"}
    exact, near = (rows[f"dense {form}", "depth 0", "two perplexity"] for form in ("float32", "awq"))
    assert near != exact and near == pytest.approx(exact, rel=0.2)
