"""Processes that answer: Python engines through `peer_workers/worker_main.py`."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from sleb.benchmarks.idle import own_ticks, read_processes
from sleb.errors import ConfigError, SlebError

WORKER_MAIN = Path(__file__).resolve().parent / "peer_workers" / "worker_main.py"
_LOG_LINES = 15
_NOT_INSTALLED = ("ModuleNotFoundError", "ImportError", "PackageNotFoundError")
# A worker that waits for a command and yet uses more of a processor than this is stopped between its turns.
_SPINNING = 0.02
_SETTLE_SECONDS = 1.0  # for what loading left to be done
_LISTEN_SECONDS = 1.5


class PeerError(SlebError):
    """An engine failed. The message is one line; details: what its process wrote last, lines or nothing."""

    def __init__(self, message: str, engine: str, details: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.engine = engine
        self.details = details


class MissingError(PeerError):
    """An engine, or a part of it, is not installed."""


class UnableError(PeerError):
    """An engine cannot do one test; others it can."""


class MendableError(PeerError, ConfigError):
    """What our own engine refuses, as a depth or a layer map: its message says all, so there are no details."""


def log_tail(log: IO[bytes]) -> str:
    """Its last lines."""
    log.flush()
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return "\n".join(lines[-_LOG_LINES:])


def end_group(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """Waits that long for `process` to end, then kills what is left of its process group."""
    deadline = time.monotonic() + grace_seconds
    if process.returncode is None:
        # Not reaped before the group is killed: until then nobody else can get its number.
        while (
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


class Worker:
    """An engine in a process group of its own. Raises PeerError if its interpreter cannot be run.

    The group stays in our session: should we be killed while it is stopped, the system ends it, as it does with every
    stopped group that loses its last tie to a session (SIGHUP and SIGCONT, see setpgid(2) and exit(3p)).

    Attributes:
        facts: what it answered to "load". idle_share: of one processor, used while it waits. pid: its process.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        module: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self.idle_share: float | None = None
        self._paused = self._pausing = False
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        try:
            self._process = subprocess.Popen(
                [str(python), str(WORKER_MAIN), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **(environment or {})},
                process_group=0,
            )
        except OSError as error:
            self._log.close()
            raise MissingError(f"{name}: {python} cannot be run ({error.strerror})", name) from None
        self.pid = self._process.pid
        self._buffer = b""

    def call(
        self, command: str, *, timeout: float = 900.0, on_wait: Callable[[], None] | None = None, **rest: Any
    ) -> dict[str, Any]:
        """The worker's answer. on_wait is called about once a second meanwhile.

        Raises PeerError; MendableError for what the user gave, as an option.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **rest}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failed(f"ended instead of answering '{command}'") from None
        answer: dict[str, Any] = json.loads(self._read_line(command, time.monotonic() + timeout, on_wait))
        if not answer.pop("ok"):
            if answer.get("mendable"):
                raise MendableError(answer["error"], self.name)
            kind = MissingError if answer["error"].startswith(_NOT_INSTALLED) else PeerError
            raise self._failed(f"failed to {command}: {answer['error']}", kind)
        return answer

    def load(self, on_wait: Callable[[], None] | None = None, **options: Any) -> None:
        """Loads the engine, then looks whether it keeps a processor busy while it waits."""
        self.facts = self.call("load", on_wait=on_wait, **options)
        time.sleep(_SETTLE_SECONDS)
        before = own_ticks(read_processes(), self.pid, [self.pid])
        time.sleep(_LISTEN_SECONDS)
        ticks = own_ticks(read_processes(), self.pid, [self.pid]) - before
        self.idle_share = ticks / os.sysconf("SC_CLK_TCK") / _LISTEN_SECONDS
        self._pausing = self.idle_share > _SPINNING
        self.pause()

    def pause(self) -> None:
        """Stops its processes if they spin; `resume` lets them go on."""
        if self._pausing and not self._paused:
            self._signal(signal.SIGSTOP)
            self._paused = True

    def resume(self) -> None:
        """Undoes `pause`."""
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def close(self, grace_seconds: float = 10.0) -> None:
        """Ends the process, its children too, by force if they do not go by themselves."""
        if self._process.returncode is None:
            self.resume()
            for pipe in (self._process.stdin, self._process.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except OSError:
                    pass
            end_group(self._process, grace_seconds)
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has ended; the next call says so
            pass

    def _read_line(self, command: str, deadline: float, on_wait: Callable[[], None] | None) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], 1.0)
            if ready:
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise self._failed(f"ended instead of answering '{command}'")
                self._buffer += data
            elif time.monotonic() > deadline:
                raise self._failed(f"gave no answer to '{command}' in time")
            elif on_wait is not None:
                on_wait()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failed(self, what: str, kind: type[PeerError] = PeerError) -> PeerError:
        return kind(f"{self.name} {what}", self.name, log_tail(self._log))
