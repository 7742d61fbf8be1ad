"""What `sleb bench serve` is asked to do, checked before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sleb.benchmarks.load.events import without_key
from sleb.benchmarks.load_prompts import Lengths, is_unicode
from sleb.client.connection import is_loopback
from sleb.errors import ConfigError

ENDPOINTS = {"chat": "chat/completions", "completions": "completions"}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
DEFAULT_CONCURRENCY = "1,8,32"
DEFAULT_ROUNDS = 6
MAX_CONCURRENCY = 10_000
MAX_REQUESTS = 1_000_000
_MAX_TOKENS = 1 << 20
_MIN_RATE, _MAX_RATE = 0.001, 100_000
_MIN_SECONDS, _MAX_SECONDS = 0.001, 86_400
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
        return min(MAX_REQUESTS, max(_LEAST_REQUESTS, round(_SECONDS_OF_REQUESTS * self.rate)))


@dataclass(frozen=True)
class ServeOptions:
    """What to measure. Raises ConfigError for values out of range, and for what would have no effect.

    urls: as `sleb.client.connection.base_url` gives them; two to compare. models: of one server, taken in turns, none
    for its first; when comparing one for both or one for each. num_requests: a level, None for the level's own;
    duration: seconds in which requests begin, instead. warmup: requests before each level, None for one a model.
    goodput: milliseconds by metric. rounds: of a comparison, None for 6. label: of the rows of one server.
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
    rounds: int | None = None
    timeout: float = 600.0
    seed: int = 0
    label: str | None = None

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise ConfigError(f"--endpoint is '{self.endpoint}'; it must be one of {', '.join(ENDPOINTS)}")
        self._check_ranges()
        self._check_ends()
        self._check_sides()
        for option, text in (*(("--model", model) for model in self.models), ("--label", self.label or "")):
            if not is_unicode(text):
                raise ConfigError(f"{option} {text!a} is no text in UTF-8; write it in UTF-8")

    def _check_ranges(self) -> None:
        lengths = self.lengths
        limits: dict[str, tuple[float | None, float, float]] = {
            "--num-requests": (self.num_requests, 1, MAX_REQUESTS),
            "--warmup": (self.warmup, 0, MAX_REQUESTS),
            "--rounds": (self.rounds, 1, 1_000),
            "--prompt-tokens": (lengths.prompt_tokens, 1, _MAX_TOKENS),
            "--output-tokens": (lengths.output_tokens, 1, _MAX_TOKENS),
            "--prefix-tokens": (lengths.prefix_tokens, 0, _MAX_TOKENS),
            "--num-prefixes": (lengths.num_prefixes, 1, 10_000),
            "--num-prefixes times --prefix-tokens": (lengths.num_prefixes * lengths.prefix_tokens, 0, 10**8),
            "--duration": (self.duration, _MIN_SECONDS, _MAX_SECONDS),
            "--timeout": (self.timeout, _MIN_SECONDS, _MAX_SECONDS),
        }
        for option, (value, least, most) in limits.items():
            if value is not None and not least <= value <= most:
                unit = " seconds" if option in ("--duration", "--timeout") else ""
                raise ConfigError(f"{option} is {value:,}; it must be from {least:,} to {most:,}{unit}")
        if not 0 <= lengths.spread < 1:
            raise ConfigError(f"--length-spread is {lengths.spread:g}; it must be from 0 to below 1")

    def _check_ends(self) -> None:
        """That every level ends, and in one way."""
        if self.duration is None:
            return
        if self.num_requests is not None:
            raise ConfigError("--num-requests and --duration are both given; a level ends by one of them")
        for level in self.levels:
            if level.concurrency is None and math.isinf(level.rate):
                raise ConfigError("--rate inf sends all at once; give --num-requests instead of --duration")
            if level.concurrency is None and level.rate * self.duration > MAX_REQUESTS:
                raise ConfigError(
                    f"--rate {level.rate:g} for --duration {self.duration:g} are {level.rate * self.duration:,.0f} "
                    f"requests; at most {MAX_REQUESTS:,} may be sent: give less of one"
                )

    def _check_sides(self) -> None:
        """What only two servers have, and what only one has."""
        if not self.is_comparison:
            if self.rounds is not None:
                raise ConfigError("--rounds are those of --compare; give that too, or leave --rounds out")
            return
        if len(self.models) > 2:
            raise ConfigError(f"--compare takes one model a server, not {len(self.models)}: as --model A,B")
        if self.duration is not None:
            raise ConfigError(
                "--compare sends both servers requests of the same lengths: give --num-requests, not --duration"
            )
        if self.label is not None:
            raise ConfigError("--compare labels the rows of its servers A and B; leave --label out")

    @property
    def is_comparison(self) -> bool:
        """Whether two servers are compared."""
        return len(self.urls) == 2

    @property
    def num_rounds(self) -> int:
        """Of a comparison."""
        return DEFAULT_ROUNDS if self.rounds is None else self.rounds

    def requests_of(self, level: Level) -> int | None:
        """How many requests a level has; None where its time ends it."""
        return None if self.duration is not None else self.num_requests or level.default_requests

    def without_key(self, text: str) -> str:
        """`text` without the server's key, if that is in it."""
        return without_key(text, self.api_key)

    def settings(self) -> dict[str, Any]:
        """For the result file: plain values, without the key and the names of machines; null for what has no effect."""
        lengths, is_random = self.lengths, self.dataset is None
        return {
            "urls": [self.without_key(shown_url(url)) for url in self.urls],
            "models": list(self.models),
            "levels": [str(level) for level in self.levels],
            "endpoint": self.endpoint,
            "num_requests": self.num_requests,
            "duration": self.duration,
            "warmup": self.warmup,
            "prompt_tokens": lengths.prompt_tokens if is_random else None,
            "output_tokens": lengths.output_tokens,
            "length_spread": lengths.spread if is_random else None,
            "prefix_tokens": lengths.prefix_tokens if is_random else None,
            "num_prefixes": lengths.num_prefixes if is_random and lengths.prefix_tokens else None,
            "dataset": self.dataset and self.dataset.name,
            "goodput": dict(self.goodput),
            "rounds": self.num_rounds if self.is_comparison else None,
            "timeout": self.timeout,
            "seed": self.seed,
        }


def make_lengths(
    output_tokens: int,
    *,
    prompt_tokens: int | None,
    spread: float | None,
    prefix_tokens: int | None,
    num_prefixes: int | None,
    has_dataset: bool,
) -> Lengths:
    """The lengths that are given, None for those that are not. Raises ConfigError for those without effect."""
    of_random = {
        "--prompt-tokens": prompt_tokens,
        "--length-spread": spread,
        "--prefix-tokens": prefix_tokens,
        "--num-prefixes": num_prefixes,
    }
    given = [option for option, value in of_random.items() if value is not None]
    if has_dataset and given:
        raise ConfigError(
            f"--dataset has the prompts, so {' and '.join(given)} would do nothing; leave one or the other out"
        )
    if num_prefixes is not None and not prefix_tokens:
        raise ConfigError("--num-prefixes needs --prefix-tokens, their length; give that too")
    plain = Lengths()
    return Lengths(
        plain.prompt_tokens if prompt_tokens is None else prompt_tokens,
        output_tokens,
        plain.spread if spread is None else spread,
        plain.prefix_tokens if prefix_tokens is None else prefix_tokens,
        plain.num_prefixes if num_prefixes is None else num_prefixes,
    )


def shown_url(url: str) -> str:
    """An address without the name of the machine, unless it is this one."""
    if is_loopback(url):
        return url
    parts = urlsplit(url)
    port = "" if parts.port is None else f":{parts.port}"
    return f"{parts.scheme}://server{port}{parts.path}"


def make_levels(concurrency: str | None, rate: str | None, max_concurrency: int | None) -> list[Level]:
    """The levels of a sweep, from lists like "1,8,32" or "0.5,2,inf". Raises ConfigError."""
    if concurrency is not None and rate is not None:
        raise ConfigError("--concurrency and --rate are both given; a load is one of them")
    if max_concurrency is not None and not 1 <= max_concurrency <= MAX_CONCURRENCY:
        raise ConfigError(
            f"--max-concurrency is {max_concurrency:,}; it must be from 1 to {MAX_CONCURRENCY:,}"
        )
    if rate is not None:
        allowed = f"requests a second from {_MIN_RATE:g} to {_MAX_RATE:,}, or inf, as 0.5,2,inf"
        rates = _numbers("--rate", rate, allowed)
        if not all(_MIN_RATE <= each <= _MAX_RATE or math.isinf(each) for each in rates):
            raise ConfigError(f"--rate is '{rate}'; it must be {allowed}")
        return [Level(rate=each, max_concurrency=max_concurrency) for each in rates]
    if max_concurrency is not None:
        raise ConfigError(
            "--max-concurrency bounds the requests of --rate; give that too, or --concurrency alone"
        )
    allowed = f"whole numbers from 1 to {MAX_CONCURRENCY:,}, as 1,8,32"
    numbers = _numbers("--concurrency", concurrency or DEFAULT_CONCURRENCY, allowed)
    if not all(1 <= number <= MAX_CONCURRENCY and number == math.floor(number) for number in numbers):
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
    return replace(options, urls=(options.urls[side],), models=models, rounds=None)
