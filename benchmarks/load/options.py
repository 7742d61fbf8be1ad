"""What `sleb bench serve` is asked to do: the options, and the levels of load that they name."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sleb.benchmarks.load.server import ENDPOINTS, shown_url
from sleb.benchmarks.prompts import Lengths
from sleb.client.connection import base_url
from sleb.errors import ConfigError
from sleb.options import check_values, option, options_of

API_KEY_VARIABLES = ("SLEB_API_KEY", "OPENAI_API_KEY")
DEFAULT_URL = "http://127.0.0.1:8000/v1"
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
_MOST = 1_000_000  # requests of a level, tokens of a request
_REQUESTS = "10 × concurrency, or 30 s of rate"
_server, _load, _asked = (partial(option, group=name) for name in ("Server", "Load", "Requests"))
# Two options that cannot both be heard.
_EXCLUSIVE = (
    ("concurrency", "rate"),
    ("dataset", "prompt_tokens"),
    ("dataset", "length_spread"),
    ("compare", "url"),
    ("compare", "in_turns"),
)


@dataclass(frozen=True)
class Level:
    """One load: so many requests at once, each followed by the next, or so many a second whatever becomes of them.

    concurrency: of the closed loop; None for the open one. rate: requests/s of the open one, inf for all at once.
    """

    concurrency: int | None = None
    rate: float = math.inf

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        return "all at once" if math.isinf(self.rate) else f"{self.rate:g} requests/s"

    @property
    def default_requests(self) -> int:
        """How many requests make a measurement."""
        if self.concurrency is not None:
            return max(20, 10 * self.concurrency)
        return 100 if math.isinf(self.rate) else min(_MOST, max(20, round(30 * self.rate)))


@dataclass(frozen=True)
class ServeLoadOptions:
    """What to measure. compare: instead of url, two servers in turns, B over A."""

    url: str | None = _server(None, "The server's address.", unset=DEFAULT_URL)
    model: Sequence[str] = _server((), "Models in turns; A's, B's.", unset="the server's first", commas=True)
    api_key: str | None = _server(None, "Its key.", unset="SLEB_API_KEY or OPENAI_API_KEY")
    endpoint: str = _server("chat", "What is asked.", choices=tuple(ENDPOINTS))
    timeout: float = _server(600.0, "Seconds; more is a failure.", minimum=0.001, maximum=86_400)
    concurrency: Sequence[int] = _load((), "Requests at once.", unset="1,8,32", minimum=1, maximum=10_000)
    rate: Sequence[float] = _load((), "Or requests/s at random (Poisson) times, as 2,inf.", minimum=0.001)
    num_requests: int | None = _load(None, "Of a level.", unset=_REQUESTS, minimum=1, maximum=_MOST)
    seed: int = _load(0, "Of lengths, arrivals and orders; words are new in every run.")
    prompt_tokens: int | None = _asked(None, "With the template.", unset="64", minimum=1, maximum=_MOST)
    output_tokens: int = _asked(128, "Of an answer.", minimum=1, maximum=_MOST)
    length_spread: float = _asked(0.0, "Both vary evenly by this share, as 0.2.", minimum=0, maximum=0.99)
    dataset: Path | None = option(None, 'Instead: lines of {"prompt": "…"}.', group="Requests")
    goodput: Sequence[str] = _asked((), "Limits in ms, as ttft:200,tpot:50,e2el:3000.", commas=True)
    in_turns: bool = _server(False, "Each of several models alone, in turns; all over the first.")
    compare: tuple[str, str] | None = None

    def check(self) -> None:
        """Raises ConfigError for what cannot be, or would have no effect: every level ends, and in one way."""
        check_values(self)
        for one, other in _EXCLUSIVE:
            if getattr(self, one) and getattr(self, other):
                names = f"--{one} and --{other}".replace("_", "-")
                raise ConfigError(f"{names} are both given; leave one of them out")
        if self.compare is not None and len(self.model) > 2:
            raise ConfigError(f"--compare takes one model a server, not {len(self.model)}: as --model A,B")
        if self.in_turns and len(set(self.model)) < max(2, len(self.model)):
            raise ConfigError("--in-turns takes two models or more, each once: as --model A,B,C")
        if len(set(self.levels)) < len(self.levels):
            raise ConfigError("--concurrency and --rate name a level once; leave the second one out")
        _ = self.urls, self.limits  # which raise it too

    @cached_property
    def key(self) -> str | None:
        """The server's, given or of the environment."""
        return self.api_key or next(filter(None, map(os.environ.get, API_KEY_VARIABLES)), None)

    @cached_property
    def urls(self) -> list[str]:
        """Of one server, or of two to compare."""
        return [base_url(each) for each in self.compare or (self.url or DEFAULT_URL,)]

    @property
    def sides(self) -> list[tuple[str, Sequence[str], str]]:
        """Who is measured in turns, or alone: an address, the models that are asked there, and a name."""
        if self.in_turns:
            return [(self.urls[0], (model,), model) for model in self.model]
        if self.compare is None:
            return [(self.urls[0], self.model, "")]
        of_each = [(each,) for each in self.model] if len(self.model) == 2 else [self.model] * 2
        return [(url, models, name) for url, models, name in zip(self.urls, of_each, "AB", strict=True)]

    @cached_property
    def levels(self) -> list[Level]:
        """What is measured, one after the other."""
        if self.rate:
            return [Level(rate=each) for each in self.rate]
        return [Level(each) for each in self.concurrency or (1, 8, 32)]

    @cached_property
    def limits(self) -> dict[str, float]:
        """Milliseconds by metric, of --goodput. Raises ConfigError."""
        limits = {}
        for part in self.goodput:
            name, _, value = part.partition(":")
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = math.nan
            if name not in GOODPUT_METRICS or not 0 <= limits[name] < math.inf:
                allowed = f"{', '.join(GOODPUT_METRICS)} and milliseconds, as ttft:200,tpot:50"
                raise ConfigError(f"--goodput has '{part}'; it must be {allowed}")
        return limits

    @property
    def lengths(self) -> Lengths:
        """Of random prompts and their answers."""
        return Lengths(self.prompt_tokens or 64, self.output_tokens, self.length_spread)

    def requests_of(self, level: Level) -> int:
        """How many requests a level has."""
        return self.num_requests or level.default_requests

    def case(self, level: Level) -> str:
        """What a level's measurements are of, with its sizes."""
        asked = self.dataset.name if self.dataset is not None else self.lengths.prompt_tokens
        spread = f" ± {self.length_spread:.0%}" if self.length_spread else ""
        return f"{level}, {asked} → {self.output_tokens}{spread}"

    def settings(self) -> dict[str, Any]:
        """For the result: without the key and the names of machines."""
        hidden = ("url", "api_key", "concurrency", "rate")
        told = {name: getattr(self, name) for name in options_of(ServeLoadOptions) if name not in hidden}
        return told | {
            "urls": [shown_url(url) for url in self.urls],
            "levels": [str(level) for level in self.levels],
            "model": ", ".join(self.model) or None,
            "dataset": self.dataset and self.dataset.name,
        }
