"""What a job is told, and how it writes what it finds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton

from sleb.benchmarks.environment import describe_machine
from sleb.benchmarks.record import Measurement, Result, write_result


@dataclass
class Job:
    """out: the folder of its JSON file. seconds: from its start. dry: tiny shapes in Triton's interpreter."""

    name: str
    out: Path
    seconds: float
    dry: bool
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return max(1.0, self.seconds - (time.monotonic() - self.started))

    @property
    def command(self) -> list[str]:
        """What makes this anew."""
        return ["scripts/gpu", self.name.split("-")[0], *(["--dry-run"] if self.dry else [])]

    def write(self, result: Result) -> None:
        """Writes NAME.json, in place of the one before."""
        marked = replace(result, settings={**result.settings, "dry_run": self.dry})
        write_result(self.out / f"{self.name}.json", marked)

    def say(self, line: str) -> None:
        print(line, flush=True)


class Checks:
    """A result whose measurements say what holds, written after each; its value is what is off, None too much."""

    def __init__(self, job: Job, kind: str, dtype: torch.dtype) -> None:
        self._job, self._off = job, False
        environment = describe_machine(torch.device(job.device), dtype, "triton", job.command)
        self.result = Result(kind, environment, complete=False)

    def add(
        self, case: str, subject: str, metric: str, value: float, most: float | None = None, **facts: Any
    ) -> None:
        """A figure; above `most`, or where it is no number, it is told as a failure."""
        good = most is None or value <= most
        facts |= {"allowed": most} if good else {"failed": f"{value:.4g} {metric}, {most:g} allowed"}
        measured = Measurement(case, subject, metric, value if good else None, facts=facts)
        kept = [each for each in self.result.measurements if each.key != measured.key]
        self.result.measurements = [*kept, measured]
        self._job.say(f"{case}, {subject}: {value:.4g} {metric}{'' if good else ', FAILED'}")
        self._job.write(self.result)

    def equal(self, case: str, subject: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
        different = sum(a != b for a, b in zip(found, wanted, strict=True))
        self.add(case, subject, "answers that differ", different, 0)

    def finish(self) -> int:
        """The exit status: 0, or 1 if something failed."""
        self.result.complete = True
        self._job.write(self.result)
        return int(any(each.value is None for each in self.result.measurements))


def machine(job: Job) -> int:
    """Says in a line what is here; exit status 1 without a GPU."""
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if job.dry:
        job.say(f"dry run: {versions}, interpreted")
    elif not torch.cuda.is_available():
        lacking = "finds no CUDA GPU here" if torch.version.cuda else "is built without CUDA"
        job.say(f"error: torch {torch.__version__} {lacking}; scripts/gpu --dry-run needs no GPU")
    else:
        found = torch.cuda.get_device_properties(0)
        level, memory = f"{found.major}.{found.minor}", found.total_memory >> 30
        job.say(f"{found.name}, {memory} GiB, compute capability {level}, {versions}")
    return int(not job.dry and not torch.cuda.is_available())
