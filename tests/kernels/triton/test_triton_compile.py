"""Every Triton kernel compiled offline for GPUs that need not be there, at the shapes of real models.

`compile_shapes.py` says what is compiled, `compile_kernels.py` does it in a process of its own; here the machine code
is asked what it takes: registers, local memory, shared memory, asynchronous loads. By default a part for two GPUs;
`pytest -m slow -k matrix` compiles for all of them, with the Triton that is installed and the oldest that is allowed,
and `pytest -m slow -k everything` every configuration too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("compile_kernels.py")
LIMIT = {"usual": 300, "matrix": 1200, "oldest": 1200, "everything": 7200}  # seconds
# What reads a few numbers of a row, at no alignment, and what a kernel of each kind of weight loads of it in 8 bits.
NARROW = {"greedy._join"}
PACKED = {0: 1, 1: 2, 2: 4, 3: 2}


def triton_folder():
    """Of the Triton that is installed; it brings CUDA's programs along, or the tests are skipped."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    if not all((folder / "backends/nvidia/bin" / name).is_file() for name in ("ptxas", "cuobjdump")):
        pytest.skip("Triton brings no ptxas and cuobjdump here")
    return folder.parent


@pytest.fixture(scope="session")
def oldest_triton():
    """A folder with the oldest Triton that pyproject.toml allows, fetched from the package index."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    version = re.match(r"triton>=([\d.]+)", extras["triton"][0])[1]
    with tempfile.TemporaryDirectory(prefix="sleb-triton-", ignore_cleanup_errors=True) as folder:
        wanted = f"triton=={version}.0" if version.count(".") == 1 else f"triton=={version}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-input",
            "--target",
            folder,
        ]
        done = subprocess.run([*command, wanted], capture_output=True, text=True, check=False, timeout=600)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"{wanted} cannot be fetched: {reason}")
        yield Path(folder)


SLOW = pytest.mark.slow
LEVELS = [
    pytest.param(("usual", "installed"), id="usual"),
    pytest.param(("matrix", "installed"), id="matrix", marks=SLOW),
    pytest.param(("oldest", "oldest"), id="matrix-oldest", marks=SLOW),
    pytest.param(("everything", "installed"), id="everything", marks=SLOW),
    pytest.param(("everything", "oldest"), id="everything-oldest", marks=SLOW),
]


@pytest.fixture(scope="module", params=LEVELS)
def report(request):
    """What was compiled: `kernels` that there are, `records` of launches, `lacking` configurations, `triton`."""
    level, which = request.param
    folder = triton_folder() if which == "installed" else request.getfixturevalue("oldest_triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), environment.get("PYTHONPATH"))))
    command = [sys.executable, PROGRAM, level]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT[level], env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    made = json.loads(result.stdout)
    if which == "oldest":
        assert (folder / f"triton-{made['triton']}.dist-info").is_dir()
    return made


@pytest.fixture
def records(report):
    """Those of launches that compile."""
    return [record for record in report["records"] if "error" not in record]


def refuse(records, message, wrong):
    found = [f"{record['arch']}: {record['label']}: {record}" for record in records if wrong(record)]
    assert not found, f"{message}, {len(found)}:\n" + "\n".join(found[:40])


def test_every_kernel_is_met_for_every_gpu(report):
    for arch in {record["arch"] for record in report["records"]}:
        met = {record["kernel"] for record in report["records"] if record["arch"] == arch}
        assert met == set(report["kernels"]), f"{arch}: tell compile_shapes.py how they are launched"
    assert not report["lacking"], "no configuration is left:\n" + "\n".join(report["lacking"])


def test_every_launch_compiles(report):
    refuse(report["records"], "does not compile", lambda record: "error" in record)


def test_shared_memory_suffices(report, records):
    """For what runs untuned; measuring leaves out what does not fit."""
    refuse(
        records,
        "more shared memory than the GPU has",
        lambda record: record["first"] and record["shared"] > report["cards"][str(record["arch"])],
    )


def test_registers_suffice(report, records):
    """But for a few where there is no wgmma or an older Triton allots them, more of tiles of many rows and of attention
    over chunks, which holds what its items need beside what a walk does, and in float32, which no tensor core takes."""
    newest = tuple(map(int, report["triton"].split(".")[:2])) >= (3, 7)

    def spills(record):
        chunks = record["kernel"].endswith("_prefill")
        wide = chunks or record["kernel"].endswith("_of_experts") or record.get("ROWS", 0) > 64
        allowed = 0 if record["arch"] == 90 and not chunks else 256 if wide else 64
        if not newest or record["label"].startswith("qkv into fp8"):  # the latter once, after the product
            allowed = max(allowed, 16)
        return record.get("PRECISION") != "ieee" and record["stack"] + record["local"] > allowed

    refuse(records, "spills to local memory", spills)


def test_tiles_are_loaded_asynchronously(records):
    """At least two tiles of keys and values, or of the weight, by copies of 16 bytes a thread."""

    def too_few(record):
        if not record["products"] or record.get("num_stages", 3) < 2:
            return False
        tile = 0
        if {"OUTPUTS", "INPUTS", "KIND"} <= record.keys():
            tile = record["OUTPUTS"] * record["INPUTS"] * 2 // PACKED[record["KIND"]]
        elif record["kernel"].endswith("_decode"):
            itemsize = 1 if "*u8" in record["dtypes"] else 2
            tile = 2 * record["BLOCK"] * record["BLOCK_DIM"] * itemsize
        return record["loads"] < max(1, 2 * tile // (16 * 32 * record["num_warps"]))

    refuse(records, "the pipeline is lost", too_few)


def test_what_streams_rows_loads_sixteen_bytes_at_once(records):
    refuse(
        records,
        "no load of 16 bytes",
        lambda record: not record["wide"] and not record["loads"] and record["kernel"] not in NARROW,
    )


def test_no_loop_over_logits_waits_at_a_barrier(report, records):
    """They keep numbers in lanes, and reduce them after the loop."""
    if report["triton"].startswith("3.6."):
        pytest.skip("Triton 3.6 passes a group's pointers between threads through shared memory")
    loops = [record for record in records if record["kernel"] in {"greedy._scan", "sample._sample"}]
    assert {record["kernel"] for record in loops} == {"greedy._scan", "sample._sample"}
    refuse(loops, "a barrier in a loop that loads", lambda record: record["barriers"])


def test_what_starts_early_waits(records):
    """A launch that need not await the end of the one ahead waits in the kernel, and knows how."""
    early = [record for record in records if record.get("launch_pdl")]
    assert early and all(record["arch"] >= 90 for record in early)
    refuse(records, "waits", lambda record: record["waits"] < bool(record.get("launch_pdl")))
    refuse(records, "cannot wait", lambda record: record["waits"] and record["arch"] < 90)


def test_chunks_use_the_widest_products(records):
    chunks = [record for record in records if record["kernel"].endswith("_prefill") and record["arch"] == 90]
    assert chunks
    refuse(chunks, "no wgmma", lambda record: record["products"] != "wgmma" and record["PRECISION"] != "ieee")
