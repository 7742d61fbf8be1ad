"""Engines taking turns: starting them, running a test's repetitions, reading their memory."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleb.benchmarks.harness import Progress, alternated_orders
from sleb.benchmarks.idle import QuietPolicy, peak_memory, run_quietly
from sleb.benchmarks.peer_engines import LlamaCpp, WorkerRuns, vllm_environment
from sleb.benchmarks.peer_options import (
    DECODE_OUTPUT_TOKENS,
    DECODE_PROMPT_TOKENS,
    PeerSpec,
    PeerTest,
    Round,
    plan_rounds,
)
from sleb.benchmarks.peer_process import PeerError, Worker
from sleb.benchmarks.peer_results import Repetition, Samples, Turn, ours
from sleb.errors import ConfigError

# A prompt takes a fraction of a second, so a turn is the median of several.
_RUNS_OF_A_PROMPT = 3
_BANDWIDTH_BYTES = 512 << 20
_LEAST_CONTEXT = 2048
_LEAST_BATCH = 32


@dataclass(frozen=True)
class PeerOptions:
    """What to measure. kv_gib: room for keys and values, of every engine that wants to be told; command:
    as `shown_arguments` gives it; versions: by peer, for one that does not know its own."""

    model: Path
    peers: Sequence[PeerSpec]
    tests: Sequence[PeerTest]
    formats: Sequence[str]
    threads: int
    repetitions: int
    seed: int = 0
    kv_gib: float = 4.0
    versions: dict[str, str] = field(default_factory=dict)
    policy: QuietPolicy = field(default_factory=QuietPolicy)
    command: Sequence[str] = ()


class Contest:
    """All engines, loaded one after another, and what they have done so far.

    Attributes:
        samples: complete repetitions by test. memory: by engine, as `peak_memory`, once read.
        failures: what went wrong, by engine; it takes part no longer. first_tokens: of each engine's warm-ups.
        facts: what each engine said of itself when it was loaded.
    """

    def __init__(self, options: PeerOptions, report: Callable[[Progress], None]) -> None:
        self.options = options
        self.samples: Samples = {}
        self.memory: dict[str, dict[str, int]] = {}
        self.failures: dict[str, str] = {}
        self.first_tokens: dict[str, dict[str, list[int]]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.workers: dict[str, Worker] = {}
        self.llamas: dict[str, LlamaCpp] = {}
        self._bandwidth: Worker | None = None
        self._report = report
        self._rng = random.Random(options.seed)
        self._vocab_size = _vocab_size(options.model)
        self._num_done = 0
        self._num_runs = 0

    def start(self) -> None:
        """Starts and loads every engine. Raises PeerError, ConfigError; `close` is due all the same."""
        options = self.options
        for peer in options.peers:  # what can be checked at once, before minutes are spent
            if peer.name == "llamacpp":
                for weight_format, path in peer.models:
                    name, version = f"llamacpp-{weight_format}", options.versions.get("llamacpp")
                    self.llamas[name] = LlamaCpp(name, peer.program, path, options.threads, version)
                    self.facts[name] = self.llamas[name].facts
        python = Path(sys.executable)
        common = self._common()
        for weight_format in options.formats:
            extra = {
                "weight_format": weight_format,
                "shown_command": list(options.command),
                "decode_shape": (DECODE_PROMPT_TOKENS, DECODE_OUTPUT_TOKENS),
            }
            self._start(
                ours(weight_format), python, "ours_worker", None, model=str(options.model), **common, **extra
            )
        if any(test.single for test in options.tests):
            self._start_bandwidth(python)
        for peer in options.peers:
            if peer.name != "llamacpp":
                environment = {"OMP_NUM_THREADS": str(options.threads)}
                if peer.name == "vllm":
                    environment |= vllm_environment(peer.program, options.threads, options.kv_gib)
                model = dict(peer.models).get("bf16", options.model)
                module = f"{peer.name}_worker"
                self._start(peer.name, peer.program, module, environment, model=str(model), **common)
                self.facts[peer.name]["model"] = model.name

    def _common(self) -> dict[str, Any]:
        """Options that all workers take: each has room for the same requests."""
        options = self.options
        return {
            "threads": options.threads,
            "max_context": max(_LEAST_CONTEXT, *(test.context for test in options.tests)),
            "max_batch": max(_LEAST_BATCH, *(test.batch for test in options.tests)),
            "kv_gib": options.kv_gib,
        }

    def _start(
        self, name: str, python: Path, module: str, environment: dict[str, str] | None, **load: Any
    ) -> None:
        worker = self.workers[name] = Worker(name, python, module, environment)

        def waiting() -> None:
            self._report(Progress(0, 0, f"starting {name}"))

        waiting()
        worker.load(waiting, **load)
        self.facts[name] = {**worker.facts, "idle_share_of_a_processor": worker.idle_share}

    def _start_bandwidth(self, python: Path) -> None:
        self._bandwidth = Worker("bandwidth", python, "bandwidth_worker")
        try:
            self._bandwidth.load(threads=self.options.threads)
        except PeerError as error:
            self._give_up_bandwidth(error)

    def run(self, on_test: Callable[[], None]) -> None:
        """Measures all tests; on_test is called after each. Raises PeerError if an engine of ours fails."""
        plans = {test: self._rounds(test) for test in self.options.tests}
        turns = sum(len(each.sequence) for rounds in plans.values() for each in rounds)
        warm_ups = sum(len(self._warming(rounds)) for rounds in plans.values())
        self._num_runs = turns * self.options.repetitions + warm_ups
        for test in plans:
            self._run_test(test)
            on_test()
        self._report(Progress(self._num_done, self._num_runs, "done"))

    def _rounds(self, test: PeerTest) -> list[Round]:
        present = [
            name for peer in self.options.peers for name in peer.contestants if name not in self.failures
        ]
        return plan_rounds(test, self.options.formats, present)

    def _warming(self, rounds: Sequence[Round]) -> list[str]:
        """Who needs a warm-up: llama.cpp makes its own in every process."""
        names = [ours(weight_format) for each in rounds for weight_format in each.formats]
        return [
            name for name in dict.fromkeys([*names, *(each.peer for each in rounds)]) if name in self.workers
        ]

    def _run_test(self, test: PeerTest) -> None:
        self.samples.setdefault(test, [])
        prompts = self._prompts(test, 0)
        for name in self._warming(self._rounds(test)):
            self._say(test, name, "warm-up")
            try:
                self._warm_up(test, name, prompts)
            except PeerError as error:
                self._drop(error)
        rounds = self._rounds(test)
        orders = alternated_orders(range(len(rounds)), self.options.repetitions, self._rng)
        for number, order in enumerate(orders, 1):
            prompts = self._prompts(test, number)
            repetition = Repetition({}, [])
            self._read_bandwidth(test, repetition)
            for index in order:
                each = rounds[index]
                if each.peer in self.failures:
                    continue
                try:
                    turns = self._run_round(test, each, number, prompts)
                except PeerError as error:
                    self._drop(error)
                else:
                    repetition.rounds[each.peer] = turns
                self._read_bandwidth(test, repetition)
            self.samples[test].append(repetition)

    def _run_round(
        self, test: PeerTest, each: Round, number: int, prompts: list[list[int]]
    ) -> dict[str, Turn]:
        names = [ours(name) if name in each.formats else name for name in each.sequence]
        if number % 2 == 0:
            names.reverse()
        turns = {}
        for name in names:
            self._say(test, name, f"repetition {number} of {self.options.repetitions}")
            turns[name] = self._turn(test, name, prompts)
        return turns

    def _turn(self, test: PeerTest, name: str, prompts: list[list[int]]) -> Turn:
        worker = self.workers.get(name)
        num_runs = _RUNS_OF_A_PROMPT if test.kind == "prompt" else 1
        if worker is None:
            llama = self.llamas[name]
            done = run_quietly(lambda: llama.run(test, num_runs), (), self.options.policy)
        else:
            action = WorkerRuns(worker, test, prompts, num_runs)
            done = run_quietly(action, (worker.pid,), self.options.policy)
        self._num_done += 1
        rate, seconds = done.result
        return Turn(rate, seconds, done.others_share, done.disturbed, done.attempts)

    def _warm_up(self, test: PeerTest, name: str, prompts: list[list[int]]) -> None:
        action = WorkerRuns(self.workers[name], test, prompts, 1)
        action()
        self.first_tokens.setdefault(str(test), {})[name] = action.token_ids[:16]
        self._num_done += 1

    def _drop(self, error: PeerError) -> None:
        """A peer that fails takes part no longer; without ours there is nothing to compare."""
        failed = error.engine
        if failed.startswith("sleb-"):
            raise error
        self.failures[failed] = str(error)
        worker = self.workers.pop(failed, None)
        if worker is not None:
            worker.close(1.0)

    def _read_bandwidth(self, test: PeerTest, repetition: Repetition) -> None:
        worker = self._bandwidth
        if not test.single or worker is None:
            return
        try:
            done = run_quietly(
                lambda: worker.call("read", num_bytes=_BANDWIDTH_BYTES), (worker.pid,), self.options.policy
            )
        except PeerError as error:
            self._give_up_bandwidth(error)
            return
        if not done.disturbed:
            repetition.bandwidth.append(done.result["gb_per_second"])

    def _give_up_bandwidth(self, error: PeerError) -> None:
        self.failures["bandwidth"] = str(error)
        if self._bandwidth is not None:
            self._bandwidth.close(1.0)
        self._bandwidth = None

    def _prompts(self, test: PeerTest, repetition: int) -> list[list[int]]:
        """Random ordinary tokens, the same for all engines: special ones lie at the ends of a vocabulary."""
        rng = random.Random(f"{self.options.seed} {test} {repetition}")
        margin = min(200, self._vocab_size // 4)
        ids = range(margin, self._vocab_size - margin)
        return [rng.choices(ids, k=test.prompt_tokens) for _ in range(test.batch)]

    def _say(self, test: PeerTest, name: str, which: str) -> None:
        self._report(Progress(self._num_done, self._num_runs, f"{test}, {name}, {which}"))

    def read_memory(self) -> None:
        """Notes the peaks of all engines that serve bf16."""
        for name, worker in self.workers.items():
            if not name.startswith("sleb-") or name == ours("bf16"):
                worker.resume()
                self.memory[name] = peak_memory(worker.pid)
        llama = self.llamas.get("llamacpp-bf16")
        if llama is not None and llama.peak_rss:
            self.memory[llama.name] = {"peak_rss": llama.peak_rss, "pss": 0, "processes": 1}

    def close(self, grace_seconds: float = 10.0) -> None:
        """Ends all processes."""
        for worker in [*self.workers.values(), *([self._bandwidth] if self._bandwidth else [])]:
            worker.close(grace_seconds)


def _vocab_size(model: Path) -> int:
    try:
        return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{model} is no Hugging Face folder ({error}); peers want one, with a config.json"
        ) from None
