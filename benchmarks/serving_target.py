"""A server ready to be loaded, and one level of load on it."""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson

from sleb.benchmarks.load.client import LoadClient
from sleb.benchmarks.load.load import Load, LoadRequest, LoadResult, OnLoad, arrival_times
from sleb.benchmarks.load_dataset import DatasetPrompts
from sleb.benchmarks.load_prompts import UNCOUNTED, PromptSource, RandomPrompts, calibrate
from sleb.benchmarks.serving_options import ENDPOINTS, Level, ServeOptions
from sleb.benchmarks.serving_server import Dialect, Server
from sleb.client.connection import open_client
from sleb.errors import SlebError

_CHECK = -1  # the number of a prompt that no load sends


class ServerStallsError(SlebError):
    """A server that answers no more; what was measured before it is kept."""


@dataclass
class Target:
    """A server, what it is asked and how. options: of this server alone; numbers: of the prompts still to be sent."""

    options: ServeOptions
    facts: Mapping[str, Any]
    notices: list[str]
    dialects: Mapping[str, Dialect]
    sources: Mapping[str, PromptSource]
    client: LoadClient
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def models(self) -> list[str]:
        """Ids, in the order in which requests take turns."""
        return list(self.dialects)

    def requests(self) -> Iterator[LoadRequest]:
        """Requests without end, to one model after the other; no number comes twice."""
        for number in self.numbers:
            model = self.models[number % len(self.models)]
            prompt = self.sources[model].make(number)
            body = orjson.dumps(self.dialects[model].body(prompt.content, prompt.output_tokens))
            yield LoadRequest(model, body, prompt.num_tokens, prompt.output_tokens)


def prepare(options: ServeOptions) -> Target:
    """Asks the server what must be known of it. Raises ClientError and ConfigError."""
    url = options.urls[0]
    with open_client(url, options.api_key, options.timeout) as http:
        server = Server(http, options)
        models = list(dict.fromkeys(server.choose_models(options.models)))
        dialects = {model: server.negotiate(model) for model in models}
        salt = secrets.token_hex(8)
        sources = {model: _source(options, server, dialect, salt) for model, dialect in dialects.items()}
        facts = server.describe()
    client = LoadClient(url, ENDPOINTS[options.endpoint], options.api_key, options.timeout)
    return Target(options, facts, server.notices, dialects, sources, client)


def _source(options: ServeOptions, server: Server, dialect: Dialect, salt: str) -> PromptSource:
    if options.dataset is not None:
        return DatasetPrompts(options.dataset, options.endpoint, options.lengths.output_tokens)
    vocabulary = calibrate(partial(server.count_tokens, dialect))
    if vocabulary is None:
        server.notices.append(f"{dialect.model}: the server counts no tokens; a word is taken for one.")
    source = RandomPrompts(options.lengths, vocabulary or UNCOUNTED, options.seed, salt)
    content = source.make(_CHECK).content
    assert isinstance(content, str)
    server.count_tokens(dialect, content)  # a context that is too short is told now
    return source


async def warm_up(target: Target, level: Level, num_requests: int, what: str, on_load: OnLoad) -> bool:
    """Sends requests that nobody counts; whether Ctrl-C ended it. Raises ServerStallsError, which names it `what`."""
    if not num_requests:
        return False
    requests = list(itertools.islice(target.requests(), num_requests))
    at_once = min(level.bound or num_requests, num_requests)
    result = await Load(target.client).closed(requests, at_once, on_load)
    check_alive(target, what, result)
    return result.interrupted


def check_alive(target: Target, what: str, result: LoadResult) -> None:
    """Raises ServerStallsError for a load that the server left without answers: the next ones would only wait too."""
    if result.interrupted:
        return
    num_timeouts = sum(outcome.timed_out for outcome in result.outcomes)
    nothing_came = num_timeouts > 0 and all(outcome.error for outcome in result.outcomes)
    if result.has_stalled or nothing_came:
        raise ServerStallsError(
            f"{what}: {num_timeouts} of {len(result.outcomes)} requests had no whole answer within "
            f"{target.options.timeout:g} s, so the load ended here; the server's log may say why, or give a longer "
            "--timeout"
        )


async def run_level(target: Target, level: Level, seed: str, on_load: OnLoad) -> LoadResult:
    """Loads the server. Requests whose number is known are made before the clock runs.

    seed: of the arrivals.
    """
    num_requests = target.options.requests_of(level)
    requests = target.requests()
    if num_requests is not None:
        requests = iter(list(itertools.islice(requests, num_requests)))
    load = Load(target.client, target.options.duration)
    if level.concurrency is not None:
        return await load.closed(requests, level.concurrency, on_load)
    return await load.open(requests, arrival_times(level.rate, seed), level.max_concurrency, on_load)


def describe_level(level: Level) -> dict[str, Any]:
    """A level by vLLM's names, and in words."""
    return {
        "level": str(level),
        "request_rate": "inf" if math.isinf(level.rate) else level.rate,
        "burstiness": 1.0,  # Poisson's
        "max_concurrency": level.bound,
    }


def num_warmups(options: ServeOptions, models: Sequence[str]) -> int:
    """Requests before each level."""
    return len(models) if options.warmup is None else options.warmup
