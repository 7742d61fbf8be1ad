"""`sleb bench peers`: this engine beside others that are installed or served here, in turns, on the same prompts.

Every engine that is started, ours included, is a process of its own that stays loaded, and is stopped between its
turns. What is a server (llama.cpp, and whatever --server names) meets ours behind our own server, so that HTTP meets
HTTP; Python engines meet ours in a worker as theirs. A case is of one peer and those of ours that it is compared with,
so that a ratio is of runs that are near in time, of weights of as many bits. All greedy, the end of a sequence ignored,
no prefix cache; servers, whose cache may be their own affair, get new prompts in every run.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sleb.benchmarks.engines import ADAPTERS, Engine, PeerError, WorkerEngine, parse_test, vllm_environment
from sleb.benchmarks.http_engine import ServerEngine
from sleb.benchmarks.load.options import API_KEY_VARIABLES
from sleb.benchmarks.load.server import public_command, public_text
from sleb.benchmarks.prompts import TokenPrompts
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.turns import Case, Progress, Sample, TurnOptions, Turns, measure
from sleb.benchmarks.workloads import Workload
from sleb.client.connection import base_url
from sleb.errors import ConfigError
from sleb.options import check_values, option

# llama.cpp's format -> ours with as many bits a weight, or, of a file of several, with those of its largest.
FORMATS = {"bf16": "bf16", "q8_0": "int8", "q4_1": "int4", "q4_k_m": "int8"}
_LEAST_CONTEXT = 512  # with room to learn what words cost


@dataclass(frozen=True)
class Peer:
    """Another engine: a Python interpreter, llama.cpp's folder (program), or a server's address (url).

    model: a folder or file of its own, or a server's id. weights: of ours beside it.
    """

    name: str
    program: Path = Path(sys.executable)
    model: str | None = None
    weights: str = "bf16"
    url: str | None = None
    over_http: bool = False

    @property
    def own_name(self) -> str:
        """The engine of ours that it meets."""
        return f"sleb {self.weights}" + (" http" if self.over_http else "")


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
        peers = [peer.name for peer in self.peers()]
        for name, values in (("--depths", self.depths), ("--tests", self.tests), ("--peer", peers)):
            if len(set(values)) < len(values) or not values:
                shown = ",".join(map(str, values))
                raise ConfigError(f"{name} is '{shown}'; name at least one, and each once")
        for name in self.tests:
            parse_test(name)

    def peers(self) -> list[Peer]:
        """Who takes part; llama.cpp once a format. Raises ConfigError."""
        texts = self.peer or (() if self.server else ("transformers",))
        found = [peer for text in texts for peer in parse_peer(text)]
        return found + [parse_server(text) for text in self.server]

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


def parse_peer(text: str) -> list[Peer]:
    """From transformers, NAME=PROGRAM[:MODEL] or llamacpp=FOLDER:FORMAT=FILE,…. Raises ConfigError."""
    name, _, rest = text.partition("=")
    program, _, model = rest.partition(":")
    path = Path(program).expanduser()
    if text == "transformers":
        return [Peer(name)]
    if program and (name in ("transformers", "vllm") or (name == "openvino" and model)):
        return [Peer(name, path, model or None)]
    files = [part.partition("=") for part in model.split(",")]
    if program and name == "llamacpp" and all(each in FORMATS and file for each, _, file in files):
        return [Peer(f"{name}-{each}", path, file, FORMATS[each], over_http=True) for each, _, file in files]
    raise ConfigError(
        f"--peer '{text}' is none of transformers, NAME=PYTHON[:MODEL] (transformers, vllm, openvino, which needs its "
        "model) and llamacpp=FOLDER:bf16=FILE,q8_0=FILE,q4_1=FILE; see sleb bench peers --how; a server: --server"
    )


def parse_server(text: str) -> Peer:
    """From NAME=URL[#MODEL]. Raises ConfigError."""
    name, _, rest = text.partition("=")
    url, _, model = rest.partition("#")
    if "://" not in url or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ConfigError(f"--server '{text}' is not NAME=URL, as vllm=http://127.0.0.1:8000/v1")
    return Peer(name, model=model or None, url=base_url(url), over_http=True)


class Entrants:
    """The engines of a run, loaded one after another, each stopped until its turn.

    Attributes:
        engines: those that are ready, by name; of ours "sleb bf16", and "sleb bf16 http" behind our server.
        failed: why a peer takes no part.
    """

    def __init__(self, options: PeersOptions, folder: Path, stack: ExitStack) -> None:
        """stack: ends what `start` has started."""
        self.options, self._folder, self._stack = options, folder, stack
        self.tests = [parse_test(name) for name in options.tests]
        self.engines: dict[str, Engine] = {}
        self.failed: list[Measurement] = []
        self._salt = secrets.token_hex(8)
        self._prompts = TokenPrompts(folder, options.seed)
        # Each has room for the same requests.
        self._batch = max(test.batch for test in self.tests)
        self._context = max(_LEAST_CONTEXT, *(test.context for test in self.tests))

    def start(self, say: Callable[[str], None]) -> None:
        """Raises SlebError for ours, and where no peer is left; one that fails is told, and takes no part."""
        for peer in self.options.peers():
            say(f"starting {peer.name}")
            try:
                self.engines[peer.name] = self._stack.enter_context(closing(self._peer(peer)))
            except (PeerError, ConfigError) as error:
                facts = {"failed": public_text(str(error))}
                self.failed.append(Measurement("start", peer.name, "tokens/s", None, facts=facts))
                say("\n".join([f"{error}; it takes no part", *getattr(error, "__notes__", ())]))
        if not self.engines:
            reason = self.failed[0].facts["failed"]
            raise ConfigError(f"no engine is left to compare with ({reason}); see sleb bench peers --how")
        for peer in self.options.peers():
            if peer.name in self.engines and peer.own_name not in self.engines:
                say(f"starting {peer.own_name}")
                self.engines[peer.own_name] = self._stack.enter_context(closing(self._ours(peer)))

    def _peer(self, peer: Peer) -> Engine:
        threads, kv_gib = self.options.num_threads, self.options.kv_gib
        if peer.url is not None:
            key = next(filter(None, map(os.environ.get, API_KEY_VARIABLES)), None)
            return ServerEngine(peer.name, peer.url, model=peer.model, api_key=key, salt=self._salt)
        if peer.over_http:
            words = [
                peer.program / "llama-server",
                "--model",
                peer.model,
                "--threads",
                threads,
                "--cache-ram",
                0,
            ]
            return self._server(
                peer.name, [*words, "--parallel", self._batch, "--ctx-size", self._batch * self._context]
            )
        environment = {"OMP_NUM_THREADS": str(threads)}
        if peer.name == "vllm":
            environment |= vllm_environment(peer.program, threads, kv_gib)
        load = {"model": peer.model or str(self._folder), "threads": threads, "kv_gib": kv_gib}
        load |= {"max_context": self._context, "max_batch": self._batch}
        return WorkerEngine(peer.name, peer.program, peer.name, load, self._prompts, environment)

    def _ours(self, peer: Peer) -> Engine:
        options = self.options
        own = {
            "dtype": "bfloat16",
            "weights": "auto" if peer.weights == "bf16" else peer.weights,
            "device": "cpu",
            "threads": options.num_threads,
            "max_model_len": self._context,
            "max_num_seqs": self._batch,
            "max_num_batched_tokens": max(2048, self._context),
            "kv_cache_memory": options.kv_gib,
            **({} if options.layer_map is None else {"layer_map": options.layer_map}),
        }
        if not peer.over_http:
            load = {"model": options.model, "tiers": list(options.depths), **own}
            return WorkerEngine(peer.own_name, Path(sys.executable), "sleb", load, self._prompts)
        flags = [word for name, value in own.items() for word in ("--" + name.replace("_", "-"), value)]
        tiers = ["--tiers", ",".join(map(str, options.depths)), "--no-prefix-caching"]
        words = [sys.executable, "-m", "sleb", "serve", options.model, *tiers, *flags]
        return self._server(peer.own_name, words, options.depths)

    def _server(self, name: str, words: Sequence[object], depths: Sequence[int] = (0,)) -> Engine:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # By way of the adapters' launcher, so that it dies with us.
        command = [sys.executable, ADAPTERS, "exec", *words, "--port", port]
        url = f"http://127.0.0.1:{port}/v1"
        return ServerEngine(name, url, salt=self._salt, depths=depths, command=command)

    def cases(self) -> Iterator[Case]:
        """A case for every test and peer that is there."""
        there = [peer for peer in self.options.peers() if peer.name in self.engines]
        for test, peer in itertools.product(self.tests, there):
            subjects = {peer.name: partial(self._run, peer.name, test, 0)}
            for depth in self.options.depths:
                subject = f"sleb {peer.weights}" + (f" depth {depth}" if depth else "")
                subjects[subject] = partial(self._run, peer.own_name, test, depth)
            name = f"{test} beside {peer.name}" + (" over HTTP" if peer.over_http else "")
            yield Case(name, subjects, baseline=peer.name)

    def _run(self, name: str, test: Workload, depth: int, turn: int) -> Sample:
        try:
            return {"tokens/s": self.engines[name].generate(test, turn, depth)}
        except PeerError as error:
            raise PeerError(public_text(str(error))) from None


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

    from sleb.benchmarks.environment import Conditions, describe_machine, peak_memory
    from sleb.models.resolve import resolve_model

    found = resolve_model(options.model)
    shown = public_command(command, None, [options.model])
    environment = describe_machine(torch.device("cpu"), torch.bfloat16, "", shown)
    names = ("repetitions", "seed", "kv_gib", "depths")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings |= {"model": found.name, "threads": options.num_threads}
    result = Result("peers", environment, settings)
    with ExitStack() as stack:
        entrants = Entrants(options, found.path.absolute(), stack)
        entrants.start(say)
        engines = entrants.engines
        ours = next(engine for name, engine in engines.items() if name.startswith("sleb "))
        environment |= {"threads": options.num_threads, "kernels": ours.facts.get("kernels")}
        settings["engines"] = {name: dict(engine.facts) for name, engine in engines.items()}

        def keep(turns: Turns, case: Case) -> None:
            result.measurements = turns.measurements() + entrants.failed
            on_turn(result, turns, case)

        conditions = Conditions(roots=lambda: [each.pid for each in engines.values() if each.pid])
        told: dict[str, Any] = {"watch": conditions, "on_progress": on_progress, "on_turn": keep}
        turns = measure(list(entrants.cases()), options, failing=(PeerError, ConfigError), **told)
        result.complete, result.measurements = turns.complete, turns.measurements() + entrants.failed
        result.measurements += [
            Measurement("peak memory", name, "MiB", peak_memory(engine.pid) / 2**20)
            for name, engine in engines.items()
            if engine.pid is not None
        ]
    environment |= conditions.summary()
    result.notes += [public_text(note) for engine in engines.values() for note in engine.notes]
    result.notes += conditions.notes()
    return result
