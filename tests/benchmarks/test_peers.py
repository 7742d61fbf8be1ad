"""Peers in turns: parsing, pairing, targets, the worker's protocol with a fake engine, idleness on a fake /proc."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sleb.benchmarks import idle, peer_engines, peer_measure, peer_process, peers
from sleb.benchmarks.idle import (
    CpuTicks,
    OthersWatch,
    ProcessTicks,
    QuietPolicy,
    run_quietly,
    wait_until_idle,
)
from sleb.benchmarks.mixed import MixedOptions, MixedRepetition, run_mixed, summarise
from sleb.benchmarks.peer_engines import LlamaCpp, vllm_environment
from sleb.benchmarks.peer_measure import PeerOptions
from sleb.benchmarks.peer_options import (
    TARGETS,
    PeerSpec,
    PeerTest,
    Target,
    plan_rounds,
    shown_arguments,
    tokens_per_second,
)
from sleb.benchmarks.peer_process import PeerError, Worker
from sleb.benchmarks.peer_results import (
    Repetition,
    Turn,
    compare,
    floor_shares,
    judge,
    judge_floor,
    judge_memory,
)
from sleb.errors import ConfigError
from sleb.layer_map import LayerMap

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="peers are measured on Linux")

AT_ONCE = QuietPolicy(wait_seconds=0.0, limit=1.0, retries=0)

FAKE_ENGINE = """
import os, subprocess, sys, time

class Engine:
    def __init__(self, tokens_per_second=1000.0, spin=False, child=None, **options):
        if options.get("weight_format") == "broken":
            raise ValueError("no such format")
        print("a library that prints to standard output")
        if child:
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            open(child, "w").write(str(process.pid))
        if spin:
            import threading
            def burn():
                while True: pass
            threading.Thread(target=burn, daemon=True).start()
        self.facts = {"version": "1", "environment": {"cpu": "x"}, "decode_bytes_per_token": 1e6}
        self.facts["options"] = sorted(options)
        self.rate = tokens_per_second

    def run(self, prompts, max_tokens):
        if sum(map(len, prompts)) == 13: os._exit(3)
        tokens = len(prompts) * max_tokens
        return {"seconds": tokens / self.rate, "num_tokens": tokens, "token_ids": [7] * max_tokens}

    def read(self, num_bytes):
        return {"gb_per_second": 2.0}
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


def test_rates_count_what_the_test_says() -> None:
    assert tokens_per_second(PeerTest.parse("decode-1"), 2.5, 0.5) == pytest.approx(127 / 2.0)
    assert tokens_per_second(PeerTest.parse("decode-8"), 2.0, 0.0) == pytest.approx(8 * 128 / 2.0)
    assert tokens_per_second(PeerTest.parse("prompt-512"), 0.25, 0.0) == pytest.approx(2048)


def test_peers_are_parsed_and_their_paths_checked(tmp_path: Path) -> None:
    python, gguf = tmp_path / "python", tmp_path / "m.gguf"
    python.symlink_to(sys.executable)
    gguf.touch()
    assert PeerSpec.parse(f"vllm={python}") == PeerSpec("vllm", python)  # the link itself, not its end
    assert PeerSpec.parse(f"openvino={python}:{tmp_path}").models == (("bf16", tmp_path),)
    llama = PeerSpec.parse(f"llamacpp={tmp_path}:bf16={gguf},q4_1={gguf}")
    assert llama.contestants == ("llamacpp-bf16", "llamacpp-q4_1")
    bad = ["vllm", "vllm=", "sglang=x", f"openvino={python}", f"llamacpp={tmp_path}", "vllm=/nowhere/python"]
    bad += [f"llamacpp={tmp_path}:q2={gguf}", f"llamacpp={tmp_path}:bf16=/nowhere.gguf"]
    for text in bad:
        with pytest.raises(ConfigError):
            PeerSpec.parse(text)


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


def test_each_format_meets_its_counterpart_and_in_batches_all_of_llama_cpp() -> None:
    contestants = ("vllm", "llamacpp-bf16", "llamacpp-q8_0", "llamacpp-q4_1")
    formats = ("bf16", "int8", "int4")

    def met(test: str) -> dict[str, tuple[str, ...]]:
        return {each.peer: each.formats for each in plan_rounds(PeerTest.parse(test), formats, contestants)}

    alone = {"llamacpp-bf16": ("bf16",), "llamacpp-q8_0": ("int8",), "llamacpp-q4_1": ("int4",)}
    assert met("decode-1") == {"vllm": ("bf16",)} | alone == met("prompt-512")
    quantised = ("int8", "int4")
    assert met("decode-8") == {
        "vllm": ("bf16",),
        "llamacpp-bf16": formats,
        "llamacpp-q8_0": quantised,
        "llamacpp-q4_1": quantised,
    }
    assert plan_rounds(PeerTest.parse("decode-1"), ("int8",), ("vllm",)) == []


def test_ratios_are_taken_within_a_repetition() -> None:
    """The machine halves its speed in the second repetition: the ratio does not notice."""
    rounds = [
        {"vllm": {"vllm": turn(100.0), "sleb-bf16": turn(200.0)}},
        {"vllm": {"vllm": turn(50.0), "sleb-bf16": turn(110.0)}},
        {"vllm": {"vllm": turn(100.0), "sleb-bf16": turn(210.0, disturbed=True)}},
    ]
    (row,) = compare({PeerTest.parse("decode-8"): [Repetition(each, []) for each in rounds]})
    assert row.ratio_samples == pytest.approx([2.0, 2.2, 2.1])
    assert (row.ratio, row.ratio_low, row.ratio_high) == pytest.approx((2.1, 2.0, 2.2))
    assert (row.test, row.weight_format, row.peer) == ("decode-8", "bf16", "vllm")
    assert (row.repetitions, row.disturbed, row.rate, row.peer_rate_low) == (3, 1, 200.0, 50.0)


def rows_of(test: str, ratios: dict[tuple[str, str], float]) -> list[Any]:
    rounds: dict[str, dict[str, Turn]] = {}
    for (weight_format, peer), ratio in ratios.items():
        rounds.setdefault(peer, {peer: turn(10.0)})[f"sleb-{weight_format}"] = turn(10.0 * ratio)
    return compare({PeerTest.parse(test): [Repetition(rounds, [])]})


def test_a_target_asks_our_best_format_against_the_best_peer() -> None:
    target = Target("decode-8", ("int8", "int4"), ("a", "b"), 2.0)
    ratios = {("int8", "a"): 3.0, ("int8", "b"): 1.9, ("int4", "a"): 2.1, ("int4", "b"): 5.0}
    verdict = judge(target, rows_of("decode-8", ratios))
    assert verdict.measured == pytest.approx(2.1) and verdict.met is True
    assert "int4 against a" in verdict.what
    assert judge(target, rows_of("decode-8", ratios | {("int4", "a"): 1.95})).met is False
    del ratios["int4", "b"]
    assert judge(target, rows_of("decode-8", ratios)).met is None
    assert judge(target, rows_of("decode-1", ratios)).met is None


def test_every_target_can_be_measured() -> None:
    """Each pair that a target names meets in a round of its test."""
    contestants = ("vllm", "openvino", "transformers", "llamacpp-bf16", "llamacpp-q8_0", "llamacpp-q4_1")
    for target in TARGETS:
        rounds = plan_rounds(PeerTest.parse(target.test), ("bf16", "int8", "int4"), contestants)
        pairs = {(weight_format, each.peer) for each in rounds for weight_format in each.formats}
        assert {(ours, peer) for ours in target.formats for peer in target.peers} <= pairs


def test_the_floor_and_the_memory_are_judged() -> None:
    rounds = {"x": {"x": turn(1.0), "sleb-bf16": turn(90.0)}, "y": {"y": turn(1.0), "sleb-bf16": turn(80.0)}}
    samples = {PeerTest.parse("decode-1"): [Repetition(rounds, [9.0, 10.0, 11.0])]}
    shares = floor_shares(samples, "bf16", bytes_per_token=1e8)
    assert shares == pytest.approx([0.85])
    assert judge_floor(shares).met is True and judge_floor([0.7]).met is False
    assert judge_floor([]).met is None and floor_shares(samples, "int8", 1e8) == []

    def memory(own: int, other: int) -> bool | None:
        return judge_memory({"sleb-bf16": {"peak_rss": own}, "vllm": {"peak_rss": other}}).met

    assert (memory(50, 100), memory(51, 100)) == (True, False)
    assert judge_memory({"sleb-bf16": {"peak_rss": 5}}).met is None


def test_a_worker_answers_in_lines_whatever_its_library_prints(start: Callable[[], Worker]) -> None:
    worker = start()
    worker.load(threads=2)
    assert worker.facts["options"] == ["threads"]
    answer = worker.call("run", prompts=[[1, 2]], max_tokens=3)
    assert answer == {"seconds": 3 / 1000, "num_tokens": 3, "token_ids": [7, 7, 7]}


def test_a_worker_s_failure_comes_with_its_log(start: Callable[[], Worker]) -> None:
    with pytest.raises(PeerError, match="ValueError: no such format") as caught:
        start().load(weight_format="broken")
    assert caught.value.engine == "fake" and "standard output" not in str(caught.value).split("\n")[0]
    worker = start()
    worker.call("load")
    with pytest.raises(PeerError, match="ended"):
        worker.call("run", prompts=[[0] * 13], max_tokens=1)
    with pytest.raises(PeerError):
        worker.call("run", prompts=[[0]], max_tokens=1)


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
case "$*" in
  --version) echo "version: 9 (build 1)";;
  *broken*) echo "cannot load" >&2; exit 4;;
  *-npl*) echo "log line"; echo '{"pl": 8, "t": 2.0}';;
  *) echo '[{"samples_ns": [100000000, 400000000, 200000000]}]';;
esac
"""


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    for name in ("llama-bench", "llama-batched-bench"):
        (tmp_path / name).write_text(LLAMA)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def test_llama_cpp_s_own_benchmarks_are_read(llama_folder: Path) -> None:
    llama = LlamaCpp("llamacpp-q8_0", llama_folder, Path("m.gguf"), threads=2)
    assert llama.facts["version"] == "9 (build 1)"
    assert llama.run(PeerTest.parse("prompt-512"), 3) == (pytest.approx(512 / 0.2), [0.1, 0.4, 0.2])
    assert llama.run(PeerTest.parse("decode-1"), 1)[0] == pytest.approx(128 / 0.2)
    assert llama.run(PeerTest.parse("decode-8"), 1) == (pytest.approx(8 * 128 / 2.0), [2.0])
    assert llama.peak_rss > 0
    arguments = " ".join(llama.bench_arguments(PeerTest.parse("decode-1"), 1))
    assert "-p 0 -n 128 -d 64 -r 1" in arguments and "-t 2" in arguments
    with pytest.raises(PeerError, match="cannot load"):
        LlamaCpp("llamacpp-bf16", llama_folder, Path("broken"), 2).run(PeerTest.parse("decode-1"), 1)
    with pytest.raises(ConfigError, match="lacks llama-bench"):
        LlamaCpp("llamacpp-bf16", llama_folder / "none", Path("m.gguf"), 2)


def test_vllm_s_libraries_are_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "env" / "bin" / "python"
    with pytest.raises(ConfigError, match="libiomp5"):
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
    with pytest.raises(ConfigError, match="libtcmalloc-minimal4"):
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
    monkeypatch.setattr(peer_measure, "vllm_environment", lambda *args: {})
    monkeypatch.setattr(peer_process, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(peer_process, "_LISTEN_SECONDS", 0.05)
    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    python = Path(sys.executable)
    llama = PeerSpec("llamacpp", llama_folder, (("bf16", tmp_path / "m.gguf"),))
    return PeerOptions(
        model=tmp_path,
        peers=[PeerSpec("vllm", python), llama],
        tests=[PeerTest.parse("decode-1"), PeerTest.parse("prompt-16")],
        formats=("bf16",),
        threads=2,
        repetitions=2,
        policy=AT_ONCE,
        command=["python"],
    )


def test_a_whole_contest_between_fakes(contest_options: PeerOptions, tmp_path: Path) -> None:
    text = io.StringIO()
    assert peers.run_peers(contest_options, Console(file=text), tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] and not result["failures"]
    assert str(tmp_path) not in json.dumps(result)
    rows = {(row["test"], row["peer"]): row for row in result["rows"]}
    assert set(rows) == {
        (test, peer) for test in ("decode-1", "prompt-16") for peer in ("vllm", "llamacpp-bf16")
    }
    assert rows["decode-1", "vllm"]["ratio_samples"] == pytest.approx([1.0, 1.0])
    assert rows["decode-1", "vllm"]["rate"] == pytest.approx(1000)
    assert len(result["repetitions"]["decode-1"][0]["bandwidth"]) == 3
    assert result["floor_shares"]["bf16"] == pytest.approx([0.5, 0.5])
    assert set(result["memory"]) == {"sleb-bf16", "vllm", "llamacpp-bf16"}
    assert "decode-1 bf16 against vllm" in text.getvalue()
    order = [list(each["rounds"]) for each in result["repetitions"]["decode-1"]]
    assert order[0] == order[1][::-1]


def test_an_interrupt_keeps_complete_repetitions_and_no_process(
    contest_options: PeerOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    runs = iter(range(99))
    run = LlamaCpp.run

    def interrupted(self: LlamaCpp, test: PeerTest, num_runs: int) -> Any:
        if next(runs) == 1:
            raise KeyboardInterrupt
        return run(self, test, num_runs)

    init = Worker.__init__

    def noted(self: Worker, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        pids.append(self.pid)

    monkeypatch.setattr(LlamaCpp, "run", interrupted)
    monkeypatch.setattr(Worker, "__init__", noted)
    assert not peers.run_peers(contest_options, Console(file=io.StringIO()), tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert not result["complete"]
    assert len(result["repetitions"]["decode-1"]) == 1
    assert len(pids) == 3 and not any(_state(pid) for pid in pids)


def test_a_peer_that_fails_takes_part_no_longer(contest_options: PeerOptions, tmp_path: Path) -> None:
    """The fake engine ends when prompts have 13 tokens in all."""
    peer = contest_options.peers[1]
    broken = PeerSpec("llamacpp", peer.program, (("bf16", tmp_path / "broken.gguf"),))
    options = PeerOptions(**{**vars(contest_options), "peers": [contest_options.peers[0], broken]})
    assert peers.run_peers(options, Console(file=io.StringIO()), tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["failures"]) == ["llamacpp-bf16"]
    assert {row["peer"] for row in result["rows"]} == {"vllm"}
    own = {**vars(contest_options), "tests": [PeerTest.parse("prompt-13")]}
    with pytest.raises(PeerError, match="sleb-bf16 ended"):
        peers.run_peers(PeerOptions(**own), Console(file=io.StringIO()), None)


def test_options_are_checked() -> None:
    assert peers.parse_names("--formats", "bf16, int4", ("bf16", "int4")) == ["bf16", "int4"]
    for text in ("", "bf16,bf16", "fp8"):
        with pytest.raises(ConfigError, match="--formats"):
            peers.parse_names("--formats", text, ("bf16", "int4"))
    assert peers.parse_versions(["llamacpp=b1"]) == {"llamacpp": "b1"}
    with pytest.raises(ConfigError, match="--peer-version"):
        peers.parse_versions(["vllm=1"])


def test_mixing_costs_nothing_if_the_batch_takes_the_mean_of_the_times_alone() -> None:
    repetition = MixedRepetition(mixed=2.0, alone={0: 3.0, 3: 2.0, 6: 1.0}, others_share=0.0, disturbed=False)
    assert repetition.ratio == pytest.approx(1.0)
    slower = MixedRepetition(2.5, {0: 3.0, 3: 2.0, 6: 1.0}, 0.0, False)
    found = summarise(MixedOptions("m"), [repetition, slower, slower])
    assert found["ratio"] == pytest.approx(0.8) and found["met"] is False
    rates = found["tokens_per_second"]
    assert rates["expected"] == pytest.approx(24 * 128 / 2.0)
    assert rates["alone"] == pytest.approx({0: 24 * 128 / 3, 3: 24 * 128 / 2, 6: 24 * 128})
    assert "ratio" not in summarise(MixedOptions("m"), [])


def test_mixed_batches_run_on_a_tiny_model(
    tiny_model_dir: Path, tiny_chain: LayerMap, tmp_path: Path
) -> None:
    path = tmp_path / "map.json"
    tiny_chain.save(path)
    options = MixedOptions(str(tiny_model_dir), str(path), (0, 3), 2, 5, 4, repetitions=2, policy=AT_ONCE)
    result = run_mixed(options, ["python"])
    assert result["complete"] and len(result["repetitions"]) == 2
    assert all(each["ratio"] > 0 and set(each["alone"]) == {0, 3} for each in result["repetitions"])
    assert str(tmp_path) not in json.dumps(result)
    with pytest.raises(ConfigError, match="two different depths"):
        run_mixed(MixedOptions(str(tiny_model_dir), depths=(0,)))
