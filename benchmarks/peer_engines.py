"""How an engine is made to run a test, and the engines in Python, which a worker holds.

The others are llama.cpp (`peer_llamacpp`) and servers (`peer_servers`).
"""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from sleb.benchmarks.idle import peak_memory
from sleb.benchmarks.peer_options import PeerTest, tokens_per_second
from sleb.benchmarks.peer_process import MissingError, PeerError, Worker
from sleb.benchmarks.peer_prompts import Prompts


@dataclass
class Task:
    """One turn of one engine. num_runs: how often it runs the test, for a median; depth: of ours; as_text: no ids."""

    test: PeerTest
    prompts: Prompts
    repetition: int
    num_runs: int = 1
    depth: int = 0
    as_text: bool = False
    _run: int = 0

    def ids(self) -> list[list[int]]:
        """The prompts, the same in every run."""
        return self.prompts.ids(self.test, self.repetition)

    def fresh(self) -> list[list[int]] | list[str]:
        """The prompts of the next run, that no run had before."""
        self._run += 1
        return self.prompts.fresh(self.test, self.repetition, self._run, self.as_text)


@dataclass(frozen=True)
class Measured:
    """Tokens/s, the median of a turn's runs; the seconds behind it; the first answer of the last run."""

    rate: float
    seconds: list[float]
    token_ids: list[int] = field(default_factory=list)


class Engine(Protocol):
    """An engine that is ready.

    Attributes:
        name: of its process; facts: what it says of itself.
        pids: the processes that work for it, but for children of this one; None: they cannot be found.
        warms: whether it needs a run before the ones that count. takes_ids: whether it takes token ids.
    """

    name: str
    facts: dict[str, Any]
    pids: tuple[int, ...] | None
    warms: bool
    takes_ids: bool

    def turn(self, task: Task) -> Measured:
        """Runs a test. Raises PeerError."""
        ...

    def memory(self) -> dict[str, int] | None:
        """As `peak_memory`; None where it cannot be told."""
        ...

    def close(self, grace_seconds: float) -> None:
        """Ends what was started for it."""
        ...


class WorkerEngine:
    """An engine in a worker. Between its turns the worker sleeps if it spins. has_depths: whether it is ours."""

    warms = True
    takes_ids = True

    def __init__(self, worker: Worker, has_depths: bool = False) -> None:
        self.name = worker.name
        self.facts: dict[str, Any] = {**worker.facts, "idle_share_of_a_processor": worker.idle_share}
        self.pids: tuple[int, ...] | None = (worker.pid,)
        self._worker, self._has_depths = worker, has_depths

    def turn(self, task: Task) -> Measured:
        """One stream is timed twice a run: whole, and cut to its first token. Raises PeerError."""
        test, prompts = task.test, task.ids()
        rates: list[float] = []
        seconds: list[float] = []
        token_ids: list[int] = []
        self._worker.resume()
        try:
            for _ in range(task.num_runs):
                first = self._run(task, prompts, 1)[0] if test.single else 0.0
                whole, token_ids = self._run(task, prompts, test.output_tokens)
                rates.append(tokens_per_second(test, whole, first))
                seconds += [first, whole] if test.single else [whole]
        finally:
            self._worker.pause()
        return Measured(median(rates), seconds, token_ids)

    def _run(self, task: Task, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[int]]:
        """Seconds, and the first answer."""
        request: dict[str, Any] = {"prompts": prompts, "max_tokens": max_tokens}
        if self._has_depths:
            request["depth"] = task.depth
        answer = self._worker.call("run", **request)
        expected = len(prompts) * max_tokens
        if answer["num_tokens"] != expected:
            raise PeerError(
                f"{self.name} gave {answer['num_tokens']} tokens instead of {expected}", self.name
            )
        return float(answer["seconds"]), answer["token_ids"]

    def memory(self) -> dict[str, int] | None:
        """Of the worker and its children."""
        self._worker.resume()
        return peak_memory(self._worker.pid)

    def close(self, grace_seconds: float) -> None:
        """Ends the worker."""
        self._worker.close(grace_seconds)


def vllm_environment(python: Path, threads: int, kv_gib: int) -> dict[str, str]:
    """The variables that vLLM's CPU backend wants. Raises MissingError if a library to preload is missing."""
    folder = python.parent.parent
    openmp = folder / "lib" / "libiomp5.so"
    if not openmp.is_file():
        raise MissingError(
            f"{openmp} is missing, which vLLM for CPUs installs; name its environment's own Python", "vllm"
        )
    processors = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "LD_PRELOAD": f"{find_tcmalloc()}:{openmp}",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def find_tcmalloc(roots: Sequence[Path] = (Path("/usr/lib"), Path("/usr/local/lib"))) -> str:
    """Path or name of tcmalloc, without which vLLM on a CPU is a good deal slower. Raises MissingError."""
    for root in roots:
        for pattern in ("*/libtcmalloc_minimal.so.4", "libtcmalloc_minimal.so.4", "*/libtcmalloc.so.4"):
            for path in sorted(root.glob(pattern)):
                return str(path)
    found = ctypes.util.find_library("tcmalloc_minimal")
    if found is None:
        raise MissingError(
            "vLLM wants tcmalloc, which is not here; install libtcmalloc-minimal4 (Debian, Ubuntu)", "vllm"
        )
    return found
