"""Other engines as `sleb bench peers` drives them: what all share, and those in Python, in workers."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sleb.benchmarks.prompts import TokenPrompts
from sleb.benchmarks.workloads import Workload
from sleb.errors import ConfigError, SlebError

ADAPTERS = Path(__file__).resolve().with_name("adapters.py")
RUN_SECONDS = 900.0
_LOG_LINES = 15


class PeerError(SlebError):
    """An engine failed, in one line; its notes are what its process wrote last."""


def parse_test(name: str) -> Workload:
    """From decode-8 or prompt-512, say; one stream is timed without its prompt. Raises ConfigError."""
    kind, _, number = name.partition("-")
    if kind not in ("decode", "prompt") or not number.isdecimal() or not 0 < int(number[:8]) <= 1 << 20:
        raise ConfigError(
            f"test '{name[:40]}' is not known; write decode-STREAMS or prompt-TOKENS, as decode-8"
        )
    if kind == "prompt":
        return Workload("prompt", 1, int(number), 1)
    return Workload("decode" if number == "1" else "generate", int(number), 64, 128)


def rate(test: Workload, seconds: float, first_seconds: float) -> float:
    """Tokens/s of a run; first_seconds: to its first token, or of the same run cut to it.

    One stream: (n − 1) / (t(n tokens) − t(1 token)). Several: all new tokens over the whole time, prompts included.
    A prompt: its tokens over the time to the first new one.
    """
    counted = {"prompt": first_seconds, "decode": seconds - first_seconds, "generate": seconds}[test.test]
    return test.counted_tokens / max(counted, 1e-9)


class Engine:
    """An engine that is ready, loaded by its constructor, in a process group of its own where `words` start one.

    The group is stopped between turns, since many engines keep a processor busy while they wait. It stays in our
    session: should we be killed meanwhile, the system ends it, as it does with every stopped group that loses its last
    tie to a session (SIGHUP and SIGCONT, see setpgid(2) and exit(3p)).

    Attributes:
        facts: what it says of itself. notes: what a reader of its figures must know.
        pid: of the process that was started; None for a server that ran already.
    """

    notes: Sequence[str] = ()
    pid: int | None = None

    def __init__(
        self,
        name: str,
        words: Sequence[object] = (),
        environment: Mapping[str, str] | None = None,
        stdout: int = subprocess.DEVNULL,
    ) -> None:
        """Raises PeerError."""
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._process: subprocess.Popen[str] | None = None
        try:
            if words:
                self._process = subprocess.Popen(
                    list(map(str, words)),
                    stdin=subprocess.PIPE,
                    stdout=stdout,
                    stderr=self._log,
                    env={**os.environ, **(environment or {})},
                    process_group=0,
                    text=True,
                )
                self.pid = self._process.pid
            self.facts: Mapping[str, Any] = self._load()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise PeerError(f"{name}: {words[0]} cannot be run ({error.strerror})") from None
            raise
        self._signal(signal.SIGSTOP)

    def _load(self) -> Mapping[str, Any]:
        """Its facts, when it is ready."""
        raise NotImplementedError

    def _run(self, test: Workload, number: int, depth: int) -> float:
        """Tokens/s on the prompts of this number, which are the same for all engines."""
        raise NotImplementedError

    def generate(self, test: Workload, turn: int, depth: int = 0) -> float:
        """Tokens/s of one turn. Raises PeerError."""
        num_runs = 3 if test.test == "prompt" else 1  # a prompt takes a fraction of a second
        self._signal(signal.SIGCONT)
        try:
            return median(self._run(test, turn * num_runs + run, depth) for run in range(num_runs))
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended; the next run says so
            if self.pid is not None:
                os.killpg(self.pid, number)

    def failure(self, what: str = "") -> PeerError:
        """An error with what the process wrote last; without `what`, that it has not answered."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        what = what or f"it ended, or gave no answer in time ({lines[-1] if lines else 'its log is empty'})"
        error = PeerError(f"{self.name}: {' '.join(what.split())}")
        error.add_note("\n".join(lines[-_LOG_LINES:]))
        return error

    def close(self) -> None:
        """Ends the process, its children too, by force if they do not go by themselves."""
        self._log.close()
        process, self._process = self._process, None
        if process is None:
            return
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        self._signal(signal.SIGKILL)
        with contextlib.suppress(OSError), process:
            pass  # closes its pipes, and waits


class WorkerEngine(Engine):
    """An engine in Python, held by `adapters.py`: token ids in, token ids out."""

    def __init__(
        self,
        name: str,
        python: Path,
        adapter: str,
        options: Mapping[str, Any],
        prompts: TokenPrompts,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._options, self._prompts = options, prompts
        super().__init__(name, [python, ADAPTERS, adapter], environment, subprocess.PIPE)

    def _load(self) -> Mapping[str, Any]:
        return self._ask(self._options)

    def _run(self, test: Workload, number: int, depth: int) -> float:
        """One stream is timed twice: cut to its first token, and whole."""
        request: dict[str, Any] = {"prompts": self._prompts.make(test.batch, test.prompt_tokens, number)}
        if depth:
            request["depth"] = depth
        lengths = [1, test.output_tokens] if test.test == "decode" else [test.output_tokens]
        seconds = [self._ask({**request, "max_tokens": length})["seconds"] for length in lengths]
        return rate(test, seconds[-1], seconds[0])

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        timer = threading.Timer(RUN_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            raise self.failure() from None
        finally:
            timer.cancel()
        if "error" in answer:
            raise self.failure(answer["error"])
        return answer


def vllm_environment(python: Path, threads: int, kv_gib: int) -> dict[str, str]:
    """The variables that vLLM's CPU backend wants. Raises PeerError if a library to preload is missing.

    Without tcmalloc it is a good deal slower.
    """
    openmp = python.absolute().parent.parent / "lib" / "libiomp5.so"
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    if tcmalloc is None or not openmp.is_file():
        missing = openmp if tcmalloc else "tcmalloc (Debian's libtcmalloc-minimal4)"
        raise PeerError(f"vllm: {missing} is missing; see sleb bench peers --how")
    return {
        "LD_PRELOAD": f"{tcmalloc}:{openmp}",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
