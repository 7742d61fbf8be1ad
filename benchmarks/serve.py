"""`sleb bench serve`: load on any OpenAI-compatible server, one level after the other, or on two in turns.

Two servers are compared in turns, so that what slows the machine down for a while meets both alike: in a turn both get
requests of the same lengths at the same times. Random words differ, since both may be one server with a prefix cache;
rows of a dataset are the same. One server is idle while the other is measured.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from sleb.benchmarks.load.client import LoadClient
from sleb.benchmarks.load.events import without_key
from sleb.benchmarks.load.load import Load, LoadProgress, LoadRequest, LoadResult, arrival_times
from sleb.benchmarks.load.metrics import failures, measure, raw_samples
from sleb.benchmarks.load.options import Level, ServeLoadOptions
from sleb.benchmarks.load.server import Dialect, Server, public_command
from sleb.benchmarks.prompts import UNCOUNTED, DatasetPrompts, PromptSource, RandomPrompts, calibrate
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.turns import Case, Sample, TurnOptions, Turns
from sleb.benchmarks.turns import measure as measure_in_turns
from sleb.errors import ConfigError, SlebError

# Above this share of one processor the client, a single thread, may be what limits.
_BUSY_CLIENT = 0.7
# A wait for a turn that is longer than this share of the latency is told.
_LONG_QUEUE = 0.1
# vLLM's names of what sends such requests.
_BACKENDS = {"chat": "openai-chat", "completions": "openai"}
# Metric of a measurement -> its name among vLLM's. The first four are compared.
METRICS = {
    "tokens/s": "output_throughput",
    "requests/s": "request_throughput",
    "TTFT p50 ms": "median_ttft_ms",
    "TPOT p50 ms": "median_tpot_ms",
    "TTFT p99 ms": "p99_ttft_ms",
    "TPOT p99 ms": "p99_tpot_ms",
    "ITL p99 ms": "p99_itl_ms",
    "latency p50 ms": "median_e2el_ms",
    "latency p99 ms": "p99_e2el_ms",
    "goodput requests/s": "request_goodput",
}
_COMPARED = tuple(METRICS)[:4]


class ServerStallsError(SlebError):
    """A server that answers no more; what was measured before it is kept."""


@dataclass(frozen=True)
class ServeProgress:
    """What is under way; num_requests: of it, None where time ends it; load: None before it begins."""

    what: str
    num_requests: int | None = None
    load: LoadProgress | None = None


OnProgress = Callable[[ServeProgress], None]


@dataclass
class Target:
    """A server, what it is asked and how. numbers: of the prompts still to be sent."""

    options: ServeLoadOptions
    server: Server
    dialects: Mapping[str, Dialect]
    sources: Mapping[str, PromptSource]
    facts: Mapping[str, Any]
    on_progress: OnProgress = lambda progress: None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def models(self) -> list[str]:
        """Ids, in the order in which requests take turns."""
        return list(self.dialects)

    def requests(self) -> Iterator[LoadRequest]:
        """Requests without end, to one model after the other; no number comes twice."""
        for number in self.numbers:
            model = self.models[number % len(self.models)]
            dialect, prompt = self.dialects[model], self.sources[model].make(number)
            body = dialect.body(prompt.content, prompt.output_tokens)
            yield LoadRequest(dialect.path, model, body, prompt.num_tokens, prompt.output_tokens)

    async def warm_up(self, level: Level, what: str) -> LoadResult:
        """Sends requests that nobody counts. Raises ServerStallsError, which names it `what`."""
        num_requests = len(self.models) if self.options.warmup is None else self.options.warmup
        if not num_requests:
            return LoadResult([], 0.0)
        requests = list(itertools.islice(self.requests(), num_requests))
        load, at_once = Load(self.server.client), min(level.bound or num_requests, num_requests)
        result = await load.closed(requests, at_once, self._teller(what, num_requests))
        self.check_alive(what, result)
        return result

    async def run(self, level: Level, what: str, seed: str) -> LoadResult:
        """Loads the server. Requests whose number is known are made before the clock runs. seed: of the arrivals."""
        num_requests = self.options.requests_of(level)
        requests = self.requests()
        if num_requests is not None:
            requests = iter(list(itertools.islice(requests, num_requests)))
        load, tell = Load(self.server.client, self.options.duration), self._teller(what, num_requests)
        if level.concurrency is not None:
            return await load.closed(requests, level.concurrency, tell)
        return await load.open(requests, arrival_times(level.rate, seed), level.max_concurrency, tell)

    def check_alive(self, what: str, result: LoadResult) -> None:
        """Raises ServerStallsError for a load that was left without answers: the next ones would only wait too."""
        if result.interrupted:
            return
        num_timeouts = sum(outcome.timed_out for outcome in result.outcomes)
        nothing_came = num_timeouts > 0 and all(outcome.error for outcome in result.outcomes)
        if result.has_stalled or nothing_came:
            raise ServerStallsError(
                f"{what}: {num_timeouts} of {len(result.outcomes)} requests had no whole answer within "
                f"{self.options.timeout:g} s, so the load ended here; the server's log may say why, or give a longer "
                "--timeout"
            )

    def _teller(self, what: str, num_requests: int | None) -> Callable[[LoadProgress], None]:
        self.on_progress(ServeProgress(what, num_requests))
        return lambda load: self.on_progress(ServeProgress(what, num_requests, load))


async def prepare(options: ServeLoadOptions, side: int = 0) -> Target:
    """Asks a server what must be known of it. Raises ClientError and ConfigError. side: of a comparison."""
    asked = options.model
    if options.compare is not None and len(asked) == 2:
        asked = asked[side : side + 1]
    server = Server(LoadClient(options.urls[side], options.key, options.timeout), options.key)
    dialects: dict[str, Dialect] = {}
    sources: dict[str, PromptSource] = {}
    salt = secrets.token_hex(8)
    for model in await server.choose_models(asked):
        dialects[model] = await server.negotiate(options.endpoint, model, {})
        sources[model] = await _source(options, server, dialects[model], salt)
    return Target(options, server, dialects, sources, await server.describe())


async def _source(options: ServeLoadOptions, server: Server, dialect: Dialect, salt: str) -> PromptSource:
    if options.dataset is not None:
        return DatasetPrompts(options.dataset, options.endpoint, options.output_tokens)
    vocabulary = await calibrate(partial(server.count_tokens, dialect))
    if vocabulary is None:
        server.notices.append(f"{dialect.model}: the server counts no tokens; a word is taken for one.")
    source = RandomPrompts(options.lengths, vocabulary or UNCOUNTED, options.seed, salt)
    content = source.make(-1).content  # a number that no load sends
    assert isinstance(content, str)
    await server.count_tokens(dialect, content)  # a context that is too short is told now
    return source


def describe_client(options: ServeLoadOptions, command: Sequence[str]) -> dict[str, Any]:
    """The machine that sends the load, which may be another than the server's; what only a server has is null."""
    import torch

    from sleb.benchmarks.environment import describe_machine

    shown = public_command(command, options.key, options.model)
    machine = describe_machine(torch.device("cpu"), torch.float32, "", shown)
    return machine | dict.fromkeys(("device", "dtype", "kernels", "threads", "cuda", "triton"))


def run_serve(
    options: ServeLoadOptions,
    environment: Mapping[str, Any],
    on_progress: OnProgress = lambda progress: None,
    on_level: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Asks what must be known, loads the server level by level, or two in turns. Raises SlebError.

    Ctrl-C keeps what is complete, as does a server that answers no more, which `settings["problem"]` then tells.
    on_level: gets the result so far, after each level; of a comparison after each turn.
    """
    options.check()
    if options.vllm_json is not None:
        with _writing(options.vllm_json):
            options.vllm_json.mkdir(parents=True, exist_ok=True)
    result = Result("serve", dict(environment), options.settings())
    on_progress(ServeProgress("asking the server"))
    sides = range(len(options.urls))
    with _load_loop() as runner:
        targets = [runner.run(prepare(options, side)) for side in sides]
        for target in targets:
            target.on_progress = on_progress
        told = [dict(target.facts) | {"models": target.models} for target in targets]
        result.settings["servers"] = dict(zip("AB", told, strict=False)) if options.compare else told[0]
        try:
            if options.compare is None:
                result.notes += targets[0].server.notices
                _sweep(targets[0], runner, result, on_level)
            else:
                notes = [
                    f"{name}: {each}"
                    for name, target in zip("AB", targets, strict=True)
                    for each in target.server.notices
                ]
                _compare(options, targets, runner, result, on_level)
                result.notes[:0] = notes
        except ServerStallsError as error:
            result.complete = False
            result.settings["problem"] = without_key(str(error), options.key)
        finally:
            for target in targets:
                target.server.client.close()
    # A server may repeat the key, so it is looked for in all that is said.
    result.notes = list(dict.fromkeys(without_key(each, options.key) for each in result.notes))
    return result


def _sweep(
    target: Target, runner: asyncio.Runner, result: Result, on_level: Callable[[Result], None]
) -> None:
    options = target.options
    for number, level in enumerate(options.levels):
        done = runner.run(target.warm_up(level, f"{level}: warming up"))
        if not done.interrupted:
            done = runner.run(target.run(level, str(level), f"{options.seed} {number}"))
            if done.outcomes:
                row = measure(done.outcomes, done.duration, options.limits)
                result.measurements += _measurements(target, level, done, row)
                result.notes += level_notes(options, level, done)
                if options.vllm_json is not None:
                    write_vllm_file(options.vllm_json, target, level, done, row)
                on_level(result)
            elif not done.interrupted and options.duration is not None:
                result.notes.append(
                    f"{level}: no request came due in {options.duration:g} s; give a longer --duration or a higher "
                    "--rate"
                )
        if done.interrupted:
            result.complete = False
            return
        target.check_alive(str(level), done)


def _measurements(
    target: Target, level: Level, done: LoadResult, row: Mapping[str, Any]
) -> Iterator[Measurement]:
    """All metrics of a level, and of each of several models its part."""
    options = target.options
    facts = {
        "level": str(level),
        "concurrency": level.concurrency,
        "requests_per_second": None if level.concurrency or math.isinf(level.rate) else level.rate,
    }
    of_load = {
        "failures": failures(done.outcomes),
        "cached_tokens": sum(outcome.num_cached_tokens for outcome in done.outcomes),
        "client_cpu_share": done.cpu_seconds / done.duration,
    }
    parts = [(options.shown_label or ",".join(target.models), row, of_load)]
    for model in target.models if len(target.models) > 1 else ():
        own = [outcome for outcome in done.outcomes if outcome.model == model]
        parts.append((model, measure(own, done.duration, options.limits), {}))
    counts = ("completed", "failed", "duration", "total_input_tokens", "total_output_tokens")
    for subject, figures, more in parts:
        told = {
            name: figures[name] for name in (*counts, "total_token_throughput", "max_concurrent_requests")
        }
        for metric, name in METRICS.items():
            if figures[name] is not None:
                on_first = told | more if metric == "tokens/s" else {}
                yield Measurement(options.case(level), subject, metric, figures[name], facts=facts | on_first)


def _compare(
    options: ServeLoadOptions,
    targets: Sequence[Target],
    runner: asyncio.Runner,
    result: Result,
    on_turn: Callable[[Result], None],
) -> None:
    """Measures both servers in turns. Raises ServerStallsError, what is complete kept in `result`."""
    seen: dict[tuple[int, int], list[LoadResult]] = {}
    stalled: list[ServerStallsError] = []

    def run(level: int, side: int, turn: int) -> Sample:
        target, which = targets[side], options.levels[level]
        what = f"{which}: {'AB'[side]}, turn {turn}" if turn else f"{which}: warming up {'AB'[side]}"
        try:
            if turn:  # both sides meet the same arrivals
                done = runner.run(target.run(which, what, f"{options.seed} {which} {turn}"))
                target.check_alive(what, done)
            else:
                done = runner.run(target.warm_up(which, what))
        except ServerStallsError as error:
            stalled.append(error)
        if stalled or done.interrupted:
            raise KeyboardInterrupt  # keeps complete turns
        if not turn:
            return {}
        seen.setdefault((level, side), []).append(done)
        figures = measure(done.outcomes, done.duration)
        return {metric: figures[METRICS[metric]] for metric in _COMPARED if figures[METRICS[metric]]}

    cases = []
    for number, level in enumerate(options.levels):
        runs = {name: partial(run, number, side) for side, name in enumerate("AB")}
        cases.append(Case(options.case(level), runs, baseline="A"))
    rounds = options.rounds or 6
    once = TurnOptions(repetitions=rounds, max_repetitions=rounds, seed=options.seed)

    def keep(turns: Turns, case: Case) -> None:
        result.measurements = turns.measurements()
        on_turn(result)

    turns = measure_in_turns(cases, once, on_turn=keep)
    result.measurements, result.complete = turns.measurements(), turns.complete
    for (number, side), loads in seen.items():
        outcomes = [outcome for load in loads for outcome in load.outcomes]
        cpu, seconds = (sum(getattr(load, name) for load in loads) for name in ("cpu_seconds", "duration"))
        whole = LoadResult(outcomes, seconds, cpu)
        result.notes += [
            f"{'AB'[side]}, {note}" for note in level_notes(options, options.levels[number], whole)
        ]
    if stalled:
        raise stalled[0]


def level_notes(options: ServeLoadOptions, level: Level, done: LoadResult) -> list[str]:
    """What a reader must know of one level."""
    outcomes, notes = done.outcomes, []
    for reason, number in failures(outcomes).items():
        notes.append(f"{number} of {len(outcomes)} requests failed: {reason}.")
    whole = [outcome for outcome in outcomes if not outcome.error]
    long = sum(0 < outcome.asked_tokens != outcome.num_prompt_tokens for outcome in whole)
    if long:
        notes.append(f"{long} of {len(whole)} prompts had not the length that was asked for.")
    short = sum(outcome.num_output_tokens != outcome.asked_output for outcome in whole)
    if short and all(outcome.usage for outcome in whole):
        notes.append(f"{short} of {len(whole)} answers had not the length that was asked for.")
    cached = sum(outcome.num_cached_tokens for outcome in outcomes)
    if cached:
        share = cached / max(1, sum(outcome.num_prompt_tokens for outcome in outcomes))
        notes.append(f"{share:.0%} of the prompts' tokens were in the server's prefix cache.")
    busy = done.cpu_seconds / done.duration
    if busy > _BUSY_CLIENT:
        notes.append(f"the client took {busy:.0%} of a processor; it may be what limits.")
    if done.num_unsent:
        notes.append(
            f"{done.num_unsent} requests were not sent, as --max-concurrency were open until --duration was over."
        )
    waits = sum(max(0.0, outcome.start - outcome.due) for outcome in outcomes)
    if not math.isinf(level.rate) and waits > _LONG_QUEUE * sum(outcome.seconds for outcome in whole):
        late = f"{waits / len(outcomes):.2g} s"
        if level.max_concurrency is None:
            why = f"were sent {late} late, as the client itself could not keep up"
        else:
            why = f"waited {late} for their turn, as --max-concurrency were open"
        notes.append(f"requests {why}; no latency includes it.")
    return [f"{level}: {note}" for note in notes]


def write_vllm_file(
    folder: Path, target: Target, level: Level, done: LoadResult, row: Mapping[str, Any]
) -> None:
    """A file named and made as by `vllm bench serve --save-result --save-detailed`. Raises ConfigError."""
    options, date = target.options, datetime.now().strftime("%Y%m%d-%H%M%S")
    rate = "inf" if math.isinf(level.rate) else level.rate
    backend, model = _BACKENDS[options.endpoint], ",".join(target.models)
    content = {
        "date": date,
        "endpoint_type": backend,
        "backend": backend,
        "label": options.shown_label,
        "model_id": model,
        "tokenizer_id": None,
        "num_prompts": len(done.outcomes),
        "request_rate": rate,
        "burstiness": 1.0,  # Poisson's
        "max_concurrency": level.bound,
        **row,
        **raw_samples(done.outcomes),
    }
    bound = f"-concurrency{level.bound}" if level.bound else ""
    name = f"{options.shown_label or backend}-{rate}qps{bound}-{model.split('/')[-1]}-{date}.json"
    with _writing(folder):
        (folder / re.sub(r"[^\w.,-]", "_", name)).write_bytes(orjson.dumps(content))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--vllm-json {folder} cannot be written ({error.strerror}); name another folder"
        ) from None


@contextmanager
def _load_loop() -> Iterator[asyncio.Runner]:
    """An event loop for load. Collections of garbage look at what the load leaves, not at every imported module."""
    gc.collect()
    gc.freeze()
    try:
        with asyncio.Runner() as runner:
            yield runner
    finally:
        gc.unfreeze()
