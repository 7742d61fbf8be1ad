"""How each kind of engine is made to run a test: a worker by its protocol, llama.cpp by its own benchmarks."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sleb.benchmarks.peer_options import PeerTest, tokens_per_second
from sleb.benchmarks.peer_process import PeerError, Worker, end_group, log_tail
from sleb.errors import ConfigError


class WorkerRuns:
    """A worker's runs of a test, between its waking up and its going to sleep. token_ids: of the last run."""

    def __init__(self, worker: Worker, test: PeerTest, prompts: list[list[int]], num_runs: int) -> None:
        self._worker, self._test, self._prompts, self._num_runs = worker, test, prompts, num_runs
        self.token_ids: list[int] = []

    def __call__(self) -> tuple[float, list[float]]:
        """Tokens/s, median of the runs, and the seconds of each; of one stream, of its first token too."""
        rates, seconds = [], []
        self._worker.resume()
        try:
            for _ in range(self._num_runs):
                first = self._run(1) if self._test.single else 0.0
                whole = self._run(self._test.output_tokens)
                rates.append(tokens_per_second(self._test, whole, first))
                seconds += [first, whole] if self._test.single else [whole]
        finally:
            self._worker.pause()
        return median(rates), seconds

    def _run(self, max_tokens: int) -> float:
        answer = self._worker.call("run", prompts=self._prompts, max_tokens=max_tokens)
        expected = len(self._prompts) * max_tokens
        if answer["num_tokens"] != expected:
            raise PeerError(
                f"{self._worker.name} gave {answer['num_tokens']} tokens instead of {expected}",
                self._worker.name,
            )
        self.token_ids = answer["token_ids"]
        return float(answer["seconds"])


class LlamaCpp:
    """llama.cpp with one model file, a process a run.

    Attributes: peak_rss: the largest of any run so far, in bytes.
    """

    def __init__(
        self, name: str, folder: Path, model: Path, threads: int, version: str | None = None
    ) -> None:
        self.name = name
        self.peak_rss = 0
        self._folder, self._model, self._threads = folder, model, threads
        for program in ("llama-bench", "llama-batched-bench"):
            if not os.access(folder / program, os.X_OK):
                raise ConfigError(f"{folder} lacks {program}; name the folder with llama.cpp's binaries")
        self.facts: dict[str, Any] = {
            "version": version or self._own_version(),
            "model": model.name,
            "dtype": name.removeprefix("llamacpp-"),
            "settings": {"kv_cache_dtype": "f16"},
        }

    def run(self, test: PeerTest, num_runs: int) -> tuple[float, list[float]]:
        """Tokens/s, a median of num_runs in one process (of one run for several streams), and the seconds of each.

        Its own warm-up goes before. For one stream the seconds are those of the tokens after the prompt. Raises
        PeerError.
        """
        if test.kind == "decode" and test.batch > 1:
            lines = self._execute(self.batched_arguments(test)).splitlines()
            seconds = [float(json.loads(line)["t"]) for line in lines if line.startswith("{")]
            tokens = test.batch * test.output_tokens
        else:
            result = json.loads(self._execute(self.bench_arguments(test, num_runs)))[0]
            seconds = [nanoseconds / 1e9 for nanoseconds in result["samples_ns"]]
            tokens = test.output_tokens if test.kind == "decode" else test.prompt_tokens
        return tokens / median(seconds), seconds

    def bench_arguments(self, test: PeerTest, num_runs: int) -> list[str]:
        """llama-bench: a prompt, or one stream that begins behind as many tokens as ours."""
        if test.kind == "prompt":
            shape = ["-p", str(test.prompt_tokens), "-n", "0"]
        else:
            shape = ["-p", "0", "-n", str(test.output_tokens), "-d", str(test.prompt_tokens)]
        return ["llama-bench", *self._common(), *shape, "-r", str(num_runs), "-o", "json"]

    def batched_arguments(self, test: PeerTest) -> list[str]:
        """llama-batched-bench: several streams with a prompt each."""
        shape = ["-npp", str(test.prompt_tokens), "-ntg", str(test.output_tokens), "-npl", str(test.batch)]
        context = ["-c", str(test.batch * test.context + 256), "-b", "2048", "-ub", "512"]
        threads = ["-tb", str(self._threads), "--output-format", "jsonl"]
        return ["llama-batched-bench", *self._common(), *context, *shape, *threads]

    def _common(self) -> list[str]:
        return ["-m", str(self._model), "-t", str(self._threads)]

    def _execute(self, arguments: Sequence[str], timeout: float = 900.0) -> str:
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [str(self._folder / arguments[0]), *arguments[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,
            )
            try:
                self._wait(process, time.monotonic() + timeout)
            finally:
                if process.returncode is None:
                    end_group(process, 0.0)
            if process.returncode:
                what = f"ended with {process.returncode}; its last lines:{log_tail(log)}"
                raise PeerError(f"{self.name} {what}", self.name)
            output.seek(0)
            return output.read().decode("utf-8", "replace")

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        while time.monotonic() < deadline:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_rss = max(self.peak_rss, usage.ru_maxrss * 1024)
                return
            time.sleep(0.05)
        raise PeerError(f"{self.name} did not end in time", self.name)

    def _own_version(self) -> str:
        done = subprocess.run(
            [str(self._folder / "llama-bench"), "--version"], capture_output=True, text=True, check=False
        )
        lines = (done.stdout + done.stderr).splitlines()
        return next((line.partition(": ")[2] for line in lines if line.startswith("version: ")), "unknown")


def vllm_environment(python: Path, threads: int, kv_gib: float) -> dict[str, str]:
    """The variables that vLLM's CPU backend wants. Raises ConfigError if a library to preload is missing."""
    folder = python.parent.parent
    openmp = folder / "lib" / "libiomp5.so"
    if not openmp.is_file():
        raise ConfigError(
            f"{openmp} is missing, which vLLM for CPUs installs; name its environment's own Python"
        )
    processors = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "LD_PRELOAD": f"{find_tcmalloc()}:{openmp}",
        "VLLM_CPU_KVCACHE_SPACE": f"{kv_gib:g}",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def find_tcmalloc(roots: Sequence[Path] = (Path("/usr/lib"), Path("/usr/local/lib"))) -> str:
    """Path or name of tcmalloc, without which vLLM on a CPU is a good deal slower. Raises ConfigError."""
    for root in roots:
        for pattern in ("*/libtcmalloc_minimal.so.4", "libtcmalloc_minimal.so.4", "*/libtcmalloc.so.4"):
            for path in sorted(root.glob(pattern)):
                return str(path)
    found = ctypes.util.find_library("tcmalloc_minimal")
    if found is None:
        raise ConfigError(
            "vLLM wants tcmalloc, which is not here; install libtcmalloc-minimal4 (Debian, Ubuntu)"
        )
    return found
