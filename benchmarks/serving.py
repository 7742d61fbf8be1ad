"""`sleb bench serve`: load on any OpenAI-compatible server, one level after the other."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sleb.benchmarks.environment import describe_machine, shown_command
from sleb.benchmarks.load.load import LoadProgress
from sleb.benchmarks.serving_options import ServeOptions, shown_url
from sleb.benchmarks.serving_rows import Row, make_row, nothing_due, row_notices
from sleb.benchmarks.serving_target import (
    ServerStallsError,
    Target,
    check_alive,
    num_warmups,
    prepare,
    run_level,
    warm_up,
)
from sleb.client.connection import base_url
from sleb.errors import ConfigError

# Facts of `describe_machine` that are this process's, not the server's.
_OWN_FACTS = ("device", "dtype", "kernels", "threads", "cuda", "triton")


@dataclass(frozen=True)
class ServeProgress:
    """What is under way; num_requests: of it, None where time ends it; load: None before it begins."""

    what: str
    num_requests: int | None = None
    load: LoadProgress | None = None


OnProgress = Callable[[ServeProgress], None]


def run_serving(
    options: ServeOptions,
    command: Sequence[str] = (),
    on_progress: OnProgress = lambda progress: None,
) -> dict[str, Any]:
    """Asks what must be known, loads the server level by level, and gives the result. Raises SlebError.

    Ctrl-C ends the level under way, whose complete answers are reported; a server that answers no more ends the sweep,
    and "problem" in the result says so. command: as it was typed, program first.
    """
    environment = describe_client(options, command)
    on_progress(ServeProgress("asking the server"))
    target = prepare(options)
    rows: list[Row] = []
    ending = run_load(_sweep(target, rows, on_progress), target.notices)
    return {
        "kind": "serve",
        "environment": environment,
        "model": {"name": ",".join(target.models), "models": target.models},
        "server": target.facts,
        "settings": options.settings(),
        "rows": rows,
        "conditions": conditions(options, target.notices),
        **ending,
    }


def run_load(load: Coroutine[Any, Any, bool], notices: list[str]) -> dict[str, Any]:
    """Runs what gives whether it was whole. "problem", a notice too: why a server that answers no more ended it."""
    with load_loop() as runner:
        try:
            return {"complete": runner.run(load)}
        except ServerStallsError as error:
            notices.append(f"{error}.")
            return {"complete": False, "problem": str(error)}


def conditions(options: ServeOptions, notices: Sequence[str]) -> dict[str, Any]:
    """What a reader must know. A server may repeat the key, so it is looked for in all that is said."""
    shown = dict.fromkeys(map(options.without_key, notices))
    return {"notices": list(shown), "others_share": None, "clock": None}


async def _sweep(target: Target, rows: list[Row], on_progress: OnProgress) -> bool:
    """Adds a row a level; whether all were whole. Raises ServerStallsError."""
    options = target.options
    try:
        for number, level in enumerate(options.levels):
            what, warmups = f"{level}: warming up", num_warmups(options, target.models)
            if await warm_up(target, level, warmups, what, teller(on_progress, what, warmups)):
                return False
            tell = teller(on_progress, str(level), options.requests_of(level))
            result = await run_level(target, level, f"{options.seed} {number}", tell)
            if result.outcomes:
                row = make_row(
                    target, level, result.outcomes, result.duration, result.cpu_seconds, options.label
                )
                rows.append(row)
                target.notices += row_notices(row, result.outcomes, result.num_unsent)
            elif not result.interrupted and options.duration is not None:
                target.notices.append(f"{level}: {nothing_due(options.duration)}.")
            if result.interrupted:
                return False
            check_alive(target, str(level), result)
    finally:
        target.client.close()
    return True


def teller(on_progress: OnProgress, what: str, num_requests: int | None) -> Callable[[LoadProgress], None]:
    """Shows `what` at once, and then how its load stands."""
    on_progress(ServeProgress(what, num_requests))
    return lambda load: on_progress(ServeProgress(what, num_requests, load))


@contextmanager
def load_loop() -> Iterator[asyncio.Runner]:
    """An event loop for load. Collections of garbage look at what the load leaves, not at every imported module."""
    gc.collect()
    gc.freeze()
    try:
        with asyncio.Runner() as runner:
            yield runner
    finally:
        gc.unfreeze()


def describe_client(options: ServeOptions, command: Sequence[str]) -> dict[str, Any]:
    """The machine that sends the load, which may be another than the server's; what only a server has is null."""
    machine = describe_machine(torch.device("cpu"), torch.float32, "", _public_command(options, command))
    return machine | dict.fromkeys(_OWN_FACTS)


def _public_command(options: ServeOptions, command: Sequence[str]) -> list[str]:
    """Without paths, keys and names of machines."""
    shown: list[str] = []
    for argument in command:
        # The first "=" ends the option: a key or a path may hold others.
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if shown and shown[-1] == "--api-key":
            option, equals, value = "", "", "…"
        elif option == "--api-key":
            value = "…" if equals else ""
        elif _is_server(value, options):
            value = shown_url(base_url(value))
        elif not any(model in value.split(",") for model in options.models):  # a hub id looks like a path
            value = shown_command([value], "")[0]
        shown.append(options.without_key(option + equals + value))
    return shown


def _is_server(value: str, options: ServeOptions) -> bool:
    try:
        return base_url(value) in options.urls
    except ConfigError:
        return False
