"""Parts one after another, each as processes that end in time. The standard library alone."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gpu_parts.report import summary

ROOT = Path(__file__).resolve().parents[2]
_GRACE = 6.0  # seconds from the question to the force, within the limit
_LEAST_SECONDS = 10.0  # a part that has less is not begun
_LOG_LINES = 15


@dataclass(frozen=True)
class Part:
    """Jobs that run at the same time, each a process that writes JOB.json and JOB.log.

    Attributes:
        seconds: its share, where a fresh machine compiles every kernel. measures: nothing else may run on the GPU.
        program: what has to be there, and runs it.
    """

    name: str
    seconds: float
    jobs: Sequence[str]
    measures: bool = False
    program: str = ""


# In the order of what a failure would teach. Jobs called warm compile what follows while the tests compile theirs.
PARTS = (
    Part("smoke", 90, ("smoke-float32", "smoke-bfloat16", "smoke-int8", "smoke-int4")),
    Part("tests", 180, ("tests", "warm-7b", "warm-70b")),
    Part("memory", 20, ("tests-alone",)),
    Part("kernels", 110, ("kernels",), True),
    Part("7b", 160, ("7b",), True),
    Part("70b", 140, ("70b",), True),
    Part("patched", 30, ("patched",), True),
    Part("mixed", 40, ("mixed",), True),
    Part("memcheck", 30, ("memcheck",), program="compute-sanitizer"),
)
NAMES = tuple(part.name for part in PARTS)


def limit(parts: Sequence[Part], seconds: float) -> float:
    """What the first of `parts` may take: what one has left of its time goes to all that follow, by their shares."""
    return parts[0].seconds * max(0.0, seconds) / sum(part.seconds for part in parts)


def run(parts: Sequence[Part], seconds: float, out: Path, dry: bool) -> int:
    """The exit status: 0; 1 if a part failed or was not done; 2 where none can be begun; 130 after Ctrl-C."""
    ends, told = time.monotonic() + seconds, dict[str, dict[str, object]]()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("w")
        if not _alone(lock):
            print(f"error: another scripts/gpu writes into {out}; give another --out", file=sys.stderr)
            return 2
        for name in (name for part in parts for name in part.jobs):  # of an earlier run
            (out / f"{name}.json").unlink(missing_ok=True)
    except OSError as error:
        print(f"error: {out} cannot be written: {error.strerror}; give another --out folder", file=sys.stderr)
        return 2
    try:
        begun = Part("machine", 60, ("machine",))
        failed = perform(begun, _commands(begun, 60.0, out, dry), 60.0, out, _environment(begun, out, dry))
        if failed:  # and told
            return 2
        print(f"==> {_last_lines(out, 'machine', 1)}", flush=True)
        for place, part in enumerate(parts):
            began, most = time.monotonic(), limit(parts[place:], ends - time.monotonic())
            line = ""
            if part.program and not dry and shutil.which(part.program) is None:
                failed, line = [], f"left out, there is no {part.program} here"
            elif most < _LEAST_SECONDS:
                failed = [f"the time is over ({most:.0f} s left)"]
            else:
                print(f"==> {part.name}: {most:.0f} s", flush=True)
                commands = _commands(part, most, out, dry)
                failed = perform(part, commands, most, out, _environment(part, out, dry))
                line = summary(out, part.jobs)
            took, state = time.monotonic() - began, "; ".join(failed) or "ok"
            print(f"==> {part.name}: {state}, {took:.0f} s{line and ': ' + line}", flush=True)
            told[part.name] = {"seconds": took, "limit": most, "failed": failed, "summary": line}
            (out / "run.json").write_text(
                json.dumps({"dry_run": dry, "parts": told}, indent=1) + "\n", "utf-8"
            )
    except KeyboardInterrupt:
        print(f"interrupted: what was complete is in {out}", file=sys.stderr)
        return 130
    bad = [name for name, each in told.items() if each["failed"]]
    print(f"{'FAILED: ' + ', '.join(bad) if bad else 'every part ran'}; the results are in {out}")
    return int(bool(bad))


def _alone(lock: IO[str]) -> bool:
    """Holds the file until it is closed; False if another process does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network's file system may have no locks
        pass
    return True


def _commands(part: Part, seconds: float, out: Path, dry: bool) -> list[list[str]]:
    sanitizer = [part.program, "--error-exitcode", "9"] if part.program and not dry else []
    script = [*sanitizer, sys.executable, str(ROOT / "scripts/gpu"), "--seconds", f"{seconds:.1f}"]
    script += ["--out", str(out), *(["--dry-run"] if dry else [])]
    return [[*script, "--job", name] for name in part.jobs]


def _environment(part: Part, out: Path, dry: bool) -> dict[str, str]:
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    found = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if not part.measures or dry:  # what was tuned while others used the GPU must not be kept
        found |= {"SLEB_CACHE": str((out / "not-kept").resolve())}
    return found | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {})


def perform(
    part: Part, commands: Sequence[Sequence[str]], seconds: float, out: Path, environment: dict[str, str]
) -> list[str]:
    """Runs the part's commands; why they failed. None, and nothing that they started, is left after `seconds`.

    Shortly before, they are interrupted, so that a measurement writes what is complete; so are they by Ctrl-C.
    """
    ends, asked = time.monotonic() + seconds, False
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with _interrupts_later():
            for name, command in zip(part.jobs, commands, strict=True):
                with (out / f"{name}.log").open("wb") as log:
                    started = subprocess.Popen(
                        *(command, -1, None, subprocess.DEVNULL, log, subprocess.STDOUT),
                        env=environment,
                        start_new_session=True,
                    )
                processes.append(started)
        while any(each.poll() is None for each in processes) and time.monotonic() < ends:
            if not asked and time.monotonic() > ends - min(_GRACE, seconds / 4):
                asked = True
                _interrupt(processes)
            time.sleep(0.05)
    except KeyboardInterrupt:
        _interrupt(processes)
        ends = time.monotonic() + _GRACE
        while any(each.poll() is None for each in processes) and time.monotonic() < ends:
            time.sleep(0.05)
        raise
    finally:
        statuses = [each.poll() for each in processes]
        for each in processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(each.pid, signal.SIGKILL)
            each.wait()
    failed = []
    for name, status in zip(part.jobs, statuses, strict=True):
        if status == 0 or (name.startswith("warm-") and asked):
            continue
        why = f"not done in {seconds:.0f} s"
        if status is not None and not asked:
            why = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
            print(_last_lines(out, name, _LOG_LINES))
        failed.append(f"{name}: {why}")
        print(f"{name}: {why}; its log is {out / name}.log", flush=True)
    return failed


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C comes at the end: a process that is begun and not yet noted would be left."""
    came = list[int]()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    usual = [number for number in numbers if signal.getsignal(number) is signal.default_int_handler]
    for number in usual:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number in usual:
            signal.signal(number, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def _interrupt(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for each in processes:
        if each.poll() is None:
            each.send_signal(signal.SIGINT)


def _last_lines(out: Path, name: str, count: int) -> str:
    return "\n".join((out / f"{name}.log").read_text("utf-8", "replace").splitlines()[-count:])
