"""Other engines as `sleb bench peers` drives them: in a worker process, or by their own benchmarks."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import re
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

from sleb.benchmarks.installs import INSTALLS
from sleb.benchmarks.prompts import TokenPrompts
from sleb.errors import ConfigError, SlebError

ADAPTERS = Path(__file__).resolve().with_name("adapters.py")
# Tokens of a prompt and of its answer in the decode tests.
DECODE_PROMPT_TOKENS, DECODE_OUTPUT_TOKENS = 64, 128
# A prompt takes a fraction of a second, so a turn is the median of several runs.
_RUNS_OF_A_PROMPT = 3
_MOST = {"decode": 1024, "prompt": 1 << 20}
RUN_SECONDS = 900.0
_LOG_LINES = 15
_NOT_INSTALLED = ("ModuleNotFoundError", "ImportError", "PackageNotFoundError")
# llama.cpp's names of file types (llama_ftype_name in src/llama-model-loader.cpp), which end its line about a model.
_GGUF_TYPE = re.compile(
    r"(?:^|\s)(?:\(guessed\) )?(all F32|BF16|F16|I?Q\d\w*|TQ\d\w*|MXFP4 MoE|NVFP4)(?: .+)?$"
)


class PeerError(SlebError):
    """An engine failed. The message is one line; details: what its process wrote last, or how it is installed."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.details = details


@dataclass(frozen=True)
class PeerTest:
    """decode: `batch` answers after short prompts. prompt: one token after a prompt of prompt_tokens."""

    kind: Literal["decode", "prompt"]
    batch: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, name: str) -> PeerTest:
        """From decode-8 or prompt-512, say. Raises ConfigError."""
        found = re.fullmatch(r"(decode|prompt)-([1-9][0-9]{0,6})", name.strip())
        if found is None or int(found[2]) > _MOST[found[1]]:
            raise ConfigError(
                f"test '{name[:40]}' is not known; write decode-STREAMS (1 to 1024) or prompt-TOKENS (1 to 1048576), "
                "as decode-8"
            )
        if found[1] == "decode":
            return cls("decode", int(found[2]), DECODE_PROMPT_TOKENS, DECODE_OUTPUT_TOKENS)
        return cls("prompt", 1, int(found[2]), 1)

    @property
    def single(self) -> bool:
        """Whether it is one stream, whose first token is taken out of the time."""
        return self.kind == "decode" and self.batch == 1

    @property
    def num_runs(self) -> int:
        """Of a turn, whose median counts."""
        return _RUNS_OF_A_PROMPT if self.kind == "prompt" else 1

    def __str__(self) -> str:
        """As `sleb bench throughput` calls the same."""
        if self.kind == "prompt":
            return f"prompt 1 × {self.prompt_tokens}"
        name = "decode" if self.single else "generate"
        return f"{name} {self.batch} × {self.output_tokens} after {self.prompt_tokens}"

    def rate(self, seconds: float, first_seconds: float) -> float:
        """Tokens/s of a run; first_seconds: to its first token, or of the same run cut to it.

        One stream: (n − 1) / (t(n tokens) − t(1 token)). Several: all new tokens over the whole time, prompts included.
        A prompt: its tokens over the time to the first new one.
        """
        if self.kind == "prompt":
            return self.prompt_tokens / first_seconds
        if self.single:
            return (self.output_tokens - 1) / max(seconds - first_seconds, 1e-9)
        return self.batch * self.output_tokens / seconds


class Engine(Protocol):
    """An engine that is ready: load is its constructor. facts: what it says of itself."""

    name: str
    facts: Mapping[str, Any]

    @property
    def pid(self) -> int | None:
        """Of the process that computes, with its children; None where there is none, or it is not known."""

    def generate(self, test: PeerTest, turn: int, depth: int = 0) -> float:
        """Tokens/s of one turn. Raises PeerError."""

    def peak_bytes(self) -> int | None:
        """Of memory; None where it cannot be told."""

    def close(self) -> None:
        """Ends what was started for it."""


class Program:
    """A process group of its own, which ends with us. Raises PeerError if it cannot be run.

    The group stays in our session: should we be killed while it is stopped, the system ends it, as it does with every
    stopped group that loses its last tie to a session (SIGHUP and SIGCONT, see setpgid(2) and exit(3p)).
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        stdout: int = subprocess.PIPE,
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        try:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=self._log,
                env={**os.environ, **(environment or {})},
                process_group=0,
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"{name}: {words[0]} cannot be run ({error.strerror})", _install(name)) from None
        self.pid = self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP between turns: many engines keep a processor busy while they wait. SIGCONT before one."""
        with contextlib.suppress(ProcessLookupError):  # it has ended; the next call says so
            os.killpg(self.pid, number)

    def failure(self, what: str, details: str = "") -> PeerError:
        """An error with what the process wrote last."""
        self._log.flush()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return PeerError(f"{self.name} {what}", details or "\n".join(lines[-_LOG_LINES:]))

    def close(self, grace_seconds: float = 5.0) -> None:
        """Ends the process, its children too, by force if they do not go by themselves."""
        if self._log.closed:
            return
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_seconds)
        self.signal(signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self._log):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


class WorkerEngine:
    """An engine in Python, held by `adapters.py`: token ids in, token ids out."""

    def __init__(
        self,
        name: str,
        python: Path,
        adapter: str,
        load: Mapping[str, Any],
        prompts: TokenPrompts,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Raises PeerError; for what the user gave, as a depth that is none, ConfigError."""
        self.name, self._prompts = name, prompts
        self._program = Program(name, [str(python), str(ADAPTERS), adapter], environment)
        self.pid: int | None = self._program.pid
        self._buffer = b""
        try:
            self.facts: Mapping[str, Any] = self._ask(load, "load")
        except BaseException:
            self.close()
            raise
        self._program.signal(signal.SIGSTOP)

    def generate(self, test: PeerTest, turn: int, depth: int = 0) -> float:
        """One stream is timed twice a run: whole, and cut to its first token."""
        prompts, rates = self._prompts.make(test.batch, test.prompt_tokens, turn), []
        more = {"depth": depth} if depth else {}
        self._program.signal(signal.SIGCONT)
        try:
            for _ in range(test.num_runs):
                first = 0.0
                if test.single or test.kind == "prompt":
                    first = self._ask({"prompts": prompts, "max_tokens": 1, **more}, "run")["seconds"]
                whole = first
                if test.kind == "decode":
                    request = {"prompts": prompts, "max_tokens": test.output_tokens, **more}
                    whole = self._ask(request, "run")["seconds"]
                rates.append(test.rate(whole, first))
        finally:
            self._program.signal(signal.SIGSTOP)
        return median(rates)

    def _ask(self, request: Mapping[str, Any], what: str) -> dict[str, Any]:
        process = self._program.process
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + RUN_SECONDS
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise self._program.failure(f"ended instead of answering '{what}'") from None
        while b"\n" not in self._buffer:
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._program.failure(f"gave no answer to '{what}' in time")
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                raise self._program.failure(f"ended instead of answering '{what}'")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if error := answer.get("error"):
            if answer["is_told"]:
                raise ConfigError(error)
            is_missing = error.startswith(_NOT_INSTALLED)
            raise self._program.failure(
                f"failed to {what}: {error}", _install(self.name) if is_missing else ""
            )
        return answer

    def peak_bytes(self) -> int | None:
        return peak_memory_of(self._program.pid)

    def close(self) -> None:
        self._program.close()


def peak_memory_of(pid: int) -> int:
    """As `environment.peak_memory`."""
    from sleb.benchmarks.environment import peak_memory  # which imports torch

    return peak_memory(pid)


def _install(name: str) -> str:
    return INSTALLS.get(name.partition("-")[0], "")


def vllm_environment(python: Path, threads: int, kv_gib: int) -> dict[str, str]:
    """The variables that vLLM's CPU backend wants. Raises PeerError if a library to preload is missing."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if not openmp.is_file():
        message = (
            f"vllm: {openmp} is missing, which vLLM for CPUs installs; name its environment's own Python"
        )
        raise PeerError(message, INSTALLS["vllm"])
    processors = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "LD_PRELOAD": f"{find_tcmalloc()}:{openmp}",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def find_tcmalloc(roots: Sequence[Path] = (Path("/usr/lib"), Path("/usr/local/lib"))) -> str:
    """Path or name of tcmalloc, without which vLLM on a CPU is a good deal slower. Raises PeerError."""
    for root in roots:
        for path in sorted(root.glob("**/libtcmalloc_minimal.so.4")):
            return str(path)
    found = ctypes.util.find_library("tcmalloc_minimal")
    if found is None:
        message = "vllm wants tcmalloc, which is not here; install libtcmalloc-minimal4 (Debian, Ubuntu)"
        raise PeerError(message, INSTALLS["vllm"])
    return found


class LlamaCpp:
    """llama.cpp with one model file, by its own benchmarks: a process a run, which makes its prompts and warms up.

    Raises PeerError where its programs or the file are not there, or the file is of another format than `name` says.
    """

    pid: int | None = None

    def __init__(
        self, name: str, folder: Path, model: Path, threads: int, version: str | None = None
    ) -> None:
        self.name, self._folder, self._model, self._threads = name, folder, model, threads
        self._peak = 0
        if missing := [
            each for each in ("llama-bench", "llama-batched-bench") if not (folder / each).is_file()
        ]:
            message = f"{name}: {folder} lacks {missing[0]}; name the folder with llama.cpp's binaries"
            raise PeerError(message, INSTALLS["llamacpp"])
        if not model.is_file():
            raise PeerError(f"{name}: there is no model file {model}")
        with self._explained():
            told = json.loads(self._execute("llama-bench", "-p", "1", "-n", "0", "-r", "1", "-o", "json"))[0]
        found = _GGUF_TYPE.search(str(told.get("model_type")))
        claimed = name.removeprefix("llamacpp-")
        if found is not None and found[1].lower() != claimed:
            raise PeerError(
                f"{name}: {model.name} holds {found[1].lower()} weights, as llama-bench says "
                f"({told['model_type']}); give a file of {claimed} ones"
            )
        known = {"version": version or told.get("build_commit"), "model": told.get("model_type")}
        self.facts: Mapping[str, Any] = known

    def generate(self, test: PeerTest, turn: int, depth: int = 0) -> float:
        """llama-bench for a prompt, or for one stream that begins behind as many tokens as ours.

        llama-batched-bench for several streams: its prompts end with the logits of the first new token, which it does
        not count, so it makes one step fewer for as many tokens as the others give.
        """
        shape = ["-p", str(test.prompt_tokens), "-n", "0"]
        if test.single:
            shape = ["-p", "0", "-n", str(test.output_tokens), "-d", str(test.prompt_tokens)]
        with self._explained():
            if test.kind == "prompt" or test.single:
                runs = ("-r", str(test.num_runs), "-o", "json")
                samples: list[float] = json.loads(self._execute("llama-bench", *shape, *runs))[0][
                    "samples_ns"
                ]
                tokens = test.output_tokens if test.single else test.prompt_tokens
                return tokens / median(samples) * 1e9
            context = test.batch * (test.prompt_tokens + test.output_tokens) + 256
            shape = [
                "-npp",
                str(test.prompt_tokens),
                "-ntg",
                str(test.output_tokens - 1),
                "-npl",
                str(test.batch),
            ]
            rest = ("-c", str(context), "-b", "2048", "-ub", "512", "-tb", str(self._threads))
            lines = self._execute(
                "llama-batched-bench", *shape, *rest, "--output-format", "jsonl"
            ).splitlines()
            seconds = next(float(json.loads(line)["t"]) for line in lines if line.startswith("{"))
            return test.batch * test.output_tokens / seconds

    @contextlib.contextmanager
    def _explained(self) -> Any:
        try:
            yield
        except OSError as error:
            raise PeerError(
                f"{self.name} cannot be run ({error.strerror}); build it on this machine"
            ) from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
            raise PeerError(f"{self.name} printed a result of another form ({error})") from None

    def _execute(self, program: str, *arguments: str) -> str:
        words = [str(self._folder / program), "-m", str(self._model), "-t", str(self._threads), *arguments]
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=log)
            timer = threading.Timer(RUN_SECONDS, process.kill)
            timer.start()
            try:
                _, status, usage = os.wait4(process.pid, 0)  # which tells its memory
            except BaseException:
                process.kill()
                process.wait()
                raise
            finally:
                timer.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            self._peak = max(self._peak, usage.ru_maxrss * 1024)
            log.seek(0)
            if process.returncode:
                lines = log.read().decode("utf-8", "replace").strip().splitlines()
                raise PeerError(
                    f"{self.name} ended with {process.returncode}", "\n".join(lines[-_LOG_LINES:])
                )
            output.seek(0)
            return output.read().decode("utf-8", "replace")

    def peak_bytes(self) -> int | None:
        return self._peak

    def close(self) -> None:
        """Nothing is left of a run."""
