"""What a measured number is: one shape, from which every table, plot, report and diff is made.

A `Measurement` is a figure of one subject in one case: 134.2 tokens/s of depth 6 in "decode 8 × 128 after 64". It may
have a spread, a ratio to the subject that it was measured against, and facts beside it. A `Result` is what one command
measured, with what it was measured on; it is a JSON file whose `rows` are the measurements, flat:

    {"kind": "throughput", "complete": true, "environment": {…}, "settings": {…}, "notes": […], "rows": [
        {"case": …, "subject": …, "metric": …, "value": …, "low": …, "high": …, "ratio": …, "ratio_low": …,
         "ratio_high": …, …facts}]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sleb.errors import ConfigError
from sleb.files import write_text

Verdict = Literal["baseline", "faster", "slower", "no difference"]

# Of these less is better; of every other metric more is.
_LESS_IS_BETTER = (
    *("seconds", "ms", "µs", "perplexity", "bytes", "MiB", "loss", "KL", "byte"),
    *("repeated", "looped", "empty", "unfinished", "early"),  # shares of answers
)
_FIELDS = ("case", "subject", "metric", "value", "low", "high", "ratio", "ratio_low", "ratio_high")


@dataclass(frozen=True)
class Ratio:
    """A figure over the baseline's, both of the same turn. Above 1 is better, whatever the metric.

    low, high: the ends of its 95 % interval; None where there are too few turns for one.
    """

    estimate: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> Verdict:
        """What the interval shows; without one it shows nothing: "no difference"."""
        if self.low is None or self.high is None or self.low <= 1 <= self.high:
            return "no difference"
        return "faster" if self.low > 1 else "slower"

    @property
    def half_width(self) -> float:
        """Half the interval's width over the estimate; infinite without one."""
        if self.low is None or self.high is None:
            return math.inf
        return (self.high - self.low) / 2 / self.estimate


@dataclass(frozen=True)
class Measurement:
    """One figure.

    Attributes:
        case: what was done, with its sizes: "decode 8 × 128 after 64".
        subject: what did it: "depth 6", "vLLM bf16".
        metric: what `value` is, unit last: "tokens/s", "TTFT p99 ms", "perplexity".
        value: None where the subject failed; `facts["failed"]` says why.
        spread: least and greatest of the turns, or an interval of the value.
        ratio: to the baseline of the case; None for the baseline itself and where nothing is compared.
        facts: what belongs beside the figure, JSON values by name.
    """

    case: str
    subject: str
    metric: str
    value: float | None
    spread: tuple[float, float] | None = None
    ratio: Ratio | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """By what two results are compared."""
        return self.case, self.subject, self.metric

    @property
    def less_is_better(self) -> bool:
        return less_is_better(self.metric)

    def row(self) -> dict[str, Any]:
        """The measurement as one flat JSON object."""
        low, high = self.spread or (None, None)
        ratio = (None, None, None) if self.ratio is None else astuple(self.ratio)
        return {**dict(zip(_FIELDS, (*self.key, self.value, low, high, *ratio), strict=True)), **self.facts}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Measurement:
        """The measurement that `row` was made of; KeyError if it is no such row."""
        case, subject, metric, value, low, high, *ends = (row[name] for name in _FIELDS)
        spread = None if low is None or high is None else (low, high)
        ratio = None if ends[0] is None else Ratio(*ends)
        facts = {name: fact for name, fact in row.items() if name not in _FIELDS}
        return cls(case, subject, metric, value, spread, ratio, facts)


def less_is_better(metric: str) -> bool:
    """Whether less of `metric` is better, by its last word."""
    return metric.split()[-1] in _LESS_IS_BETTER


@dataclass
class Result:
    """What one command measured.

    Attributes:
        kind: the command: "throughput", "serve", "peers", "kernels", "eval", or a script of research/.
        environment: see `sleb.benchmarks.environment`.
        settings: what the command was told, and what it chose.
        notes: sentences that a reader of the figures must know.
        complete: False if the run was interrupted.
    """

    kind: str
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    def document(self) -> dict[str, Any]:
        """The result as a JSON object."""
        found = dict(vars(self))
        return found | {"rows": [each.row() for each in found.pop("measurements")]}

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Result:
        """The result that `document` holds; KeyError or TypeError if it holds none of this form."""
        names = ("environment", "settings", "notes", "kind", "complete")
        rows = [Measurement.of_row(row) for row in document["rows"]]
        return cls(**{name: document[name] for name in names}, measurements=rows)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a result file. Raises ConfigError where there is none, naming the path."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON file of a measurement: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} holds no JSON object; give a file that `sleb bench --json` or `sleb eval --json` wrote"
        )
    return document


def write_result(path: Path, result: Result) -> None:
    """Writes a result as JSON, atomically. Raises ConfigError."""
    write_text(path, json.dumps(result.document(), indent=1, allow_nan=False, ensure_ascii=False) + "\n")
