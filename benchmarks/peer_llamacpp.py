"""llama.cpp, by its own benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from sleb.benchmarks.peer_engines import Measured, Task
from sleb.benchmarks.peer_options import PeerTest
from sleb.benchmarks.peer_process import MissingError, PeerError, end_group, log_tail
from sleb.benchmarks.peer_weights import gguf_format

_VERSION_SECONDS = 30.0


class LlamaCpp:
    """llama.cpp with one model file: a process a run, which warms up by itself.

    Raises MissingError where its programs or the file are not there or cannot be run, PeerError for a file of another
    format than `name` says, as llamacpp-q8_0.

    Attributes:
        peak_rss: the largest of any run so far, in bytes.
        notice: what a reader must know, that the format could not be checked; None: nothing.
    """

    pids: tuple[int, ...] | None = ()
    warms = False
    takes_ids = True

    def __init__(
        self, name: str, folder: Path, model: Path, threads: int, version: str | None = None
    ) -> None:
        self.name = name
        self.peak_rss = 0
        self.notice: str | None = None
        self._folder, self._model, self._threads = folder, model, threads
        for program in ("llama-bench", "llama-batched-bench"):
            if not os.access(folder / program, os.X_OK):
                raise MissingError(
                    f"{folder} lacks {program}; name the folder with llama.cpp's binaries", name
                )
        if not model.is_file():
            raise MissingError(f"{name}: there is no model file {model}", name)
        self.facts: dict[str, Any] = {
            "version": version or self._own_version(),
            "model": model.name,
            "dtype": name.removeprefix("llamacpp-"),
            "compiled": "C++",
            "threads": threads,
            "settings": {"kv_cache_dtype": "f16"},
        }
        self._check_format()

    def _check_format(self) -> None:
        """By the smallest run that llama-bench makes, before any counts."""
        shape = ["-p", "1", "-n", "0", "-r", "1", "-o", "json"]
        with self._explained():
            told = json.loads(self._execute(["llama-bench", *self._common(), *shape]))[0].get("model_type")
        claimed, found = self.facts["dtype"], gguf_format(told)
        if found is None:
            self.notice = (
                f"{self.name}: llama-bench does not say in a known form what weights {self._model.name} holds "
                f"({told}); they are taken for {claimed}."
            )
        elif found != claimed:
            raise PeerError(
                f"{self.name}: {self._model.name} holds {found} weights, as llama-bench says ({told}); give a file "
                f"of {claimed} ones",
                self.name,
            )

    def turn(self, task: Task) -> Measured:
        """The median of a process's runs, of one run for several streams.

        For one stream the seconds are those of the tokens after the prompt. It makes its prompts itself. Raises
        PeerError.
        """
        with self._explained():
            return self._turn(task.test, task.num_runs)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PeerError(f"{self.name} cannot be run ({error.strerror})", self.name) from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise PeerError(f"{self.name} printed a result of another form ({error})", self.name) from None

    def _turn(self, test: PeerTest, num_runs: int) -> Measured:
        if test.kind == "decode" and test.batch > 1:
            lines = self._execute(self.batched_arguments(test)).splitlines()
            seconds = [float(json.loads(line)["t"]) for line in lines if line.startswith("{")]
            tokens = test.batch * test.output_tokens
        else:
            result = json.loads(self._execute(self.bench_arguments(test, num_runs)))[0]
            seconds = [nanoseconds / 1e9 for nanoseconds in result["samples_ns"]]
            if "flash_attn" in result:
                self.facts["attention"] = f"flash_attn {result['flash_attn']}"
            tokens = test.output_tokens if test.kind == "decode" else test.prompt_tokens
        return Measured(tokens / median(seconds), seconds)

    def memory(self) -> dict[str, int] | None:
        """The largest peak of its processes."""
        return {"peak_rss": self.peak_rss, "pss": 0, "processes": 1} if self.peak_rss else None

    def close(self, grace_seconds: float) -> None:
        """Nothing is left between its runs."""

    def bench_arguments(self, test: PeerTest, num_runs: int) -> list[str]:
        """llama-bench: a prompt, or one stream that begins behind as many tokens as ours."""
        if test.kind == "prompt":
            shape = ["-p", str(test.prompt_tokens), "-n", "0"]
        else:
            shape = ["-p", "0", "-n", str(test.output_tokens), "-d", str(test.prompt_tokens)]
        return ["llama-bench", *self._common(), *shape, "-r", str(num_runs), "-o", "json"]

    def batched_arguments(self, test: PeerTest) -> list[str]:
        """llama-batched-bench: several streams with a prompt each.

        Its prompts end with the logits of the first new token, which it does not count: one step fewer, then, for as
        many tokens as the others give.
        """
        steps = test.output_tokens - 1
        shape = ["-npp", str(test.prompt_tokens), "-ntg", str(steps), "-npl", str(test.batch)]
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
                raise PeerError(f"{self.name} ended with {process.returncode}", self.name, log_tail(log))
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
        program = self._folder / "llama-bench"
        try:
            done = subprocess.run(
                [str(program), "--version"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_VERSION_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            why = error.strerror if isinstance(error, OSError) else "it does not tell its version in time"
            raise MissingError(
                f"{self.name}: {program} cannot be run ({why}); build llama.cpp on this machine", self.name
            ) from None
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        return next((line.partition(": ")[2] for line in lines if line.startswith("version: ")), "unknown")
