"""Processes that end in time: asked first, so that what they have can be written, then by force.

The standard library alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_GRACE = 6.0  # seconds from the question to the force, within the limit


class Process:
    """A command in a process group of its own; what it prints goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("w", encoding="utf-8") as file:
            self._running = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._running.poll() is None

    @property
    def status(self) -> int | None:
        """The exit status; below 0 a signal's number."""
        return self._running.poll()

    def interrupt(self) -> None:
        """As Ctrl-C would: a measurement then writes what is complete."""
        with suppress(ProcessLookupError):
            self._running.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """The whole group, whatever of it is left."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._running.pid, signal.SIGKILL)
        self._running.wait()

    def last_lines(self, count: int) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-count:])


def finish(processes: Sequence[Process], seconds: float) -> list[str | None]:
    """Waits for all of them, at most so long; of each why it failed, or None.

    Whatever ends the waiting, Ctrl-C too: none is left, nor what they have started.
    """
    ends, asked = time.monotonic() + seconds, False
    try:
        while any(each.running for each in processes) and time.monotonic() < ends:
            if not asked and time.monotonic() > ends - min(_GRACE, seconds / 4):
                asked = True
                for each in processes:
                    each.interrupt()
            time.sleep(0.05)
    except KeyboardInterrupt:
        stop(processes)
        raise
    in_time = [not each.running for each in processes]
    stop(processes, 0.0)
    return [_why(each, asked, ended, seconds) for each, ended in zip(processes, in_time, strict=True)]


def stop(processes: Sequence[Process], grace: float = _GRACE) -> None:
    """Ends them all: asked, and after `grace` seconds by force."""
    ends = time.monotonic() + grace
    for each in processes:
        if each.running:
            each.interrupt()
    while any(each.running for each in processes) and time.monotonic() < ends:
        time.sleep(0.05)
    for each in processes:
        each.kill()


def _why(process: Process, asked: bool, in_time: bool, seconds: float) -> str | None:
    status = process.status
    if not in_time or (asked and status):
        return f"not done in {seconds:.0f} s"
    if not status:
        return None
    return f"ended by signal {-status}" if status < 0 else f"exit status {status}"
