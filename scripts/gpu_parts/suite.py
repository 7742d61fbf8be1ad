"""`pytest -m gpu` over the engine's and the kernels' tests: spread over the cores, or alone on the GPU."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from gpu_parts.job import Checks, Job

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("tests/engine", "tests/kernels")
# Of a dry run, interpreted: together and alone.
_DRY_FILES = (("tests/kernels/triton/test_triton_rope.py",), ("tests/kernels/triton/test_tuning.py",))
_MAX_PROCESSES = 16
_MEMORY_OF_ONE = 5 << 30  # of the host: torch with CUDA, and Triton's compiler
_WRITE_SECONDS = 2.0


def suite(job: Job) -> int:
    """Exit status 1 if a test failed, or pytest itself did."""
    alone = job.name == "tests-alone"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processes = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES, max(1, memory // _MEMORY_OF_ONE))
    wanted = "not slow and not gpu" if job.dry else f"gpu and {'' if alone else 'not '}alone"
    arguments = [str(_ROOT / name) for name in (_DRY_FILES[alone] if job.dry else _FOLDERS)]
    scratch = job.out / "not-kept"
    scratch.mkdir(parents=True, exist_ok=True)
    arguments += ["-m", wanted, "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    arguments += [f"--rootdir={_ROOT}", f"--basetemp={scratch / job.name}"]
    arguments += ["-k", "float32 or kept"] if job.dry else []
    outcomes = _Outcomes(Checks(job, "gpu tests", torch.float32), "alone" if alone else "together")
    status = pytest.main([*arguments, *([] if alone else ["-n", str(processes)])], plugins=[outcomes])
    outcomes.write()
    return outcomes.checks.finish() or int(status)


class _Outcomes:
    """A plugin that counts outcomes, and writes them while the tests go on."""

    def __init__(self, checks: Checks, name: str) -> None:
        self.checks, self.case, self.written = checks, f"pytest, {name}", time.monotonic()
        self.counts = {"passed": 0, "skipped": 0, "failed": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.failed:
            lines = report.longreprtext.splitlines()
            self.failures.append("\n".join([report.nodeid, *lines[-12:]])[-1500:])
        if time.monotonic() > self.written + _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        for outcome, count in self.counts.items():
            if outcome == "failed":
                self.checks.add(self.case, outcome, "tests", count, 0, failures=self.failures)
            else:
                self.checks.add(self.case, outcome, "tests", count)
