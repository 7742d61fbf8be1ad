"""What `sleb bench throughput` refuses before it loads a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from sleb.benchmarks.harness import MOST_REPETITIONS
from sleb.benchmarks.workloads import (
    TESTS,
    ThroughputOptions,
    Workload,
    as_numbers,
    steps_apart,
    wanted_tests,
)
from sleb.errors import ConfigError


def parse_share(option: str, text: str) -> float:
    """A share between 0 and 1 that is written "1%" or "0.01". Raises ConfigError naming `option`."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ConfigError(f"{option} is '{text}'; it must be a share between 0 and 1, as 1% or 0.01")
    return share


def check_options(options: ThroughputOptions) -> None:
    """Raises ConfigError for the first option that is out of its range or contradicts another."""
    _check_model(options)
    unknown = [test for test in options.tests if test not in TESTS]
    if unknown or not options.tests:
        named = f"test '{unknown[0]}' is not known" if unknown else "no test is named"
        raise ConfigError(f"{named}; choose from: {', '.join(TESTS)}")
    for name, values, least in _lists(options):
        _check_list(name, values, least)
    if options.contexts is not None and {0, 1} <= set(options.contexts):
        raise ConfigError("--context has 0 and 1, and 0 stands for a context of 1 token; leave one out")
    _check_stopping(options)


def _check_model(options: ThroughputOptions) -> None:
    if bool(options.model) == (options.config is not None):
        raise ConfigError(
            f"MODEL is '{options.model}' and --config '{options.config or ''}'; give one of them: a model with its "
            "weights, or a shape to fill with random ones"
        )
    if options.config is not None and options.load_format not in ("auto", "dummy"):
        raise ConfigError(
            f"--load-format is '{options.load_format}', but --config has no weights to read; leave it out"
        )


def _lists(options: ThroughputOptions) -> Iterator[tuple[str, Sequence[int], int]]:
    """The lists of numbers that are given: what an entry is called, the entries, and the least that one may be."""
    yield "batch", options.batches, 1
    if options.depths is not None:
        yield "depth", options.depths, 0
    if options.prompt_tokens is not None:
        yield "--prompt-tokens", as_numbers(options.prompt_tokens), 1
    if {"generate", "decode"} & set(wanted_tests(options)):
        # The first new token comes with the prompt: decoding begins with the second.
        yield "--output-tokens", as_numbers(options.output_tokens), 2
    if options.contexts is not None:
        yield "--context", options.contexts, 0


def _check_list(name: str, values: Sequence[int], least: int) -> None:
    if not values and name != "depth":  # whose own check knows what to name
        raise ConfigError(
            f"no {name.removeprefix('--')} is named; give at least one number, {max(1, least)} say"
        )
    for value in values:
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be an integer of at least {least}")
        if values.count(value) > 1:
            raise ConfigError(f"{name} {value} is named twice; name each once")


def check_overlap(workloads: Iterable[Workload], step_tokens: int) -> None:
    """Raises ConfigError for a "decode" in which no step decodes all requests, see `throughput.decode_seconds`."""
    for workload in workloads:
        if workload.test != "decode":
            continue
        least = steps_apart(workload, step_tokens) + 2
        if workload.output_tokens < least:
            raise ConfigError(
                f"--output-tokens is {workload.output_tokens}, too few for a decode of {workload.batch} requests after "
                f"{workload.prompt_tokens} tokens: the first answer would be done before the last prompt is; give at "
                f"least {least}, or fewer requests in --batches"
            )


def _check_stopping(options: ThroughputOptions) -> None:
    if not 1 <= options.repetitions <= MOST_REPETITIONS:
        raise ConfigError(
            f"--repetitions is {options.repetitions}; it must be an integer from 1 to {MOST_REPETITIONS:,}"
        )
    if not options.repetitions <= options.most_repetitions <= MOST_REPETITIONS:
        raise ConfigError(
            f"--max-repetitions is {options.most_repetitions}; it must be at least --repetitions, "
            f"{options.repetitions}, and at most {MOST_REPETITIONS:,}"
        )
    if not 0 < options.interval < 1:
        raise ConfigError(f"--interval is {options.interval}; it must be a share between 0 and 1, as 1%")
    if not 0 <= options.time_budget < math.inf:
        raise ConfigError(f"--time-budget is {options.time_budget}; it must be seconds, or 0 for no limit")
    if options.fail_below is not None and not 0 < options.fail_below < math.inf:
        raise ConfigError(f"--fail-below is {options.fail_below}; it must be a speedup above 0, as 1.15")
