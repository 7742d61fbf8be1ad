"""The C kernels' threads under ThreadSanitizer: steps of mixed lengths and depths at every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sleb.kernels.cpu import build, library
from sleb.kernels.cpu.features import cpu_features

LEVELS = {
    "none": [],
    "avx512": ["avx512"],
    "avx512bf16": ["avx512", "avx512bf16", library.EMULATED],
    "amx": ["avx512", "avx512bf16", library.EMULATED],
}[cpu_features().level]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LEVELS, reason="the C kernels need AVX-512 with VNNI"),
]

# More threads than cores, so that the system interrupts them anywhere. Random weights, chunks, three depths,
# greedy and sampled tokens.
SOAK = """
import random, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from sleb import LLM, LayerMap, SamplingParams
from sleb.kernels.cpu import library
from sleb.layer_map.layer_map import Unit
shared, folder, level, weights = sys.argv[1:]
library.find_library = lambda: Path(shared)
library.isa_level = lambda: level
chain = LayerMap(model="tiny", fingerprint=None, num_blocks=5, removed=tuple(map(Unit, (4, 1, 3))))
llm = LLM(folder, chain, (0, 1, 3), dtype="bfloat16", weights=weights, load_format="dummy", kernels="cpu",
          threads=4, max_num_batched_tokens=150, max_num_seqs=24)
rng = random.Random(1)
for count in (1, 3, 24, 2, 40):
    prompts = [[rng.randrange(3, 90) for _ in range(rng.choice([1, 5, 17, 44]))] for _ in range(count)]
    depths = [rng.choice([0, 1, 3]) for _ in prompts]
    params = [SamplingParams(temperature=rng.choice([0.0, 1.0]), top_k=5, max_tokens=8, ignore_eos=True,
                             prompt_logprobs=rng.choice([None, 0]), seed=1) for _ in prompts]
    llm.generate(prompts, params, depths)
llm.engine.check_integrity()
print("soaked", llm.engine.stats().num_output_tokens)
"""


@pytest.fixture(scope="module")
def sanitised(tmp_path_factory):
    """The kernels compiled with ThreadSanitizer, and its runtime."""
    compiler = build.find_compiler()
    runtime = subprocess.run(
        [*compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no ThreadSanitizer")
    path = tmp_path_factory.mktemp("tsan") / "libsleb_cpu.so"
    command = [*compiler, *("-O1", "-g", "-fsanitize=thread", "-std=gnu11", "-fPIC", "-shared", "-pthread")]
    command += ["-fno-math-errno", "-fvisibility=hidden", '-DSLEB_SOURCE_KEY="tsan"', "-o", str(path)]
    command += [*(str(file) for file in build.source_files() if file.suffix == ".c"), "-lm"]
    subprocess.run(command, check=True)
    return path, runtime


HERE = Path(__file__).resolve().parent
FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")  # as sleb_cpu.h numbers them
RACE = 66


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    """race_soak.c with the kernels, masked loads and stores made visible to ThreadSanitizer."""
    path = tmp_path_factory.mktemp("soak") / "race_soak"
    command = [*build.find_compiler(), *("-O1", "-g", "-fsanitize=thread", "-std=gnu11", "-pthread")]
    command += ["-fno-math-errno", '-DSLEB_SOURCE_KEY="tsan"', "-include", str(HERE / "race_shim.h")]
    command += ["-I", str(build.SOURCES), str(HERE / "race_soak.c")]
    command += [*(str(file) for file in build.source_files() if file.suffix == ".c"), "-lm", "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "libtsan" in done.stderr or "-fsanitize" in done.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.parametrize("number", range(len(FORMATS)), ids=FORMATS)
@pytest.mark.parametrize("level", LEVELS)
def test_no_data_race_and_the_same_bits_twice(level, number, soak):
    """Without torch: contexts of up to 1100 tokens that are split between threads, and sampled tokens."""
    steps = "40" if level == library.EMULATED else "100"
    environment = os.environ | {"TSAN_OPTIONS": f"exitcode={RACE} halt_on_error=1"}
    done = subprocess.run(
        [str(soak), level, str(number), "4", steps],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout[:6]) == (0, "soaked"), done.stderr[:4000]


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("level", LEVELS)
def test_no_data_race(level, weights, sanitised, tiny_model):
    path, runtime = sanitised
    arguments = [str(path), str(tiny_model("llama-gqa").path), level, weights]
    environment = os.environ | {"LD_PRELOAD": runtime, "TSAN_OPTIONS": "exitcode=66"}
    done = subprocess.run(
        [sys.executable, "-c", SOAK, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    ours = [report for report in done.stderr.split("==================") if "sleb_" in report]
    assert "soaked" in done.stdout, done.stderr[-3000:]
    assert not ours, ours[0][:3000]
