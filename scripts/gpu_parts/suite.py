"""`pytest -m gpu` over the engine's and the kernels' tests, spread over the cores."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_parts.job import Checks, Job

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("tests/engine", "tests/kernels")
# Of a dry run, interpreted: some tests of kernels, and of the captured step.
_DRY_FILES = ("tests/kernels/triton/test_triton_rope.py", "tests/kernels/triton/test_tuning.py")
_MAX_PROCESSES = 16
_MEMORY_OF_ONE = 5 << 30  # of the host: torch with CUDA, and what Triton compiles
_WRITE_SECONDS = 2.0


def suite(job: Job) -> int:
    """Exit status 1 if a test failed, or none ran."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    processes = min(cores, _MAX_PROCESSES, max(1, memory // _MEMORY_OF_ONE))
    checks = Checks(job, "gpu tests", torch.float32)
    where = [str(_ROOT / name) for name in (_DRY_FILES if job.dry else _FOLDERS)]
    wanted = "not slow and not gpu" if job.dry else "gpu and not alone"
    runs = [_Run(job, checks, "together", [*where, "-m", wanted, "-n", str(processes)])]
    if not job.dry:
        runs.append(_Run(job, checks, "alone", [*where, "-m", "gpu and alone"]))
    for run in runs:
        options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", f"--rootdir={_ROOT}"]
        status = pytest.main([*run.arguments, *options], plugins=[run])
        run.write()
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            checks.add(f"pytest, {run.name}", "ended", "status", None, failed=pytest.ExitCode(status).name)
            return 1
    return checks.finish()


class _Run:
    """A plugin that counts outcomes, and writes them while the tests go on."""

    def __init__(self, job: Job, checks: Checks, name: str, arguments: list[str]) -> None:
        self.job, self.checks, self.name, self.arguments = job, checks, name, arguments
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[dict[str, Any]] = []
        self.written = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.failed:
            lines = report.longreprtext.splitlines()
            self.failures.append({"test": report.nodeid, "why": "\n".join(lines[-12:])[-1500:]})
        if time.monotonic() > self.written + _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        case = f"pytest, {self.name}"
        result = self.checks.result
        result.measurements = [each for each in result.measurements if each.case != case]
        for outcome, count in self.counts.items():
            bad = outcome == "failed" and count
            facts = {"failed": f"{count} tests", "failures": self.failures} if bad else {}
            self.checks.add(case, outcome, "tests", None if bad else count, **facts)
