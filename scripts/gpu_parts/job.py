"""What a part's process is told, and how it writes what it finds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sleb.benchmarks.environment import describe_machine
from sleb.benchmarks.record import Measurement, Result, write_result

DRY_RUN = "dry_run"  # among a result's settings: nothing in it was measured


@dataclass
class Job:
    """A part's process.

    Attributes:
        out: the folder of its JSON files. seconds: how long it may take, from its start.
        dry: tiny shapes in Triton's interpreter, to see that everything runs.
    """

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
        marked = replace(result, settings={**result.settings, DRY_RUN: self.dry})
        write_result(self.out / f"{self.name}.json", marked)

    def say(self, line: str) -> None:
        print(line, flush=True)


class Checks:
    """What holds and what does not, written after each: a result whose measurements are the checks.

    A check is a function that returns a measured difference and the largest that may be.
    """

    def __init__(self, job: Job, kind: str, dtype: torch.dtype, kernels: str = "triton") -> None:
        self._job = job
        environment = describe_machine(torch.device(job.device), dtype, kernels, job.command)
        self.result = Result(kind, environment, complete=False)

    def add(self, case: str, subject: str, metric: str, value: float | None, **facts: Any) -> None:
        """A figure; with `failed` among the facts it is told as a failure."""
        self.result.measurements.append(Measurement(case, subject, metric, value, facts=facts))
        self._job.say(f"{case}, {subject}: {facts.get('failed', value)}")
        self._job.write(self.result)

    def equal(self, case: str, subject: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
        """Lists of tokens that must be the same."""
        same = sum(a == b for a, b in zip(found, wanted, strict=True))
        facts = {} if same == len(wanted) else {"failed": f"{same} of {len(wanted)} answers are the same"}
        self.add(case, subject, "answers that differ", None if facts else 0.0, **facts)

    def close(self, case: str, subject: str, found: torch.Tensor, wanted: torch.Tensor, most: float) -> None:
        """Log-probabilities whose mean difference may be `most`."""
        off = float((found - wanted).abs().mean())
        facts = (
            {} if off <= most else {"failed": f"they differ by {off:.3g} in the mean, {most:g} is allowed"}
        )
        self.add(case, subject, "nats, mean difference", None if facts else off, allowed=most, **facts)

    def finish(self) -> int:
        """The exit status: 0, or 1 if something failed."""
        self.result.complete = True
        self._job.write(self.result)
        return int(any(each.value is None for each in self.result.measurements))
