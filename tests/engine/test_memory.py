"""What is free, from the files in which Linux says so; and what is larger is refused in one line before it is taken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sleb.engine import memory
from sleb.engine.memory import GIB, Free, check_fits, free_memory, refusal_told
from sleb.errors import ConfigError, ModelError

CPU = torch.device("cpu")
MEMINFO = "MemTotal: 64 kB\nMemAvailable:   20971520 kB\nHugePages_Total:  3\nSwapFree: 1048576 kB\n"


@pytest.fixture
def system(tmp_path):
    """system(files): a root with /proc/meminfo of 20 GiB, 1 GiB of swap space, and these files."""

    def make(**files):
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def group(folder, version, limit, used, files):
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    stat = "total_inactive_file" if version == 1 else "inactive_file"
    return {
        f"{folder}/{names[0]}": f"{limit}\n",
        f"{folder}/{names[1]}": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\n{stat} {files}\nkernel_{stat} 77\n",
    }


def test_the_machine(system):
    root = system()
    assert free_memory(CPU, root=root) == Free(20 * GIB, "this machine")
    assert free_memory(CPU, swap=True, root=root).num_bytes == 21 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_limit_of_the_control_groups_above(version, system):
    top = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    line = "0::/a/b" if version == 2 else "5:cpu:/\n4:memory:/a/b\n0::/"
    root = system(
        **{"proc/self/cgroup": f"{line}\n"},
        **group(f"{top}/a/b", version, 8 * GIB, 2 * GIB, 0),
        **group(f"{top}/a", version, 4 * GIB, 3 * GIB, GIB // 2),
    )
    free = free_memory(CPU, swap=True, root=root)
    assert free.num_bytes == GIB * 3 // 2 and "control group" in free.of


def test_a_container_whose_path_is_that_outside_and_one_without_a_limit(system):
    root = system(
        **{"proc/self/cgroup": "0::/../../docker/x\n"}, **group("sys/fs/cgroup", 2, 6 * GIB, GIB, 0)
    )
    assert free_memory(CPU, root=root).num_bytes == 5 * GIB
    (root / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert free_memory(CPU, root=root).of == "this machine"
    (root / "proc/self/cgroup").write_text("nonsense\n")
    assert free_memory(CPU, root=root).of == "this machine"


@pytest.fixture
def little(monkeypatch):
    """A machine with 40 KiB of free memory."""
    monkeypatch.setattr(memory, "free_memory", lambda *_args, **_options: Free(40 << 10, "this machine"))


class TestTooLarge:
    @pytest.mark.parametrize("load_format", ["auto", "dummy"])
    def test_weights(self, load_format, tiny_model, make_llm, little, monkeypatch):
        model, empty = tiny_model("llama-gqa"), torch.empty

        def on_meta_alone(*args, device=None, **options):
            assert str(device) == "meta", "memory was taken"
            return empty(*args, device=device, **options)

        monkeypatch.setattr(torch, "empty", on_meta_alone)
        with pytest.raises(ModelError) as caught:
            make_llm(model, load_format=load_format)
        text = str(caught.value)
        for part in (
            "weights take",
            "this machine has",
            "--dtype bfloat16",
            "--weights int8",
            "--weights int4",
            "--tiers",
        ):
            assert part in text
        assert text.isprintable()

    def test_sizes_by_hand(self, tmp_path, little):
        """OPT-30B: 48 blocks, 7168 features: 12 h² + 13 h weights a block, table and positions, the last norm."""
        from sleb import LLM
        from sleb.models.shapes import shape_folder

        with pytest.raises(ModelError) as caught:
            LLM(shape_folder("opt-30b"), load_format="dummy", device="cpu")
        h = 7168
        count = 48 * (12 * h * h + 13 * h) + (50272 + 2050) * h + 2 * h
        assert f"weights take {count * 2 / GIB:.2f} GiB" in str(caught.value)

    def test_the_kv_cache(self, tiny_model, make_llm):
        with pytest.raises(ConfigError, match=r"KV cache takes .* GiB, but .* free: lower --kv-cache-memory"):
            make_llm(tiny_model("llama-gqa"), kv_cache_memory=1e6, max_num_seqs=10**9)

    def test_a_kv_cache_that_is_asked_for_but_not_needed_is_no_matter(self, tiny_model, make_llm):
        assert make_llm(tiny_model("llama-gqa"), kv_cache_memory=1e6).engine.runner.num_pages == 8 * 16

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
            ),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_what_the_system_refuses_all_the_same(self, error):
        with (
            pytest.raises(
                ModelError, match=r"gives no memory for weights of 3 GiB; .* free: use less"
            ) as caught,
            refusal_told("weights of 3 GiB", CPU, "use less"),
        ):
            raise error
        assert "\n" not in str(caught.value)

    def test_other_faults_stay_what_they_are(self):
        with pytest.raises(RuntimeError, match="shapes"), refusal_told("weights", CPU, ""):
            raise RuntimeError("shapes differ")

    def test_torch_says_what_is_looked_for(self):
        with pytest.raises(ModelError), refusal_told("a tensor", CPU, ""):
            torch.empty(1 << 60, dtype=torch.uint8)

    def test_what_fits_is_not_refused(self):
        check_fits("a tensor takes", 1 << 20, CPU, "", ConfigError)


@pytest.mark.slow
def test_a_limit_of_the_shell(tiny_model, tmp_path):
    """`ulimit -v`, as the command line meets it."""
    folder = Path(shutil.copytree(tiny_model("llama-gqa").path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    changes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    changes |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config | changes))
    options = "--load-format dummy --prompt-tokens 8 --output-tokens 8"
    command = f"ulimit -v 8000000; exec {sys.executable} -m sleb bench throughput {folder} {options}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "ulimit -v has" in done.stderr and "--weights int4" in done.stderr
