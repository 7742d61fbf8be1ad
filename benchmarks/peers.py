"""`sleb bench peers`: this engine beside others that are installed or served here, in turns, on the same prompts.

Every Python engine, ours included, is a process of its own that stays loaded, and is stopped between its turns;
llama.cpp's own benchmarks are a process a run; a server goes on as it runs, and meets ours behind our own server, so
that HTTP meets HTTP. A case is of one peer and those of ours that it is compared with, so that a ratio is of runs that
are near in time: bf16 meets every peer, a quantised format llama.cpp's of as many bits. All greedy, the end of a
sequence ignored, no prefix cache; servers, whose cache is their own affair, get new prompts in every run.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sleb.benchmarks.engines import (
    ADAPTERS,
    Engine,
    LlamaCpp,
    PeerError,
    PeerTest,
    Program,
    WorkerEngine,
    vllm_environment,
)
from sleb.benchmarks.http_engine import ServerEngine, wait_for_server
from sleb.benchmarks.installs import INSTALLS
from sleb.benchmarks.load.options import API_KEY_VARIABLES
from sleb.benchmarks.load.server import public_command, public_text
from sleb.benchmarks.prompts import TokenPrompts
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.turns import Case, Progress, Sample, TurnOptions, Turns, measure
from sleb.client.connection import base_url
from sleb.errors import ConfigError
from sleb.options import check_values, option

PYTHON_PEERS = ("transformers", "vllm", "openvino")
# Our format -> llama.cpp's with as many bits a weight.
FORMATS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_1"}
_LEAST_CONTEXT = 512  # with room to learn what words cost
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Peer:
    """Another engine: a Python interpreter, llama.cpp's folder, or a server's address (url).

    model: a folder or file of its own, or a server's id; weights: what they are, bf16 but for llama.cpp's.
    """

    name: str
    program: Path = Path(sys.executable)
    model: str | None = None
    weights: str = "bf16"
    url: str | None = None


@dataclass(frozen=True)
class PeersOptions(TurnOptions):
    """What to measure. model: as the user named it."""

    model: str = ""
    peer: Sequence[str] = option(
        (),
        "transformers, NAME=PYTHON[:MODEL] (transformers, vllm, openvino), or "
        "llamacpp=FOLDER:bf16=FILE,q8_0=FILE,q4_1=FILE; once a peer.",
        unset="transformers, if there is no --server",
        group="Peers",
        metavar="PEER",
    )
    server: Sequence[str] = option(
        (),
        "NAME=URL[#MODEL]: a server that runs already; repeatable. SLEB_API_KEY or OPENAI_API_KEY may hold its key.",
        group="Peers",
        metavar="SERVER",
    )
    peer_version: str | None = option(
        None, "llamacpp=VERSION, where the build does not know.", unset="what it says", group="Peers"
    )
    kv_gib: int = option(4, "Whole GiB of KV cache for engines that want to know.", minimum=1, group="Peers")
    threads: int | None = option(None, "Of every engine.", unset="all processors", minimum=1, group="Peers")
    tests: Sequence[str] = option(
        ("decode-1", "decode-8", "decode-32", "prompt-512", "prompt-1024"),
        "decode-STREAMS and prompt-TOKENS.",
        commas=True,
        group="Tests",
    )
    depths: Sequence[int] = option((0,), "Of ours, each beside every peer.", minimum=0, group="Tests")
    layer_map: str | None = option(
        None, "Layer map (JSON), or none.", unset="the one shipped with the model", group="Tests"
    )
    formats: Sequence[str] = option(
        (),
        "Of our weights.",
        choices=tuple(FORMATS),
        unset="those that the peers have too",
        group="Tests",
    )
    max_repetitions: int | None = option(None, "Turns at most.", unset="--repetitions", group="Repetitions")

    @property
    def most(self) -> int:
        return self.repetitions if self.max_repetitions is None else self.max_repetitions

    def check(self) -> None:
        """Raises ConfigError for what cannot be meant."""
        check_values(self)
        super().check()
        if not Path("/proc/stat").exists():
            raise ConfigError("sleb bench peers runs on Linux only: it stops engines between their turns")
        for name, values in (("--depths", self.depths), ("--formats", self.formats), ("--tests", self.tests)):
            if len(set(values)) < len(values) or (not values and name != "--formats"):
                raise ConfigError(
                    f"{name} is '{','.join(map(str, values))}'; name at least one, and each once"
                )
        for name in self.tests:
            PeerTest.parse(name)
        if self.peer_version and not self.peer_version.startswith("llamacpp="):
            raise ConfigError(
                "--peer-version is for llamacpp, whose build may not know its own; write llamacpp=b1234"
            )
        names = [peer.name for peer in self.peers()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"'{twice[0]}' takes part twice; name each once, llamacpp with all its files")
        if not any(self.formats_beside(peer) for peer in self.peers()):
            raise ConfigError(
                f"--formats {','.join(self.formats)} meets none of the peers: only llama.cpp has int8 and int4"
            )

    def peers(self) -> list[Peer]:
        """Who takes part; llama.cpp once a format. Raises ConfigError."""
        texts = self.peer or (() if self.server else ("transformers",))
        found = [peer for text in texts for peer in parse_peer(text)]
        return found + [parse_server(text) for text in self.server]

    def formats_beside(self, peer: Peer) -> list[str]:
        """Those of ours that a peer meets; what a server computes with is its affair."""
        if peer.url is not None:
            return list(self.formats or ("bf16",))
        return [
            ours
            for ours, theirs in FORMATS.items()
            if theirs == peer.weights and ours in (self.formats or FORMATS)
        ]

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


def parse_peer(text: str) -> list[Peer]:
    """From transformers, NAME=PROGRAM[:MODEL] or llamacpp=FOLDER:FORMAT=FILE,…. Raises ConfigError."""
    see = "see sleb bench peers --how"
    name, _, rest = text.partition("=")
    program, _, models = rest.partition(":")
    if text == "transformers":
        return [Peer(name)]
    if name not in INSTALLS:
        raise ConfigError(
            f"--peer '{text}' does not name one of {', '.join(INSTALLS)}; {see}; a server: --server"
        )
    if not program:
        raise ConfigError(f"--peer '{text}' does not say where {name} is; {see}")
    if name != "llamacpp":
        if name == "openvino" and not models:
            raise ConfigError(
                "--peer openvino lacks its model; write openvino=PYTHON:FOLDER, as optimum-cli made"
            )
        return [Peer(name, _absolute(program), str(_absolute(models)) if models else None)]
    pairs = [part.partition("=") for part in models.split(",") if part]
    if not pairs or any(each not in FORMATS.values() or not file for each, _, file in pairs):
        raise ConfigError(
            f"--peer '{text}' is not llamacpp=FOLDER:bf16=FILE,q8_0=FILE,q4_1=FILE (some of them)"
        )
    folder = _absolute(program)
    return [Peer(f"{name}-{each}", folder, str(_absolute(file)), each) for each, _, file in pairs]


def parse_server(text: str) -> Peer:
    """From NAME=URL[#MODEL]. Raises ConfigError."""
    name, _, rest = text.partition("=")
    url, _, model = rest.partition("#")
    if "://" not in url or not _NAME.fullmatch(name):
        raise ConfigError(f"--server '{text}' is not NAME=URL, as vllm=http://127.0.0.1:8000/v1")
    if name.startswith("sleb "):
        raise ConfigError(f"--server {name}: that name is taken; choose another")
    return Peer(name, model=model or None, url=base_url(url))


def _absolute(text: str) -> Path:
    # Not resolved: the interpreter of a virtual environment is a link, and the link is what finds the environment.
    return Path(os.path.abspath(Path(text).expanduser()))


class Entrants:
    """The engines of a run, loaded one after another, each stopped until its turn.

    Attributes:
        engines: those that are ready, by name; of ours "sleb bf16", and "sleb bf16 http" behind our server.
        failures: why a peer takes no part.
    """

    def __init__(self, options: PeersOptions, folder: Path, say: Callable[[str], None]) -> None:
        self.options, self._folder, self._say = options, folder, say
        self.engines: dict[str, Engine] = {}
        self.failures: dict[str, str] = {}
        self._salt = secrets.token_hex(8)
        self._prompts = TokenPrompts(folder, options.seed)
        self._key = next(filter(None, map(os.environ.get, API_KEY_VARIABLES)), None)

    def start(self) -> None:
        """Raises PeerError or ConfigError for ours; a peer that fails is told, and takes no part."""
        peers = self.options.peers()
        for peer in sorted(peers, key=lambda each: each.name in PYTHON_PEERS):  # what is quick to fail first
            self._say(f"starting {peer.name}")
            try:
                self.engines[peer.name] = self._peer(peer)
            except (PeerError, ConfigError) as error:
                self.failures[peer.name] = str(error)
                self._say(f"{error}; it takes no part")
                for line in getattr(error, "details", "").splitlines():
                    self._say(f"  {line}")
        if not self.engines:
            reason = next(iter(self.failures.values()))
            raise ConfigError(f"no engine is left to compare with ({reason}); see sleb bench peers --how")
        for peer in peers if self.engines else ():
            for weights in self.options.formats_beside(peer) if peer.name in self.engines else ():
                name = own_name(weights, peer)
                if name not in self.engines:
                    self._say(f"starting {name}")
                    self.engines[name] = self._ours(name, weights, over_http=peer.url is not None)

    def _common(self) -> dict[str, Any]:
        """Options that all workers take: each has room for the same requests."""
        tests = [PeerTest.parse(name) for name in self.options.tests]
        return {
            "threads": self.options.num_threads,
            "max_context": max(_LEAST_CONTEXT, *(test.prompt_tokens + test.output_tokens for test in tests)),
            "max_batch": max(32, *(test.batch for test in tests)),
            "kv_gib": self.options.kv_gib,
        }

    def _peer(self, peer: Peer) -> Engine:
        options = self.options
        if peer.url is not None:
            return ServerEngine(
                peer.name, peer.url, options.seed, model=peer.model, api_key=self._key, salt=self._salt
            )
        if peer.name not in PYTHON_PEERS:
            version = (options.peer_version or "").removeprefix("llamacpp=") or None
            return LlamaCpp(peer.name, peer.program, Path(str(peer.model)), options.num_threads, version)
        environment = {"OMP_NUM_THREADS": str(options.num_threads)}
        if peer.name == "vllm":
            environment |= vllm_environment(peer.program, options.num_threads, options.kv_gib)
        load = {"model": peer.model or str(self._folder), **self._common()}
        return WorkerEngine(peer.name, peer.program, peer.name, load, self._prompts, environment)

    def _ours(self, name: str, weights: str, over_http: bool) -> Engine:
        options, common = self.options, self._common()
        kept = "auto" if weights == "bf16" else weights
        if not over_http:
            own = {"layer_map": options.layer_map, "depths": list(options.depths), "weights": kept}
            load = {"model": options.model, **common, **own}
            return WorkerEngine(name, Path(sys.executable), "sleb", load, self._prompts)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = {
            "--tiers": ",".join(map(str, options.depths)), "--dtype": "bfloat16", "--weights": kept,
            "--threads": common["threads"], "--max-model-len": common["max_context"],
            "--max-num-seqs": common["max_batch"], "--kv-cache-memory": common["kv_gib"], "--port": port,
            "--device": "cpu", **({"--layer-map": options.layer_map} if options.layer_map else {}),
        }  # fmt: skip
        arguments = [str(each) for pair in words.items() for each in pair]
        command = [sys.executable, "-m", "sleb", "serve", options.model, "--no-prefix-caching", *arguments]
        launcher = [sys.executable, str(ADAPTERS), "exec"]
        program = Program(name, [*launcher, *command], stdout=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}/v1"
            wait_for_server(program, url)
            return ServerEngine(
                name, url, options.seed, salt=self._salt, program=program, depths=options.depths
            )
        except BaseException:
            program.close()
            raise

    def cases(self) -> Iterator[Case]:
        """A case for every test and peer that is there."""
        options = self.options
        for test in (PeerTest.parse(name) for name in options.tests):
            for peer in options.peers():
                subjects: dict[str, Callable[[int], Sample]] = {}
                if peer.name not in self.engines:
                    continue
                for weights in options.formats_beside(peer):
                    for depth in options.depths:
                        subject = f"sleb {weights}" + (f" depth {depth}" if depth else "")
                        subjects[subject] = partial(self._run, own_name(weights, peer), test, depth)
                subjects[peer.name] = partial(self._run, peer.name, test, 0)
                if len(subjects) > 1:
                    yield Case(case_name(test, peer), subjects, baseline=peer.name)

    def _run(self, name: str, test: PeerTest, depth: int, turn: int) -> Sample:
        return {"tokens/s": self.engines[name].generate(test, turn, depth)}

    def pids(self) -> list[int]:
        """Of the engines that compute here."""
        return [engine.pid for engine in self.engines.values() if engine.pid is not None]

    def close(self) -> None:
        """Ends all processes that were started."""
        for engine in self.engines.values():
            engine.close()


def _public(each: Measurement) -> Measurement:
    reason = each.facts.get("failed")
    return each if reason is None else replace(each, facts={**each.facts, "failed": public_text(reason)})


def own_name(weights: str, peer: Peer) -> str:
    """The engine of ours that a peer meets: a server meets ours behind HTTP."""
    return f"sleb {weights}" + (" http" if peer.url is not None else "")


def case_name(test: PeerTest, peer: Peer) -> str:
    """What the measurements of a peer and of ours beside it are of."""
    return f"{test} beside {peer.name}" + (" over HTTP" if peer.url is not None else "")


def run_peers(
    options: PeersOptions,
    command: Sequence[str] = (),
    on_progress: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda text: None,
    on_turn: Callable[[Result, Turns, Case], None] = lambda result, turns, case: None,
) -> Result:
    """Starts all, measures, ends all, and gives the result; Ctrl-C keeps complete turns. Raises SlebError.

    say: what users should learn at once, a peer that failed above all. on_turn: gets the result so far. A peer that
    fails is left out, in one case or in all, and told in the result.
    """
    options.check()
    import torch

    from sleb.benchmarks.environment import Conditions, describe_machine
    from sleb.models.resolve import resolve_model

    found = resolve_model(options.model)
    shown = public_command(command, None, [options.model])
    environment = describe_machine(torch.device("cpu"), torch.bfloat16, "", shown)
    settings: dict[str, Any] = {
        "model": found.name,
        "threads": options.num_threads,
        **{name: getattr(options, name) for name in ("repetitions", "seed", "kv_gib", "depths", "formats")},
    }
    result = Result("peers", environment, settings)
    entrants = Entrants(options, found.path.absolute(), say)
    conditions = Conditions(roots=entrants.pids)

    def keep(turns: Turns, case: Case) -> None:
        result.measurements = [_public(each) for each in turns.measurements()]
        on_turn(result, turns, case)

    try:
        entrants.start()
        ours = next(each for name, each in entrants.engines.items() if name.startswith("sleb "))
        environment |= {"threads": options.num_threads, "kernels": ours.facts.get("kernels")}
        settings["engines"] = {name: dict(engine.facts) for name, engine in entrants.engines.items()}
        turns = measure(
            list(entrants.cases()),
            options,
            failing=(PeerError,),
            watch=conditions,
            on_progress=on_progress,
            on_turn=keep,
        )
        result.complete = turns.complete
        result.measurements = [_public(each) for each in turns.measurements()]
        for name, engine in entrants.engines.items():
            if peak := engine.peak_bytes():
                result.measurements.append(Measurement("peak memory", name, "MiB", peak / 2**20))
    finally:
        entrants.close()
    for name, reason in entrants.failures.items():
        result.measurements.append(
            Measurement("start", name, "tokens/s", None, facts={"failed": public_text(reason)})
        )
    environment |= conditions.summary()
    result.notes += [
        public_text(note) for engine in entrants.engines.values() for note in getattr(engine, "notes", ())
    ]
    result.notes += conditions.notes()
    return result
