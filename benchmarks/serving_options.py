"""What `sleb bench serve` is asked to do, checked before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sleb.benchmarks.load_prompts import Lengths
from sleb.client.connection import is_loopback
from sleb.errors import ConfigError

ENDPOINTS = {"chat": "chat/completions", "completions": "completions"}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
DEFAULT_CONCURRENCY = "1,8,32"
_LEAST_REQUESTS = 20
_REQUESTS_A_SLOT = 10
_SECONDS_OF_REQUESTS = 30  # at a rate
_REQUESTS_AT_ONCE = 100  # at the rate inf


@dataclass(frozen=True)
class Level:
    """One load: so many requests at once, each followed by the next, or so many a second whatever becomes of them.

    concurrency: of the closed loop; None for the open one. rate: requests/s of the open one, inf for all at once;
    max_concurrency: how many of these may be open.
    """

    concurrency: int | None = None
    rate: float = math.inf
    max_concurrency: int | None = None

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        rate = "all at once" if math.isinf(self.rate) else f"{self.rate:g} requests/s"
        return rate if self.max_concurrency is None else f"{rate}, at most {self.max_concurrency} open"

    @property
    def bound(self) -> int | None:
        """Requests that may be open at once."""
        return self.concurrency or self.max_concurrency

    @property
    def default_requests(self) -> int:
        """How many requests make a measurement."""
        if self.concurrency is not None:
            return max(_LEAST_REQUESTS, _REQUESTS_A_SLOT * self.concurrency)
        if math.isinf(self.rate):
            return _REQUESTS_AT_ONCE
        return max(_LEAST_REQUESTS, round(_SECONDS_OF_REQUESTS * self.rate))


@dataclass(frozen=True)
class ServeOptions:
    """What to measure. Raises ConfigError for values out of range.

    urls: as `sleb.client.connection.base_url` gives them; two to compare. models: of one server, taken in turns, none
    for its first; when comparing one for both or one for each. num_requests: a level, None for the level's own;
    duration: seconds in which requests begin, instead. warmup: requests before each level, None for one a model.
    goodput: milliseconds by metric. rounds: of a comparison.
    """

    urls: Sequence[str]
    models: Sequence[str] = ()
    levels: Sequence[Level] = ()
    api_key: str | None = field(default=None, repr=False)
    endpoint: str = "chat"
    num_requests: int | None = None
    duration: float | None = None
    warmup: int | None = None
    lengths: Lengths = field(default_factory=Lengths)
    dataset: Path | None = None
    goodput: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 6
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise ConfigError(f"--endpoint is '{self.endpoint}'; it must be one of {', '.join(ENDPOINTS)}")
        if self.num_requests is not None and self.duration is not None:
            raise ConfigError("--num-requests and --duration are both given; a level ends by one of them")
        if self.is_comparison and len(self.models) > 2:
            raise ConfigError(f"--compare takes one model a server, not {len(self.models)}: as --model A,B")
        if self.is_comparison and self.duration is not None:
            raise ConfigError(
                "--compare sends both servers the same requests: give --num-requests, not --duration"
            )
        limits = {
            "--num-requests": (self.num_requests, 1),
            "--warmup": (self.warmup, 0),
            "--rounds": (self.rounds, 1),
            "--prompt-tokens": (self.lengths.prompt_tokens, 1),
            "--output-tokens": (self.lengths.output_tokens, 1),
            "--prefix-tokens": (self.lengths.prefix_tokens, 0),
            "--num-prefixes": (self.lengths.num_prefixes, 1),
        }
        for option, (value, least) in limits.items():
            if value is not None and value < least:
                raise ConfigError(f"{option} is {value}; it must be {least} or more")
        for option, seconds in (("--duration", self.duration), ("--timeout", self.timeout)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ConfigError(f"{option} is {seconds:g}; it must be a number of seconds above 0")
        if not 0 <= self.lengths.spread < 1:
            raise ConfigError(f"--length-spread is {self.lengths.spread:g}; it must be from 0 to below 1")

    @property
    def is_comparison(self) -> bool:
        """Whether two servers are compared."""
        return len(self.urls) == 2

    def requests_of(self, level: Level) -> int | None:
        """How many requests a level has; None where its time ends it."""
        return None if self.duration is not None else self.num_requests or level.default_requests

    def settings(self) -> dict[str, Any]:
        """For the result file: plain values, without the key and the names of machines."""
        return {
            "urls": [shown_url(url) for url in self.urls],
            "models": list(self.models),
            "levels": [str(level) for level in self.levels],
            "endpoint": self.endpoint,
            "num_requests": self.num_requests,
            "duration": self.duration,
            "warmup": self.warmup,
            "prompt_tokens": None if self.dataset else self.lengths.prompt_tokens,
            "output_tokens": self.lengths.output_tokens,
            "length_spread": self.lengths.spread,
            "prefix_tokens": self.lengths.prefix_tokens,
            "num_prefixes": self.lengths.num_prefixes,
            "dataset": self.dataset and self.dataset.name,
            "goodput": dict(self.goodput),
            "rounds": self.rounds if self.is_comparison else None,
            "timeout": self.timeout,
            "seed": self.seed,
        }


def shown_url(url: str) -> str:
    """An address without the name of the machine, unless it is this one."""
    if is_loopback(url):
        return url
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    _, colon, port = place.rpartition(":")
    return f"{scheme}://server{colon}{port if colon else ''}{slash}{path}"


def make_levels(concurrency: str | None, rate: str | None, max_concurrency: int | None) -> list[Level]:
    """The levels of a sweep, from lists like "1,8,32" or "0.5,2,inf". Raises ConfigError."""
    if concurrency is not None and rate is not None:
        raise ConfigError("--concurrency and --rate are both given; a load is one of them")
    if max_concurrency is not None and max_concurrency < 1:
        raise ConfigError(f"--max-concurrency is {max_concurrency}; it must be 1 or more")
    if rate is not None:
        rates = _numbers("--rate", rate, "requests a second above 0, as 0.5,2,inf")
        return [Level(rate=each, max_concurrency=max_concurrency) for each in rates]
    if max_concurrency is not None:
        raise ConfigError(
            "--max-concurrency bounds the requests of --rate; give that too, or --concurrency alone"
        )
    allowed = "whole numbers above 0, as 1,8,32"
    numbers = _numbers("--concurrency", concurrency or DEFAULT_CONCURRENCY, allowed)
    if any(number != math.floor(number) for number in numbers if number < math.inf) or math.inf in numbers:
        raise ConfigError(f"--concurrency is '{concurrency}'; it must be {allowed}")
    return [Level(concurrency=int(number)) for number in numbers]


def _numbers(option: str, text: str, allowed: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or not all(number > 0 for number in numbers):
        raise ConfigError(f"{option} is '{text}'; it must be {allowed}")
    return numbers


def parse_goodput(given: Sequence[str]) -> dict[str, float]:
    """Milliseconds by metric, from "ttft:200,tpot:50" or several of them. Raises ConfigError."""
    limits = {}
    for part in (part.strip() for text in given for part in text.replace(" ", ",").split(",")):
        if not part:
            continue
        name, _, value = part.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in GOODPUT_METRICS or not 0 <= limit < math.inf:
            raise ConfigError(
                f"--goodput has '{part}'; it must be {', '.join(GOODPUT_METRICS)} and milliseconds, as ttft:200,tpot:50"
            )
        limits[name] = limit
    return limits


def side_options(options: ServeOptions, side: int) -> ServeOptions:
    """Of one server of a comparison, as if it were measured alone."""
    models = options.models[side : side + 1] if len(options.models) == 2 else options.models
    return replace(options, urls=(options.urls[side],), models=models)
