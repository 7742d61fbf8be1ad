"""The engines that take part: starting them, dropping those that fail, ending them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleb.benchmarks.harness import Progress
from sleb.benchmarks.peer_engines import Engine, Task, WorkerEngine, vllm_environment
from sleb.benchmarks.peer_install import lines_for
from sleb.benchmarks.peer_llamacpp import LlamaCpp
from sleb.benchmarks.peer_options import (
    DECODE_OUTPUT_TOKENS,
    DECODE_PROMPT_TOKENS,
    Own,
    PeerOptions,
    PeerSpec,
    PeerTest,
    Round,
    is_ours,
    plan_rounds,
)
from sleb.benchmarks.peer_process import MissingError, PeerError, UnableError, Worker
from sleb.benchmarks.peer_prompts import Prompts
from sleb.benchmarks.peer_servers import find_server, serve_ours
from sleb.benchmarks.peer_weights import declared_format, ir_format, is_quantised
from sleb.errors import ConfigError

_LEAST_CONTEXT = 2048
_LEAST_BATCH = 32
_PYTHON = Path(sys.executable)


class Entrants:
    """The engines of a contest, loaded one after another.

    Attributes:
        engines: those that are ready; facts: what each said of itself, of those too that have failed since.
        failures: what went wrong, by engine, which takes part no longer, or by "engine, test".
        notices: what a reader of the results must know. bandwidth: the worker that reads memory, if it is wanted.
    """

    def __init__(
        self, options: PeerOptions, report: Callable[[Progress], None], say: Callable[[str], None]
    ) -> None:
        options.check()
        self.options = options
        self.engines: dict[str, Engine] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.notices: list[str] = []
        self.bandwidth: Worker | None = None
        self._prompts = Prompts(options.folder, options.seed)
        self._own: dict[str, Own] = {}
        self._workers: list[Worker] = []
        self._unable: set[tuple[PeerTest, str]] = set()
        self._report, self._say = report, say

    @property
    def own(self) -> list[Own]:
        """Ours, once they are known."""
        return list(self._own.values())

    def start(self) -> None:
        """Starts every engine that can be. Raises PeerError, ConfigError; `close` is due all the same."""
        options = self.options
        for peer in options.peers:  # what can be checked at once, before minutes are spent
            self._look_at(peer)
        for server in options.servers:
            with self.dropping(server.name):
                self._add(find_server(server, options.api_key, self._prompts))
                self._note_server(server.name)
        rounds = [each for test in options.tests for each in self.rounds(test)]
        if not rounds:
            self._nobody()
        self._own = {own.name: own for each in rounds for own in each.own}
        for own in {own.engine: own for own in self._own.values()}.values():
            self._start_ours(own)
        if any(test.single for test in options.tests) and not all(own.http for own in self._own.values()):
            self._start_bandwidth()
        for peer in options.peers:
            if peer.name != "llamacpp" and peer.name not in self.failures:
                with self.dropping(peer.name):
                    self._start_python(peer)
        if not any(self.rounds(test) for test in options.tests):
            self._nobody()

    def _nobody(self) -> None:
        if self.failures:
            first = next(iter(self.failures.values()))
            raise ConfigError(f"no engine is left to compare with ({first}); see sleb bench peers --how")
        formats = ", ".join(self.options.formats or ())
        raise ConfigError(f"--formats {formats} meets none of the peers: only llama.cpp has int8 and int4")

    def _look_at(self, peer: PeerSpec) -> None:
        with self.dropping(*peer.contestants):
            if peer.problem is not None:
                raise MissingError(f"{peer.name}: {peer.problem}", peer.name)
        if peer.name == "llamacpp" and peer.problem is None:
            for name, (_, path) in zip(peer.contestants, peer.models, strict=True):
                with self.dropping(name):
                    version = self.options.versions.get("llamacpp")
                    llama = LlamaCpp(name, peer.program, path, self.options.threads, version)
                    self._add(llama)
                    self.notices += [llama.notice] if llama.notice else []

    def _start_ours(self, own: Own) -> None:
        options = self.options
        common = self._common()
        worker = self._worker(
            own.engine,
            _PYTHON,
            "ours_worker",
            None,
            model=options.model,
            layer_map=options.layer_map,
            depths=list(options.depths),
            weight_format=own.weight_format,
            # Behind HTTP as `sleb serve` comes; else what the other engines in Python get.
            step_tokens=None if own.http else max(2048, common["max_context"]),
            shown_command=list(options.command),
            decode_shape=(DECODE_PROMPT_TOKENS, DECODE_OUTPUT_TOKENS),
            **common,
        )
        self._add(serve_ours(worker) if own.http else WorkerEngine(worker, has_depths=True))

    def _start_python(self, peer: PeerSpec) -> None:
        options = self.options
        environment = {"OMP_NUM_THREADS": str(options.threads)}
        if peer.name == "vllm":
            environment |= vllm_environment(peer.program, options.threads, options.kv_gib)
        model = dict(peer.models).get("bf16", options.folder)
        module = f"{peer.name}_worker"
        worker = self._worker(
            peer.name, peer.program, module, environment, model=str(model), **self._common()
        )
        engine = WorkerEngine(worker)
        engine.facts["model"] = options.model_name if model == options.folder else model.name
        engine.facts["weights"] = ir_format(model) if peer.name == "openvino" else declared_format(model)
        self._add(engine)
        self._note_weights(peer.name)

    def _start_bandwidth(self) -> None:
        with self.dropping("bandwidth"):
            self.bandwidth = self._worker(
                "bandwidth", _PYTHON, "bandwidth_worker", None, threads=self.options.threads
            )

    def _common(self) -> dict[str, Any]:
        """Options that all workers take: each has room for the same requests."""
        options = self.options
        return {
            "threads": options.threads,
            "max_context": max(_LEAST_CONTEXT, *(test.context for test in options.tests)),
            "max_batch": max(_LEAST_BATCH, *(test.batch for test in options.tests)),
            "kv_gib": options.kv_gib,
        }

    def _worker(
        self, name: str, python: Path, module: str, environment: dict[str, str] | None, **load: Any
    ) -> Worker:
        """A worker that has loaded its engine."""
        worker = Worker(name, python, module, environment)
        self._workers.append(worker)

        def waiting() -> None:
            self._report(Progress(0, 1, f"starting {name}"))

        waiting()
        try:
            worker.load(waiting, **load)
        except PeerError:
            worker.close(1.0)
            raise
        return worker

    def _add(self, engine: Engine) -> None:
        self.engines[engine.name] = engine
        self.facts[engine.name] = engine.facts

    def _note_weights(self, name: str) -> None:
        """Of an engine that meets ours in bf16."""
        weights = self.facts[name].get("weights")
        if is_quantised(weights):
            self.notices.append(
                f"{name} has quantised weights ({weights}), though it is compared with bf16 ones."
            )

    def _note_server(self, name: str) -> None:
        engine = self.engines[name]
        if "bf16" in (self.options.formats or ("bf16",)):
            self._note_weights(name)
        if engine.pids is None:
            self.notices.append(
                f"{name} runs on this machine, but its processes cannot be found: whether others disturbed its turns "
                "is not known."
            )
        elif not engine.pids:
            self.notices.append(f"{name} runs on another machine: its ratios compare the machines too.")
        slots, batch = engine.facts.get("parallel"), max(test.batch for test in self.options.tests)
        if isinstance(slots, int) and slots < batch:
            self.notices.append(
                f"{name} computes {slots} requests at once: of {batch} streams the others wait."
            )

    def rounds(self, test: PeerTest) -> list[Round]:
        """Who meets whom in `test`, of those that still take part in it."""
        options = self.options
        present = [name for name in options.peer_names if self.takes_part(name, test)]
        return plan_rounds(options, test, present)

    def takes_part(self, name: str, test: PeerTest) -> bool:
        """Whether nothing has kept a peer from `test` so far."""
        return name not in self.failures and (test, name) not in self._unable

    def engine(self, name: str) -> Engine:
        """Of a contestant."""
        own = self._own.get(name)
        return self.engines[name if own is None else own.engine]

    def task(self, test: PeerTest, name: str, repetition: int, num_runs: int = 1) -> Task:
        """What contestant `name` is to do."""
        own = self._own.get(name)
        depth = 0 if own is None else own.depth
        return Task(test, self._prompts, repetition, num_runs, depth, not self.engine(name).takes_ids)

    @contextmanager
    def dropping(self, *names: str, test: PeerTest | None = None) -> Iterator[None]:
        """What fails inside takes part no longer, or not in `test`; without ours there is nothing to compare."""
        try:
            yield
        except PeerError as error:
            if is_ours(error.engine) or any(map(is_ours, names)):
                raise
            if test is not None and isinstance(error, UnableError):
                self._unable.add((test, error.engine))
                self.failures[f"{error.engine}, {test}"] = str(error)
                self._say(f"{error}; it takes no part in {test}")
                return
            for name in names:
                self.failures[name] = str(error)
                engine = self.engines.pop(name, None)
                if engine is not None:
                    engine.close(1.0)
            self._tell(error)

    def _tell(self, error: PeerError) -> None:
        self._say(f"{error}; it takes no part")
        more = lines_for(error.engine) if isinstance(error, MissingError) else error.details
        if more:
            self._say("\n".join(f"  {line}" for line in more.splitlines()))

    def memory(self) -> dict[str, dict[str, int]]:
        """The peaks of all engines on this machine, as `peak_memory`."""
        found = {name: engine.memory() for name, engine in self.engines.items()}
        return {name: peaks for name, peaks in found.items() if peaks is not None}

    def close(self, grace_seconds: float = 10.0) -> None:
        """Ends all processes that were started."""
        for worker in self._workers:
            worker.close(grace_seconds)
