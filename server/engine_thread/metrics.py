"""Counters and histograms of one server, under vLLM's names with a prefix of ours, or whichever is asked for.

All of it belongs to the event loop, so that counting takes no lock: a token costs one search in a short list.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sleb.server.exchange import Exchange

if TYPE_CHECKING:
    from sleb.engine.outputs import EngineStats, StepOutput
    from sleb.engine.requests.tier import Tier
    from sleb.engine.served_model import ServedModel
    from sleb.server.engine_thread.auto_depth import AutoStats

# Upper bounds in seconds, those of vLLM (vllm/v1/metrics/loggers.py).
FIRST_TOKEN_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BOUNDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BOUNDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_OF_ONE_PROCESS = ("process_start_time_seconds", "process_max_fds")  # the least of several, not their sum
_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})


class Histogram:
    """Observations by upper bound, the bound itself included; the last bucket is for what is above them all."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, counts: Sequence[int], total: float) -> None:
        """Counts another's observations too, of the same bounds."""
        self.counts = [own + other for own, other in zip(self.counts, counts, strict=True)]
        self.sum += total

    def buckets(self) -> list[tuple[str, float]]:
        """Pairs of a bound and how many observations are not above it."""
        total, pairs = 0, []
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            pairs.append((bound, float(total)))
        return pairs


# Attribute of TierMetrics -> names of the series and their help.
_HISTOGRAMS = {
    "first_token": (("time_to_first_token_seconds",), "Seconds from a request's arrival to its first token."),
    # vLLM had the second name first, and its dashboards still ask for it.
    "token": (
        ("inter_token_latency_seconds", "time_per_output_token_seconds"),
        "Seconds between two tokens of an answer, as they come from the engine.",
    ),
    "mean_token": (
        ("request_time_per_output_token_seconds",),
        "Mean seconds a token after the first, of each answer.",
    ),
    "total": (("e2e_request_latency_seconds",), "Seconds from a request's arrival to its last token."),
    "queue": (("request_queue_time_seconds",), "Seconds from a request's arrival to its first step."),
    "prefill": (("request_prefill_time_seconds",), "Seconds from a request's first step to its first token."),
    "decode": (("request_decode_time_seconds",), "Seconds from a request's first token to its last."),
    "inference": (
        ("request_inference_time_seconds",),
        "Seconds from a request's first step to its last token.",
    ),
    "prompt_length": (("request_prompt_tokens",), "Tokens of a prompt."),
    # The second is vLLM's of the longest answer to a request, which is the same for a request for one.
    "output_length": (
        ("request_generation_tokens", "request_max_num_generation_tokens"),
        "Tokens of an answer.",
    ),
}
_COUNTERS = {
    "num_prompt_tokens": ("prompt_tokens", "Tokens of prompts, cached ones included."),
    "num_output_tokens": ("generation_tokens", "Tokens generated."),
    "num_cache_queries": (
        "prefix_cache_queries",
        "Tokens of prompts that were looked for in the prefix cache.",
    ),
    "num_cache_hits": ("prefix_cache_hits", "Tokens of prompts that were found in the prefix cache."),
    "num_aborted": ("request_aborted", "Answers that were given up because the client had gone."),
}


class TierMetrics:
    """What is counted of one tier. An answer is a choice: a request for n of them counts n times."""

    def __init__(self, max_model_len: int) -> None:
        lengths = _one_two_five(max_model_len)
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS)
        self.token = Histogram(TOKEN_BOUNDS)
        self.mean_token = Histogram(TOKEN_BOUNDS)
        self.total = Histogram(REQUEST_BOUNDS)
        self.queue = Histogram(REQUEST_BOUNDS)
        self.prefill = Histogram(REQUEST_BOUNDS)
        self.decode = Histogram(REQUEST_BOUNDS)
        self.inference = Histogram(REQUEST_BOUNDS)
        self.prompt_length = Histogram(lengths)
        self.output_length = Histogram(lengths)
        self.num_prompt_tokens = self.num_output_tokens = 0
        self.num_cache_queries = self.num_cache_hits = 0
        self.num_aborted = 0
        self.num_finished: dict[str, int] = {"stop": 0, "length": 0}

    def observe(self, output: StepOutput, arrival: float, last: float | None, now: float) -> None:
        """Counts one increment.

        arrival: of the HTTP request. last: when the increment before it came, None for the first. now: when this one
        did. All on the monotonic clock.
        """
        self.num_output_tokens += len(output.new_token_ids)
        if last is not None:
            self.token.observe(now - last)
        else:
            self.num_prompt_tokens += output.num_prompt_tokens
            self.num_cache_queries += output.num_prompt_tokens
            self.num_cache_hits += output.num_cached_tokens
            if output.timings.first_token is not None:
                self.first_token.observe(max(output.timings.first_token - arrival, 0.0))
        if output.finish_reason in self.num_finished:
            self.num_finished[output.finish_reason] += 1
            self._finish(output, arrival)

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for another process's `add`."""
        histograms = {name: getattr(self, name) for name in _HISTOGRAMS}
        return {
            "histograms": {name: [each.counts, each.sum] for name, each in histograms.items()},
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "finished": self.num_finished,
        }

    def add(self, state: Mapping[str, Any]) -> None:
        """Counts what another process has counted."""
        for name, (counts, total) in state["histograms"].items():
            getattr(self, name).add(counts, total)
        for name, count in state["counters"].items():
            setattr(self, name, getattr(self, name) + count)
        for reason, count in state["finished"].items():
            self.num_finished[reason] += count

    def _finish(self, output: StepOutput, arrival: float) -> None:
        timings, num_tokens = output.timings, output.num_output_tokens
        self.prompt_length.observe(output.num_prompt_tokens)
        self.output_length.observe(num_tokens)
        if timings.first_scheduled is None or timings.finished is None:
            return
        self.total.observe(max(timings.finished - arrival, 0.0))
        self.queue.observe(max(timings.first_scheduled - arrival, 0.0))
        first = timings.finished if timings.first_token is None else timings.first_token
        self.prefill.observe(first - timings.first_scheduled)
        self.decode.observe(timings.finished - first)
        self.inference.observe(timings.finished - timings.first_scheduled)
        if num_tokens > 1:
            self.mean_token.observe((timings.finished - first) / (num_tokens - 1))


class Counts:
    """What one process has counted of one server.

    keys: the names of API keys, for each of which is counted.
    """

    def __init__(self, model: ServedModel, keys: Iterable[str] = ()) -> None:
        self.tiers = {tier.id: TierMetrics(model.max_model_len) for tier in model.tiers}
        self.http: Counter[tuple[str, str, str]] = Counter()
        self.failures: Counter[str] = Counter()
        self.keys = {name: [0, 0, 0] for name in keys}  # requests, tokens of prompts, tokens generated
        self.unknown_fields: Counter[str] = Counter()

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for another process's `add`."""
        return {
            "tiers": {name: tier.state() for name, tier in self.tiers.items()},
            "http": [[*labels, count] for labels, count in self.http.items()],
            "failures": dict(self.failures),
            "keys": self.keys,
            "unknown_fields": dict(self.unknown_fields),
        }

    def add(self, state: Mapping[str, Any]) -> None:
        """Counts what another process of the same server has counted."""
        for name, tier in state["tiers"].items():
            self.tiers[name].add(tier)
        for *labels, count in state["http"]:
            method, path, status = labels
            self.http[method, path, status] += count
        self.failures.update(state["failures"])
        for name, counts in state["keys"].items():
            self.keys[name] = [own + other for own, other in zip(self.keys[name], counts, strict=True)]
        self.unknown_fields.update(state["unknown_fields"])


@dataclass(frozen=True)
class Scrape:
    """What /metrics needs beside this process's own counts.

    Attributes:
        stats: the engine's. auto: of the depths that the server chose, if it does.
        others: the counts of the server's other processes. pids: of all of its processes.
    """

    stats: EngineStats
    auto: AutoStats | None = None
    others: Sequence[Mapping[str, Any]] = ()
    pids: Sequence[int] = ()


class ServerMetrics:
    """What a server's HTTP side counts, and all series of the server as text.

    Args:
        prefix: of every name, before a colon. keys: see `Counts`.
    """

    def __init__(self, model: ServedModel, prefix: str = "sleb", keys: Sequence[str] = ()) -> None:
        self._model, self._prefix, self._key_names = model, prefix, keys
        self.counts = Counts(model, keys)

    def tier(self, tier: Tier) -> TierMetrics:
        return self.counts.tiers[tier.id]

    def count_exchange(self, exchange: Exchange, method: str, path: str, status: int) -> None:
        """Counts an HTTP request that is over; `path` is a route's, so that there are few."""
        counts = self.counts
        counts.http[method if method in _METHODS else "other", path, str(status)] += 1
        if exchange.failure is not None:
            counts.failures[exchange.failure] += 1
        of_key = counts.keys.get(exchange.key or "")
        if of_key is not None:
            of_key[0] += 1
            of_key[1] += exchange.answer.get("prompt_tokens", 0)
            of_key[2] += exchange.answer.get("generated_tokens", 0)

    def text(self, scrape: Scrape) -> bytes:
        """All series, in Prometheus' text format; those of several processes are added up."""
        counts = self.counts
        if scrape.others:
            counts = Counts(self._model, self._key_names)
            for state in (self.counts.state(), *scrape.others):
                counts.add(state)
        registry = CollectorRegistry()
        registry.register(ServerCollector(self._model, self._prefix, counts, scrape))
        registry.register(Processes(scrape.pids or (os.getpid(),)))
        return generate_latest(registry)


class Processes(Collector):
    """prometheus-client's series of a process, for several as if they were one."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._collectors = [ProcessCollector(pid=partial(int, pid), registry=None) for pid in pids]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, list[Metric]] = {}
        for collector in self._collectors:
            for family in collector.collect():
                families.setdefault(family.name, []).append(family)
        for name, (first, *others) in families.items():
            [sample] = first.samples
            values = [sample.value, *(each.samples[0].value for each in others)]
            total = min(values) if name in _OF_ONE_PROCESS else sum(values)
            first.samples = [sample._replace(value=total)]
            yield first


class ServerCollector(Collector):
    """All series of a server but those of its processes.

    The cache and preemptions belong to all tiers together; their `model_name` is the model's own name.
    """

    def __init__(self, model: ServedModel, prefix: str, counts: Counts, scrape: Scrape) -> None:
        self._prefix = f"{prefix}:"
        self._stats, self._auto = scrape.stats, scrape.auto
        self._counts = counts
        self._model = model
        self._model_name = model.model_name
        self._depths = {tier.id: tier.depth for tier in model.tiers}

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield from self._collect_engine()
        if self._auto is not None:
            yield from self._collect_auto(self._auto)
        for name, (series, text) in _HISTOGRAMS.items():
            for each in series:
                family = HistogramMetricFamily(self._prefix + each, text, labels=("model_name",))
                for tier, metrics in counts.tiers.items():
                    histogram: Histogram = getattr(metrics, name)
                    family.add_metric((tier,), histogram.buckets(), histogram.sum)
                yield family
        for name, (each, text) in _COUNTERS.items():
            values = (((tier,), getattr(metrics, name)) for tier, metrics in counts.tiers.items())
            yield self._counter(each, text, ("model_name",), values)
        finished = (
            ((tier, reason), count)
            for tier, metrics in counts.tiers.items()
            for reason, count in metrics.num_finished.items()
        )
        yield self._counter(
            "request_success", "Answers that were finished.", ("model_name", "finished_reason"), finished
        )
        failures = (((code,), count) for code, count in counts.failures.items())
        yield self._counter("request_failure", "Requests answered with an error.", ("code",), failures)
        text = "HTTP requests that are over."
        yield self._counter("http_requests", text, ("method", "path", "status"), counts.http.items())
        text = "Request fields that this server does not know, every time that one came."
        yield self._counter("unknown_request_fields", text, (), [((), counts.unknown_fields.total())])
        words = {
            "requests": "HTTP requests",
            "prompt_tokens": "Tokens of prompts",
            "generation_tokens": "Tokens generated",
        }
        for number, kind in enumerate(words if counts.keys else ()):
            text = f"{words[kind]} for whoever bore the API key of that name."
            by_name = [((name,), each[number]) for name, each in counts.keys.items()]
            yield self._counter(f"api_key_{kind}", text, ("key",), by_name)

    def _collect_engine(self) -> Iterator[Metric]:
        stats, model = self._stats, (self._model_name,)
        states = (
            ("num_requests_running", "Requests that are computed now.", stats.running),
            ("num_requests_waiting", "Requests that wait to be computed.", stats.waiting),
        )
        # Totals first, of no tier: what picks a server for a request reads the first series of a name.
        for name, text, counts in states:
            total = name.replace("num_", "engine_")
            yield GaugeMetricFamily(self._prefix + total, f"{text[:-1]}, of all tiers.", sum(counts.values()))
        for name, text, counts in states:
            gauge = GaugeMetricFamily(self._prefix + name, text, labels=("model_name",))
            if self._prefix == "vllm:":  # whoever knows only vLLM knows one such series
                gauge.add_sample(gauge.name, {}, sum(counts.values()))
            for tier, depth in self._depths.items():
                gauge.add_metric((tier,), counts.get(depth, 0))
            yield gauge
        text = "Share of the KV cache that is in use; 1 is all of it."
        gauge = GaugeMetricFamily(self._prefix + "kv_cache_usage_perc", text, labels=("model_name",))
        gauge.add_metric(model, stats.kv_cache_usage)
        yield gauge
        text = "Pages of the KV cache: tokens in one, and how many there are."
        info = GaugeMetricFamily(
            self._prefix + "cache_config_info", text, labels=("block_size", "num_gpu_blocks")
        )
        info.add_metric((str(self._model.page_size), str(self._model.num_pages)), 1)
        yield info
        text = "Requests that lost their pages and were computed again."
        yield self._counter("num_preemptions", text, ("model_name",), [(model, stats.num_preemptions)])

    def _collect_auto(self, auto: AutoStats) -> Iterator[Metric]:
        moved = (((str(auto.shallowest), str(depth)), count) for depth, count in auto.degraded.items())
        text = "Requests that got a deeper cut than the shallowest, because of the queue."
        yield self._counter("degraded_requests", text, ("from", "to"), moved)
        seconds = (((str(depth),), spent) for depth, spent in auto.seconds.items())
        text = "Seconds for which requests that leave their depth to the server were given this one."
        yield self._counter("auto_depth_seconds", text, ("depth",), seconds)

    def _counter(
        self, name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(self._prefix + name, text, labels=labels)
        for label_values, value in values:
            family.add_metric(label_values, value)
        return family


def _one_two_five(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `largest`."""
    bounds = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    return tuple(float(bound) for bound in bounds if bound <= largest)
