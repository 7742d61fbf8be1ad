"""`sleb bench serve`: load on any OpenAI-compatible server, one level after the other, or on two servers, or of several
models, in turns.

In a turn all get requests of the same lengths at the same times. Random words differ, since both may be one server
with a prefix cache; rows of a dataset are the same. One server is idle while the other is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sleb.benchmarks.load.client import LoadClient, Outcome
from sleb.benchmarks.load.load import Load, LoadResult, Request, arrival_times, failures, measure
from sleb.benchmarks.load.options import Level, ServeLoadOptions
from sleb.benchmarks.load.server import Dialect, Server, public_command
from sleb.benchmarks.prompts import UNCOUNTED, DatasetPrompts, PromptSource, RandomPrompts, calibrate
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.turns import Case, Sample, TurnOptions, Turns
from sleb.benchmarks.turns import measure as measure_in_turns
from sleb.errors import SlebError

# Above this share of one processor the client, a single thread, may be what limits.
_BUSY_CLIENT = 0.7
_COMPARED = ("tokens/s", "requests/s", "TTFT p50 ms", "TPOT p50 ms", "goodput requests/s")
# Requests done, of how many (None: not known), and what is under way.
OnProgress = Callable[[int, int | None, str], None]


class ServerStallsError(SlebError):
    """A server that answers no more; what was measured before it is kept."""


@dataclass
class Target:
    """A server, what it is asked and how, by model. numbers: of the prompts still to be sent."""

    options: ServeLoadOptions
    server: Server
    dialects: Mapping[str, Dialect]
    sources: Mapping[str, PromptSource]
    facts: Mapping[str, Any]
    on_progress: OnProgress
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def requests(self) -> Iterator[Request]:
        """Requests without end, to one model after the other; no number comes twice."""
        models = list(self.dialects)
        for number in self.numbers:
            model = models[number % len(models)]
            dialect, prompt = self.dialects[model], self.sources[model].make(number)
            outcome = Outcome(model, prompt.num_tokens, prompt.output_tokens)
            yield dialect.path, dialect.body(prompt.text, prompt.output_tokens), outcome

    async def run(self, level: Level, what: str, seed: str | None) -> LoadResult:
        """Loads the server. seed: of the arrivals; None: a request a model, as a warm-up."""
        num_requests = self.options.requests_of(level) if seed is not None else len(self.dialects)
        requests = list(itertools.islice(self.requests(), num_requests))
        self.on_progress(0, num_requests, what)
        load = Load(self.server.client)

        def tell(num_done: int, said: str) -> None:
            self.on_progress(num_done, num_requests, f"{what}: {said}")

        if level.concurrency is None and seed is not None:
            return await load.open(requests, arrival_times(level.rate, seed), tell)
        return await load.closed(requests, level.concurrency or 1, tell)


async def prepare(
    options: ServeLoadOptions, url: str, asked: Sequence[str], on_progress: OnProgress
) -> Target:
    """Asks a server what must be known of it. Raises ClientError and ConfigError."""
    server = Server(LoadClient(url, options.key, options.timeout))
    dialects: dict[str, Dialect] = {}
    sources: dict[str, PromptSource] = {}
    salt = secrets.token_hex(8)
    for model in await server.choose_models(asked):
        dialects[model] = dialect = await server.negotiate(options.endpoint, model, {})
        if options.dataset is not None:
            sources[model] = DatasetPrompts(options.dataset, options.output_tokens)
            continue
        vocabulary = await calibrate(partial(server.count_tokens, dialect))
        if vocabulary is None:
            server.notices.append(f"{model}: the server counts no tokens; a word is taken for one.")
        sources[model] = source = RandomPrompts(options.lengths, vocabulary or UNCOUNTED, options.seed, salt)
        # A context that is too short is told now, by a request with a number that no load sends.
        await server.count_tokens(dialect, source.make(-1).text)
    facts = await server.describe() | {"models": list(dialects)}
    return Target(options, server, dialects, sources, facts, on_progress)


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
    on_progress: OnProgress = lambda num_done, num_requests, what: None,
) -> Result:
    """Asks what must be known, loads the server level by level, or two in turns. Raises SlebError.

    Ctrl-C keeps what is complete, as does a server that answers no more, which `settings["problem"]` then tells.
    """
    options.check()
    result = Result("serve", dict(environment), options.settings())
    on_progress(0, None, "asking the server")
    with asyncio.Runner() as runner:
        targets: dict[str, Target] = {}
        for url, models, name in options.sides:
            target = runner.run(prepare(options, url, models, on_progress))
            targets[name or ",".join(target.dialects)] = target
        told = {name: dict(target.facts) for name, target in targets.items()}
        alone = len(targets) == 1
        result.settings["servers"] = next(iter(told.values())) if alone else told
        for name, target in targets.items():
            result.notes += [each if alone else f"{name}: {each}" for each in target.server.notices]
        try:
            _load_in_turns(options, targets, runner, result)
        except ServerStallsError as error:
            result.complete, result.settings["problem"] = False, str(error)
        finally:
            for target in targets.values():
                target.server.client.close()
    return result


def _load_in_turns(
    options: ServeLoadOptions, targets: Mapping[str, Target], runner: asyncio.Runner, result: Result
) -> None:
    """One turn of a server alone, several of two or more sides. Raises ServerStallsError, what is complete kept in
    `result`."""
    alone, baseline = len(targets) == 1, next(iter(targets))
    seen: dict[tuple[Level, str], list[LoadResult]] = defaultdict(list)
    num_turns = 1 if alone else 6  # which are what an interval takes
    of_turns = "" if alone else f" of {num_turns}"

    def run(level: Level, name: str, turn: int) -> Sample:
        target, what = targets[name], f"{level}: " if alone else f"{level}: {name}, "
        what += f"turn {turn}{of_turns}" if turn else "warming up"
        seed = f"{options.seed} {level} {turn}" if turn else None  # both sides meet the same arrivals
        done = runner.run(target.run(level, what, seed))
        if turn and done.outcomes and (alone or not (done.interrupted or done.has_stalled)):
            seen[level, name].append(done)
        if done.has_stalled:
            raise ServerStallsError(
                f"{what}: the last requests of {len(done.outcomes)} had no whole answer within {options.timeout:g} s, "
                "so the load ended here; the server's log may say why, or give a longer --timeout"
            )
        if done.interrupted:
            raise KeyboardInterrupt  # keeps complete turns
        if not turn:
            return {}
        figures = measure(done.outcomes, done.duration, options.limits)
        compared = {name: value for name in _COMPARED if (value := figures.get(name))}
        return compared | (mix(done.outcomes, target.server.losses) if options.in_turns else {})

    def keep(turns: Turns, case: Case) -> None:
        result.measurements = turns.measurements()

    cases = [
        Case(
            options.case(level),
            {name: partial(run, level, name) for name in targets},
            None if alone else baseline,
        )
        for level in options.levels
    ]
    often = TurnOptions(repetitions=num_turns, max_repetitions=num_turns, seed=options.seed)
    try:
        result.complete = measure_in_turns(cases, often, on_turn=keep).complete
    finally:
        if alone:
            result.measurements = []
        for (level, name), loads in seen.items():
            outcomes = [outcome for load in loads for outcome in load.outcomes]
            cpu, seconds = sum(load.cpu_seconds for load in loads), sum(load.duration for load in loads)
            result.notes += level_notes(str(level) if alone else f"{level}: {name}", outcomes, cpu / seconds)
            if alone:
                result.measurements += _measurements(
                    options, level, outcomes, seconds, list(targets[name].dialects)
                )


def mix(outcomes: Sequence[Outcome], losses: Mapping[str, float]) -> dict[str, float]:
    """What was answered, and how well: the share of requests, and the geometric mean of how many times the full model's
    perplexity the depths have that answered, by tokens; without the latter where that of one is not known."""
    whole = [outcome for outcome in outcomes if not outcome.error]
    figures = {"answered %": 100 * len(whole) / len(outcomes)} if outcomes else {}
    num_tokens = sum(outcome.num_output_tokens for outcome in whole)
    if num_tokens and all(outcome.answered_by in losses for outcome in whole):
        total = sum(outcome.num_output_tokens * math.log(losses[outcome.answered_by]) for outcome in whole)
        figures["times depth 0's perplexity"] = math.exp(total / num_tokens)
    return figures


def _measurements(
    options: ServeLoadOptions,
    level: Level,
    outcomes: Sequence[Outcome],
    seconds: float,
    models: Sequence[str],
) -> Iterator[Measurement]:
    """All metrics of a level, and of each of several models its part."""
    rate = None if level.concurrency or math.isinf(level.rate) else level.rate
    facts = {"level": str(level), "concurrency": level.concurrency, "requests_per_second": rate}
    for subject in dict.fromkeys((",".join(models), *models)):
        own = [outcome for outcome in outcomes if subject in (outcome.model, ",".join(models))]
        figures = measure(own, seconds, options.limits)
        whole = [outcome for outcome in own if not outcome.error]
        told = facts | {
            "completed": len(whole),
            "failed": len(own) - len(whole),
            "duration": seconds,
            "total_input_tokens": sum(outcome.num_prompt_tokens for outcome in whole),
            "total_output_tokens": sum(outcome.num_output_tokens for outcome in whole),
            "failures": failures(own),
            "cached_tokens": sum(outcome.num_cached_tokens for outcome in own),
        }
        for metric, value in figures.items():
            if value is not None:
                beside = told if metric == "tokens/s" else facts
                yield Measurement(options.case(level), subject, metric, value, facts=beside)


def level_notes(what: str, outcomes: Sequence[Outcome], busy: float) -> list[str]:
    """What a reader must know of the load `what`. busy: the share of a processor that the client took."""
    notes = [
        f"{number} of {len(outcomes)} requests failed: {why}." for why, number in failures(outcomes).items()
    ]
    whole = [outcome for outcome in outcomes if not outcome.error]
    long = sum(0 < each.asked_tokens != each.num_prompt_tokens for each in whole)
    short = sum(bool(each.usage) and each.num_output_tokens != each.asked_output for each in whole)
    if long or short:
        notes.append(
            f"{long} prompts and {short} answers of {len(whole)} had not the length that was asked for."
        )
    if cached := sum(outcome.num_cached_tokens for outcome in outcomes):
        share = cached / max(1, sum(outcome.num_prompt_tokens for outcome in outcomes))
        notes.append(f"{share:.0%} of the prompts' tokens were in the server's prefix cache.")
    if busy > _BUSY_CLIENT:
        notes.append(f"the client took {busy:.0%} of a processor; it may be what limits.")
    return [f"{what}: {note}" for note in notes]
