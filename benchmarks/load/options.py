"""What `sleb bench serve` is asked to do: the options, and the levels of load that they name."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sleb.benchmarks.load.events import without_key
from sleb.benchmarks.load.server import ENDPOINTS, shown_url
from sleb.benchmarks.prompts import Lengths, is_unicode
from sleb.client.connection import base_url
from sleb.errors import ConfigError
from sleb.options import check_values, option, options_of

API_KEY_VARIABLES = ("SLEB_API_KEY", "OPENAI_API_KEY")
DEFAULT_URL = "http://127.0.0.1:8000/v1"
DEFAULT_CONCURRENCY = "1,8,32"
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
MAX_CONCURRENCY = 10_000
MAX_REQUESTS = 1_000_000
_MAX_TOKENS = 1 << 20
_MIN_RATE, _MAX_RATE = 0.001, 100_000
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
class ServeLoadOptions:
    """What to measure. compare: instead of url, two servers in turns, B over A."""

    url: str | None = option(None, "The server's address.", unset=DEFAULT_URL, group="Server")
    model: Sequence[str] = option(
        (),
        "Models that requests take in turns; of two servers one for both, or A's and B's.",
        unset="the server's first",
        commas=True,
        group="Server",
    )
    api_key: str | None = option(
        None, "The server's key.", unset="SLEB_API_KEY or OPENAI_API_KEY", group="Server"
    )
    endpoint: str = option("chat", "What is asked.", choices=tuple(ENDPOINTS), group="Server")
    timeout: float = option(
        600.0, "Seconds for a request; more is a failure.", minimum=0.001, maximum=86_400, group="Server"
    )
    concurrency: str | None = option(
        None,
        "Requests at once; a list is a sweep.",
        unset=f"{DEFAULT_CONCURRENCY} without --rate",
        metavar="N,…",
        group="Load",
    )
    rate: str | None = option(
        None,
        "Instead: requests a second at random (Poisson) times, as 0.5,2,inf.",
        metavar="X,…",
        group="Load",
    )
    max_concurrency: int | None = option(
        None,
        "Requests of --rate that may be open.",
        unset="no bound",
        minimum=1,
        maximum=MAX_CONCURRENCY,
        group="Load",
    )
    num_requests: int | None = option(
        None,
        "Requests of a level.",
        unset="10 × concurrency or 30 seconds' worth, at least 20; 100 at inf",
        minimum=1,
        maximum=MAX_REQUESTS,
        group="Load",
    )
    duration: float | None = option(
        None,
        "Instead: seconds of a level in which requests begin.",
        minimum=0.001,
        maximum=86_400,
        group="Load",
    )
    warmup: int | None = option(
        None,
        "Requests before a level that do not count.",
        unset="one a model",
        minimum=0,
        maximum=MAX_REQUESTS,
        group="Load",
    )
    rounds: int | None = option(
        None, "Turns of --compare.", unset="6, which an interval takes", minimum=1, maximum=1000, group="Load"
    )
    seed: int = option(0, "Of lengths, arrivals and orders. Random words are new in every run.", group="Load")
    prompt_tokens: int | None = option(
        None,
        "Tokens of a prompt, by the server's count, its template included.",
        unset="64",
        minimum=1,
        maximum=_MAX_TOKENS,
        group="Requests",
    )
    output_tokens: int = option(128, "Tokens of an answer.", minimum=1, maximum=_MAX_TOKENS, group="Requests")
    length_spread: float | None = option(
        None,
        "Both lengths vary evenly by this share, as 0.2.",
        unset="0",
        minimum=0,
        maximum=0.99,
        group="Requests",
    )
    prefix_tokens: int | None = option(
        None,
        "Tokens before each prompt that others have too.",
        unset="0",
        minimum=0,
        maximum=_MAX_TOKENS,
        group="Requests",
    )
    num_prefixes: int | None = option(
        None, "How many such beginnings there are.", unset="1", minimum=1, maximum=10_000, group="Requests"
    )
    dataset: Path | None = option(
        None,
        "Instead: a file with a prompt, messages or ShareGPT's conversations a line, as JSON.",
        group="Requests",
    )
    goodput: Sequence[str] = option(
        (),
        "Count requests that keep limits in milliseconds, as ttft:200,tpot:50,e2el:3000.",
        commas=True,
        group="Output",
    )
    label: str | None = option(None, "A name for what is measured.", unset="the model's", group="Output")
    vllm_json: Path | None = option(
        None, "Write each level into this folder, as vllm bench serve does: every time of it.", group="Output"
    )
    compare: tuple[str, str] | None = None

    def check(self) -> None:
        """Raises ConfigError for what cannot be, or would have no effect: every level ends, and in one way."""
        check_values(self)
        _ = self.urls, self.limits, self.levels
        for level in self.levels if self.duration is not None else ():
            if level.concurrency is None and math.isinf(level.rate):
                raise ConfigError("--rate inf sends all at once; give --num-requests instead of --duration")
            if level.concurrency is None and (due := level.rate * (self.duration or 0)) > MAX_REQUESTS:
                raise ConfigError(
                    f"--rate {level.rate:g} for --duration {self.duration:g} are {due:,.0f} requests; at most "
                    f"{MAX_REQUESTS:,} may be sent: give less of one"
                )
        if self.lengths.num_prefixes * self.lengths.prefix_tokens > 10**8:
            raise ConfigError("--num-prefixes times --prefix-tokens is too much; at most 100,000,000 tokens")
        for name, text in (*(("--model", model) for model in self.model), ("--label", self.label or "")):
            if not is_unicode(text):
                raise ConfigError(f"{name} {text!a} is no text in UTF-8; write it in UTF-8")
        for message, is_refused in self._without_effect().items():
            if is_refused:
                raise ConfigError(message)

    def _without_effect(self) -> dict[str, bool]:
        """Whether something is given that would do nothing."""
        names = ("prompt_tokens", "length_spread", "prefix_tokens", "num_prefixes")
        random = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        two = self.compare is not None
        return {
            "--num-requests and --duration are both given; a level ends by one of them": (
                self.num_requests is not None and self.duration is not None
            ),
            f"--dataset has the prompts, so {' and '.join(random)} would do nothing; leave one or the other out": (
                self.dataset is not None and bool(random)
            ),
            "--num-prefixes needs --prefix-tokens, their length; give that too": (
                self.num_prefixes is not None and not self.prefix_tokens
            ),
            "--rounds are those of --compare; give that too, or leave --rounds out": (
                self.rounds is not None and not two
            ),
            "--compare names both servers, so --url would do nothing; leave one of them out": (
                two and self.url is not None
            ),
            f"--compare takes one model a server, not {len(self.model)}: as --model A,B": (
                two and len(self.model) > 2
            ),
            "--compare sends both servers requests of the same lengths: give --num-requests, not --duration": (
                two and self.duration is not None
            ),
            "--compare calls its servers A and B; leave --label out": two and self.label is not None,
            "--compare writes no files of vLLM's form; load each server alone for --vllm-json": (
                two and self.vllm_json is not None
            ),
            "--compare knows no --goodput; load each server alone for that": two and bool(self.goodput),
        }

    @cached_property
    def key(self) -> str | None:
        """The server's, given or of the environment."""
        return self.api_key or next(filter(None, map(os.environ.get, API_KEY_VARIABLES)), None)

    @property
    def shown_label(self) -> str | None:
        """Without the key, whatever it is good for there."""
        return self.label and without_key(self.label, self.key)

    @cached_property
    def urls(self) -> list[str]:
        """Of one server, or of two to compare."""
        return [base_url(each) for each in self.compare or (DEFAULT_URL if self.url is None else self.url,)]

    @cached_property
    def levels(self) -> list[Level]:
        """Of the sweep."""
        return make_levels(self.concurrency, self.rate, self.max_concurrency)

    @cached_property
    def limits(self) -> dict[str, float]:
        """Milliseconds by metric, of --goodput."""
        return parse_goodput(self.goodput)

    @cached_property
    def lengths(self) -> Lengths:
        """Of random prompts and their answers; of a dataset the answers' alone counts."""
        prompt = 64 if self.prompt_tokens is None else self.prompt_tokens
        spread, prefix = self.length_spread or 0.0, self.prefix_tokens or 0
        return Lengths(prompt, self.output_tokens, spread, prefix, self.num_prefixes or 1)

    def requests_of(self, level: Level) -> int | None:
        """How many requests a level has; None where its time ends it."""
        return None if self.duration is not None else self.num_requests or level.default_requests

    def case(self, level: Level) -> str:
        """What a level's measurements are of, with its sizes."""
        if self.dataset is not None:
            name = self.dataset.name.encode(
                errors="backslashreplace"
            ).decode()  # which a terminal can be sent
            return f"{level}, {name} → {self.output_tokens}"
        prefix = f"{self.lengths.prefix_tokens} shared + " if self.lengths.prefix_tokens else ""
        spread = f" ± {self.lengths.spread:.0%}" if self.lengths.spread else ""
        return f"{level}, {prefix}{self.lengths.prompt_tokens} → {self.output_tokens}{spread}"

    def settings(self) -> dict[str, Any]:
        """For the result: without the key and the names of machines."""
        hidden = ("url", "model", "api_key", "dataset", "vllm_json", "concurrency", "rate", "max_concurrency")
        told = {name: getattr(self, name) for name in options_of(ServeLoadOptions)}
        return {
            "urls": [without_key(shown_url(url), self.key) for url in self.urls],
            "levels": [str(level) for level in self.levels],
            "model": ", ".join(self.model) or None,
            "dataset": self.dataset and self.dataset.name,
            **{name: value for name, value in told.items() if name not in hidden},
            "label": self.shown_label,
        }


def make_levels(concurrency: str | None, rate: str | None, max_concurrency: int | None) -> list[Level]:
    """The levels of a sweep, from lists like "1,8,32" or "0.5,2,inf". Raises ConfigError."""
    if concurrency is not None and rate is not None:
        raise ConfigError("--concurrency and --rate are both given; a load is one of them")
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


def _numbers(name: str, text: str, allowed: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or not all(number > 0 for number in numbers) or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{name} is '{text}'; it must be {allowed}, each once")
    return numbers


def parse_goodput(given: Sequence[str]) -> dict[str, float]:
    """Milliseconds by metric, from "ttft:200,tpot:50" or several of them. Raises ConfigError."""
    limits = {}
    for part in (part for text in given for part in text.replace(",", " ").split()):
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
