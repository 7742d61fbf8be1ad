"""`sleb bench peers`: parsing, pairing, engines against stand-ins, whole runs beside transformers and servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sleb_tests_scripted_server as scripted
import torch
from typer.testing import CliRunner

from sleb.benchmarks import engines
from sleb.benchmarks.adapters import Transformers
from sleb.benchmarks.engines import PeerError, WorkerEngine, parse_test, rate
from sleb.benchmarks.http_engine import ServerEngine
from sleb.benchmarks.installs import HOW
from sleb.benchmarks.peers import PeersOptions, parse_peer, parse_server, run_peers
from sleb.benchmarks.prompts import TokenPrompts
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.workloads import Workload
from sleb.cli.bench import app
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="peers are measured on Linux")

STAND_IN = """
import os, subprocess, sys, time

class Engine:
    def __init__(self, model, threads, **own):
        print("a library that prints to standard output", flush=True)
        if model == "broken":
            raise ValueError("no such format")
        if model == "missing":
            import no_such_module_at_all
        if own.get("layer_map"):
            raise ValueError("layer map " + own["layer_map"] + " cannot be read")
        if model.startswith("child:"):
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            open(model[6:], "w").write(str(process.pid))
        self.facts = {"version": "1", "threads": threads, **own}

    def generate(self, prompts, max_tokens, depth=0):
        if sum(map(len, prompts)) == 13:
            os._exit(3)
        time.sleep(0.002 * max_tokens / (1 + depth))
        return [[7] * (max_tokens - (len(prompts[0]) == 17))] * len(prompts)
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every adapter is a stand-in then; a folder with what prompts are made for."""
    script = Path(engines.ADAPTERS).read_text()
    place = script.index("ADAPTERS = ")
    names = "dict.fromkeys(('sleb', 'transformers', 'vllm', 'openvino'), Engine)"
    rest = script[script.index("\n", place) :]
    path = tmp_path / "adapters.py"
    path.write_text(script[:place] + STAND_IN + f"\nADAPTERS = {names}" + rest)
    monkeypatch.setattr(engines, "ADAPTERS", path)
    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    return tmp_path


@pytest.fixture
def start(stand_ins: Path) -> Iterator[Callable[..., WorkerEngine]]:
    """Starts stand-ins, and ends them after the test."""
    started: list[WorkerEngine] = []

    def make(model: str = "m", python: str = sys.executable, **own: Any) -> WorkerEngine:
        load = {"model": model, "threads": 2, "max_context": 64, **own}
        prompts = TokenPrompts(stand_ins, 0)
        started.append(WorkerEngine("fake", Path(python), "vllm", load, prompts))
        return started[-1]

    yield make
    for engine in started:
        engine.close()


def test_tests_are_named_by_streams_or_tokens() -> None:
    assert parse_test("decode-8") == Workload("generate", 8, 64, 128)
    assert parse_test("prompt-512") == Workload("prompt", 1, 512, 1)
    names = [str(parse_test(name)) for name in ("decode-1", "decode-8", "prompt-512")]
    assert names == ["decode 1 × 128 after 64", "generate 8 × 128 after 64", "prompt 1 × 512"]
    for name in ("decode", "decode-0", "prompt-x", "train-3", "prompt-1048577", "decode-" + "9" * 5000):
        with pytest.raises(ConfigError, match="write decode-STREAMS") as caught:
            parse_test(name)
        assert len(str(caught.value)) < 200
    assert parse_test("prompt-1048576").prompt_tokens == 1 << 20


def test_rates_count_what_the_test_says() -> None:
    assert rate(parse_test("decode-1"), 2.5, 0.5) == pytest.approx(127 / 2.0)
    assert rate(parse_test("decode-8"), 2.0, 0.4) == pytest.approx(8 * 128 / 2.0)
    assert rate(parse_test("prompt-512"), 0.3, 0.25) == pytest.approx(2048)


def test_peers_are_parsed(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    assert parse_peer(f"vllm={python}")[0].program == python  # the link itself, not its end
    assert parse_peer("transformers")[0].program == Path(sys.executable)
    assert parse_peer(f"openvino={python}:{tmp_path}")[0].model == str(tmp_path)
    assert parse_peer("vllm=~/env/bin/python")[0].program == Path.home() / "env/bin/python"
    llama = parse_peer(f"llamacpp={tmp_path}:bf16=/x/a.gguf,q4_1=/x/b.gguf")
    assert [(each.name, each.weights, each.model) for each in llama] == [
        ("llamacpp-bf16", "bf16", "/x/a.gguf"),
        ("llamacpp-q4_1", "int4", "/x/b.gguf"),
    ]
    for text in ("vllm", "vllm=", "mlc=x", f"openvino={python}", f"llamacpp={tmp_path}", "llamacpp=x:q2=y"):
        with pytest.raises(ConfigError):
            parse_peer(text)
    server = parse_server("ov=https://h/v3/#a/b")
    assert (server.url, server.model) == ("https://h/v3", "a/b")
    assert parse_server("vllm=http://h:8000").url == "http://h:8000/v1"
    for text in ("vllm", "vllm=", "vllm=localhost:8000", "a b=http://h", "x=http://user:secret@h"):
        with pytest.raises(ConfigError):
            parse_server(text)


def test_each_format_meets_its_counterpart() -> None:
    options = PeersOptions(
        model="m", peer=["transformers", "llamacpp=x:bf16=a,q8_0=b,q4_1=c"], server=["far=http://h"]
    )
    assert {peer.name: peer.own_name for peer in options.peers()} == {
        "transformers": "sleb bf16",
        "llamacpp-bf16": "sleb bf16 http",
        "llamacpp-q8_0": "sleb int8 http",
        "llamacpp-q4_1": "sleb int4 http",
        "far": "sleb bf16 http",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (6, 6)}, "--depths is '6,6'"),
        ({"depths": (-1,)}, "depths is -1"),
        ({"tests": ()}, "--tests is ''"),
        ({"tests": ("decode-x",)}, "write decode-STREAMS"),
        ({"peer": ("transformers", "transformers")}, "--peer is 'transformers,transformers'"),
        ({"kv_gib": 1.5}, "kv_gib is 1.5; it must be an integer"),
        ({"repetitions": 0}, "repetitions is 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PeersOptions(model="m", **changes).check()


def test_how_is_pinned_and_names_every_engine() -> None:
    done = CliRunner().invoke(app, ["peers", "--how"])
    assert done.exit_code == 0 and done.output.strip() == HOW.strip()
    assert all(f"--peer {name}=" in HOW for name in ("transformers", "vllm", "openvino", "llamacpp"))
    packages = [word for line in HOW.splitlines() if "pip install" in line for word in line.split()[2:]]
    assert packages and all("==" in word or word == "accelerate" for word in packages)


def test_a_worker_answers_in_lines_whatever_its_library_prints(start: Callable[..., WorkerEngine]) -> None:
    engine = start()
    assert engine.facts == {"version": "1", "threads": 2, "max_context": 64}
    rate = engine.generate(Workload("generate", 2, 8, 20), 1)
    assert 0 < rate <= 2 * 20 / (0.002 * 20)
    assert engine.generate(Workload("decode", 1, 8, 50), 1) <= 49 / (0.002 * 49) * 1.5
    assert 0 < engine.generate(Workload("prompt", 1, 50, 1), 1) <= 50 / 0.002


def test_a_worker_is_stopped_between_its_turns(start: Callable[..., WorkerEngine]) -> None:
    engine = start()
    assert _becomes(engine.pid, "T")
    engine.generate(Workload("generate", 2, 8, 4), 1)
    assert _becomes(engine.pid, "T")
    engine.close()
    assert not Path(f"/proc/{engine.pid}").exists()


def test_a_worker_s_failure_comes_with_its_log(start: Callable[..., WorkerEngine]) -> None:
    with pytest.raises(PeerError, match="ValueError: no such format") as caught:
        start("broken")
    assert "standard output" in caught.value.__notes__[0]
    assert "\n" not in str(caught.value) and "standard output" not in str(caught.value)
    with pytest.raises(PeerError, match="no_such_module_at_all"):
        start("missing")
    with pytest.raises(PeerError, match="cannot be run"):
        start(python="/nowhere/python")
    with pytest.raises(PeerError) as caught:
        start(layer_map="/no.json")
    assert str(caught.value) == "fake: ValueError: layer map /no.json cannot be read"
    engine = start()
    with pytest.raises(PeerError, match=r"answers of \{3\} tokens, not 4"):
        engine.generate(Workload("generate", 2, 17, 4), 1)
    for _ in range(2):
        with pytest.raises(PeerError, match="it ended, or gave no answer"):
            engine.generate(Workload("prompt", 1, 13, 1), 1)


def test_closing_a_worker_ends_its_children(start: Callable[..., WorkerEngine], tmp_path: Path) -> None:
    file = tmp_path / "pid"
    engine = start(f"child:{file}")
    engine.close()
    assert _becomes(int(file.read_text()), "", "Z", "X")


_KILLED = """
import os, signal, sys, threading
from pathlib import Path
from sleb.benchmarks import engines
from sleb.benchmarks.prompts import TokenPrompts
from sleb.benchmarks.workloads import Workload

folder = Path(sys.argv[2])
engines.ADAPTERS = folder / "adapters.py"
load = {"model": "child:" + str(folder / "child"), "threads": 1}
engine = engines.WorkerEngine("fake", Path(sys.executable), "vllm", load, TokenPrompts(folder, 0))
if sys.argv[1] == "busy":
    work = lambda: engine.generate(Workload("decode", 1, 8, 100000), 1)
    threading.Thread(target=work, daemon=True).start()
    threading.Event().wait(0.5)
else:
    for pid in (engine.pid, (folder / "child").read_text()):
        while ") T " not in Path(f"/proc/{pid}/stat").read_text():
            pass
print(engine.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("state", ["stopped", "busy"])
def test_a_parent_that_is_killed_leaves_no_worker(stand_ins: Path, state: str) -> None:
    """Nor what the worker has started, where all are stopped."""
    words = [sys.executable, "-c", _KILLED, state, str(stand_ins)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    child = int((stand_ins / "child").read_text())
    pids = [int(done.stdout), *([child] if state == "stopped" else [])]
    left = [pid for pid in pids if not _becomes(pid, "", "Z", "X")]
    for pid in [*left, *([child] if state == "busy" else [])]:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _becomes(pid: int | None, *states: str) -> bool:
    """Whether the process gets into one of `states` soon; "": it is not there."""
    deadline = time.monotonic() + 5
    while _state(pid) not in states and time.monotonic() < deadline:
        time.sleep(0.01)
    return _state(pid) in states


def _state(pid: int | None) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[0]
    except OSError:
        return ""


# llama.cpp's server: its model file is the address of a scripted server, which it hands requests on to.
LLAMA = """
import http.server, pathlib, sys, urllib.request

told = dict(zip(sys.argv[1::2], sys.argv[2::2]))
pathlib.Path(__file__).with_name("told").write_text(" ".join(sys.argv[1:]))
model = pathlib.Path(told["--model"]).read_text()
if model == "broken":
    sys.exit("cannot load the model")

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.removesuffix("/health") + "/models" if self.path.endswith("/health") else self.path
        self.hand_on(urllib.request.Request(model + path))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = {"Content-Type": "application/json"}
        self.hand_on(urllib.request.Request(model + self.path, body, head))

    def hand_on(self, request):
        try:
            reply = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            reply = error
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.headers["Content-Type"])
        self.send_header("Connection", "close")
        self.end_headers()
        while piece := reply.read1():
            self.wfile.write(piece)
            self.wfile.flush()

http.server.ThreadingHTTPServer(("127.0.0.1", int(told["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def llama_folder(tmp_path: Path, serve: Callable[..., scripted.ScriptedServer]) -> Path:
    path = tmp_path / "llama-server"
    path.write_text(f"#!{sys.executable}\n{LLAMA}")
    path.chmod(0o755)
    (tmp_path / "m.gguf").write_text(serve(gap=0.001).url.removesuffix("/v1"))
    (tmp_path / "broken.gguf").write_text("broken")
    return tmp_path


def test_vllm_s_libraries_are_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "env" / "bin" / "python"
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libtcmalloc_minimal.so.4")
    with pytest.raises(PeerError, match="libiomp5"):
        engines.vllm_environment(python, 2, 4)
    (tmp_path / "env" / "lib").mkdir(parents=True)
    (tmp_path / "env" / "lib" / "libiomp5.so").touch()
    environment = engines.vllm_environment(python, 1, 4)
    assert environment["LD_PRELOAD"] == f"libtcmalloc_minimal.so.4:{tmp_path}/env/lib/libiomp5.so"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == str(min(os.sched_getaffinity(0)))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(PeerError, match="libtcmalloc-minimal4"):
        engines.vllm_environment(python, 2, 4)


def test_transformers_runs_nothing_of_the_model_s_own_generation_config(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    num_threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def answer(folder: Path) -> list[int]:
        return Transformers(str(folder), num_threads, 64, 1, 1).generate([[65, 66, 67]], 12)[0]

    try:
        plain = answer(tiny_model_dir)
        assert len(plain) == 12
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_dir, folder)
        own = {"suppress_tokens": [plain[0]], "repetition_penalty": 5.0, "eos_token_id": plain[1]}
        (folder / "generation_config.json").write_text(json.dumps(own))
        assert answer(folder) == plain
    finally:
        torch.set_grad_enabled(grad)
        torch.set_num_threads(num_threads)


@pytest.fixture
def serve() -> Iterator[Callable[..., scripted.ScriptedServer]]:
    """Starts scripted servers, which generate nothing but time."""
    servers: list[scripted.ScriptedServer] = []

    def start_one(**script: Any) -> scripted.ScriptedServer:
        servers.append(scripted.ScriptedServer(scripted.Script(**script)))
        return servers[-1]

    yield start_one
    for server in servers:
        server.close()


def test_a_server_is_timed_as_the_test_says(serve: Callable[..., scripted.ScriptedServer]) -> None:
    server = serve(first=0.05, gap=0.002)
    engine = ServerEngine("far", server.url, salt="x")
    try:
        server.seen.clear()
        assert 0 < engine.generate(Workload("generate", 4, 30, 20), 1) <= 4 * 20 / (0.05 + 19 * 0.002)
        assert 0 < engine.generate(Workload("decode", 1, 30, 20), 1) <= 19 / (19 * 0.002)
        assert 0 < engine.generate(Workload("prompt", 1, 40, 1), 1) <= 40 / 0.05
    finally:
        engine.close()
    texts = [scripted.text_of(request.body) for request in server.seen]
    assert len(set(texts)) == len(texts) == 4 + 1 + 3  # nothing twice
    lengths = [len(text.split()) + 7 for text in texts]
    assert lengths == [30] * 5 + [40] * 3
    for request in server.seen:
        assert request.path == "/v1/completions"
        assert request.body["ignore_eos"] and request.body["temperature"] == 0
        assert request.body["repetition_penalty"] == 1 and "cache_prompt" not in request.body


@pytest.mark.parametrize(
    ("fault", "message"),
    [("drop", "the connection closed"), ("error", "the engine broke"), ("500", "HTTP 500: out of luck")],
)
def test_a_server_that_fails_is_told(
    serve: Callable[..., scripted.ScriptedServer], fault: str, message: str
) -> None:
    server = serve(fail=lambda number: fault if number else None)
    engine = ServerEngine("far", server.url)
    try:
        with pytest.raises(PeerError, match=f"^far: .*{message}"):
            engine.generate(Workload("generate", 2, 30, 5), 1)
    finally:
        engine.close()


def test_a_server_that_cannot_be_compared(serve: Callable[..., scripted.ScriptedServer]) -> None:
    with pytest.raises(PeerError, match="far: no server at"):
        ServerEngine("far", "http://127.0.0.1:1/v1")
    with pytest.raises(PeerError, match="no such key"):
        ServerEngine("far", serve(key="k").url)
    assert ServerEngine("far", serve(key="k").url, api_key="k").close() is None


def rates(result: Result) -> dict[tuple[str, str], Measurement]:
    return {(each.case, each.subject): each for each in result.measurements if each.metric == "tokens/s"}


def options_of(folder: Path, **changes: Any) -> PeersOptions:
    given = {"tests": ["decode-1", "prompt-16"], "threads": 2, "repetitions": 2, "model": str(folder)}
    return PeersOptions(**(given | changes))


def test_a_whole_run_between_stand_ins(stand_ins: Path) -> None:
    turns: list[str] = []
    options = options_of(stand_ins, depths=[0, 6])
    result = run_peers(options, ["sleb"], on_turn=lambda *now: turns.append(now[2].name))
    assert result.complete and result.kind == "peers" and len(turns) == 4
    found = rates(result)
    decode = "decode 1 × 128 after 64 beside transformers"
    assert set(found) == {
        (case, subject)
        for case in (decode, "prompt 1 × 16 beside transformers")
        for subject in ("transformers", "sleb bf16", "sleb bf16 depth 6")
    }
    assert found[decode, "transformers"].ratio is None
    assert 4 < found[decode, "sleb bf16 depth 6"].ratio.estimate < 8  # 7 of the clock, less what is not slept
    assert len(found[decode, "sleb bf16"].facts["samples"]) == 2
    memory = {each.subject: each.value for each in result.measurements if each.metric == "MiB"}
    assert set(memory) == {"sleb bf16", "transformers"} and min(memory.values()) > 0
    assert str(stand_ins) not in json.dumps(result.document())
    assert result.settings["engines"]["transformers"]["version"] == "1"


def test_a_peer_that_fails_loses_nothing_of_the_others(stand_ins: Path) -> None:
    said: list[str] = []
    peers = ["transformers", f"llamacpp={stand_ins}:bf16=none.gguf", f"vllm={stand_ins}/none/bin/python"]
    result = run_peers(options_of(stand_ins, peer=peers, tests=["decode-1"]), say=said.append)
    found = rates(result)
    assert found["decode 1 × 128 after 64 beside transformers", "sleb bf16"].ratio is not None
    for name, reason in (("vllm", "missing"), ("llamacpp-bf16", "No such file")):
        row = found["start", name]
        assert (
            row.value is None and reason in row.facts["failed"] and str(stand_ins) not in row.facts["failed"]
        )
        assert any(text.startswith(f"{name}: ") and "it takes no part" in text for text in said)
    with pytest.raises(ConfigError, match="no engine is left"):
        run_peers(options_of(stand_ins, peer=peers[2:], tests=["decode-1"]))


def test_an_interrupt_keeps_complete_turns_and_no_process(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    generate = WorkerEngine.generate

    def interrupted(self: WorkerEngine, *arguments: Any) -> float:
        pids.append(self.pid)
        if len(pids) == 6:  # two of the warm-up, two of the first turn
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(WorkerEngine, "generate", interrupted)
    result = run_peers(options_of(stand_ins, tests=["prompt-16"], repetitions=3))
    assert not result.complete
    assert [each.facts["repetitions"] for each in rates(result).values()] == [1, 1]
    assert len(set(pids)) == 2 and not any(_state(pid) for pid in pids)


def test_transformers_and_servers_beside_sleb(
    tiny_model_dir: Path,
    tiny_chain: LayerMap,
    tmp_path: Path,
    serve: Callable[..., scripted.ScriptedServer],
    llama_folder: Path,
) -> None:
    """The real transformers on a tiny random model: sleb in a worker and behind its own server, at two depths.

    llama.cpp's server is a stand-in; its other file breaks when it is loaded.
    """
    path, result_path = tmp_path / "map.json", tmp_path / "result.json"
    tiny_chain.save(path)
    server = serve(gap=0.001)
    arguments = [
        *(
            "peers",
            tiny_model_dir,
            "--peer",
            "transformers",
            "--server",
            f"far={server.url}",
            "--peer",
            f"llamacpp={llama_folder}:bf16={llama_folder}/m.gguf,q8_0={llama_folder}/broken.gguf",
            "--depths",
            "0,3",
        ),
        *("--layer-map", path, "--tests", "decode-2,prompt-24", "--repetitions", 1, "--threads", 1),
        *("--kv-gib", 1, "--json", result_path),
    ]
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert done.exit_code == 0, (done.output, done.exception)
    document = json.loads(result_path.read_text())
    found = rates(Result.of_document(document))
    for test in ("generate 2 × 128 after 64", "prompt 1 × 24"):
        for beside in ("transformers", "far over HTTP", "llamacpp-bf16 over HTTP"):
            for subject in ("sleb bf16", "sleb bf16 depth 3", beside.split()[0]):
                assert found[f"{test} beside {beside}", subject].value > 0
    assert document["settings"]["engines"]["sleb bf16 http"]["software"] == "sleb"
    assert "cannot load the model" in found["start", "llamacpp-q8_0"].facts["failed"]
    assert "transformers" in done.output and str(tmp_path) not in result_path.read_text()
