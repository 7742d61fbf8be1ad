"""Result files of every kind: reading one, and telling its kind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sleb.errors import ConfigError

# Kind -> title of its section in a report.
TITLES = {
    "throughput": "Throughput",
    "serve": "Serving",
    "peers": "Against other engines",
    "transformers": "Against transformers' generate",
    "mixed": "Batches of several depths",
    "http-overhead": "What HTTP costs",
    "quality": "Quality",
    "weight-formats": "Weight formats",
    "fronts": "Quality against cost",
    "methods": "Which blocks to remove",
    "method-speed": "Ways to remove weights",
    "search": "Searching",
    "prune": "The search's own losses",
    "kernels": "Kernels",
}

# Kind -> keys by which a result is known that does not say its kind; "rows.peer" is a key of one of the rows.
_SIGNS = {
    "peers": ("rows.peer", "rows.weight_format"),
    "serve": ("rows.ttfts", "rows.output_throughput"),
    "throughput": ("rows.tokens_per_second", "rows.prompt_tokens", "rows.speedup"),
    "transformers": ("ours", "transformers"),
    "mixed": ("repetitions.mixed", "ratio"),
    "http-overhead": ("repetitions.http", "ratio"),
    "weight-formats": ("rows.implementation", "rows.weights"),
    "quality": ("rows.depth", "rows.perplexity", "rows.generation"),
    "fronts": ("maps", "cost_model"),
    "methods": ("rows.method", "rows.count"),
    "method-speed": ("rows.load", "parameters_removed"),
    "search": ("summary", "settings"),
    "prune": ("losses", "removed", "calibration"),
    "kernels": ("rows.op", "rows.backend"),
}


@dataclass(frozen=True)
class Result:
    """One result as a file holds it, and its kind; name: what messages call it."""

    data: Mapping[str, Any]
    kind: str
    name: str

    @classmethod
    def of(cls, data: Any, name: str) -> Result:
        """Raises ConfigError for what is no result, or of no known kind."""
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"{name} holds no result; name a file that sleb bench or sleb eval wrote with --json"
            )
        return cls(data, infer_kind(data, name), name)

    @property
    def model(self) -> str:
        """The model's name; empty where there is none, as for kernels."""
        model = self.data.get("model")
        found = model.get("name") if isinstance(model, Mapping) else model
        return str(found or "")

    @property
    def environment(self) -> Mapping[str, Any]:
        """Empty where there is none."""
        return self._mapping("environment")

    @property
    def servers(self) -> Mapping[str, Mapping[str, Any]]:
        """What the servers that were loaded said of themselves, by name; "" is that of a single one."""
        server = self._mapping("server")
        return {"": server} if server else self._mapping("servers")

    @property
    def settings(self) -> Mapping[str, Any]:
        """Empty where there are none."""
        return self._mapping("settings")

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Empty where there are none."""
        rows: Sequence[Mapping[str, Any]] = self.data.get("rows") or ()
        return rows

    @property
    def command(self) -> str:
        """As it was typed; empty where it was not recorded."""
        return str(self.environment.get("command") or self.data.get("command") or "")

    @property
    def weights(self) -> str:
        """The format of the weights, else the dtype; empty where neither is said, or several are compared."""
        weights = self.settings.get("weights")
        if isinstance(weights, str) and weights != "auto":
            return weights
        return "" if self.kind == "peers" else str(self.environment.get("dtype") or "")

    @property
    def title(self) -> str:
        """Its kind, model and weights, as "Throughput: smollm2, bfloat16"."""
        about = ", ".join(filter(None, (self.model, self.weights)))
        return f"{TITLES[self.kind]}: {about}" if about else TITLES[self.kind]

    def _mapping(self, key: str) -> Mapping[str, Any]:
        found = self.data.get(key)
        return found if isinstance(found, Mapping) else {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what a result lacks, or has of a wrong type, into a ConfigError: it comes from a file."""
        try:
            yield
        except ConfigError:
            raise
        except KeyError as error:
            raise ConfigError(f"{self.name} is no whole {self.kind} result: it lacks {error}") from error
        except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            raise ConfigError(
                f"{self.name} is no whole {self.kind} result: a value in it cannot be ({error})"
            ) from error


def infer_kind(data: Mapping[str, Any], name: str) -> str:
    """The kind that a result says it is of, else the first whose signs it has. Raises ConfigError for no known one."""
    said = data.get("kind")
    if said is not None:
        if not isinstance(said, str) or said not in TITLES:
            shown = json.dumps(said, ensure_ascii=False)[:40]
            raise ConfigError(f"{name} is of the kind {shown}; known are: {', '.join(TITLES)}")
        return said
    for kind, signs in _SIGNS.items():
        if all(_has(data, sign) for sign in signs):
            return kind
    raise ConfigError(f"{name} is of no known kind; known results of --json are: {', '.join(TITLES)}")


def _has(data: Mapping[str, Any], sign: str) -> bool:
    key, _, inner = sign.partition(".")
    if not inner:
        return key in data
    rows = data.get(key)
    return isinstance(rows, list) and any(isinstance(row, Mapping) and inner in row for row in rows)


def read_result(path: Path) -> Result:
    """The result in a file. Raises ConfigError, which names the file."""
    try:
        data = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); name a file that --json wrote"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8; name a file that --json wrote") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); name a file that --json wrote") from None
    return Result.of(data, str(path))


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # which no report could be written of
        raise ValueError(f"{text} is too large for a number")
    return value
