#!/usr/bin/env python3
"""What depth under load and pools by tier do to goodput, simulated from measured costs of steps.

    .venv/bin/python research/fleet_simulation.py costs --model smollm2 --json costs.json
    .venv/bin/python research/fleet_simulation.py day --costs costs.json --json day.json
    .venv/bin/python research/fleet_simulation.py replay --costs costs.json --result serve.json --json replay.json

`costs` measures what steps of an engine take; `day` simulates fleets by them; `replay` repeats the load of a file of
`sleb bench serve --rate`, whose figures stand beside.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from fleet import (
    BUDGET,
    Arrival,
    Costs,
    Fleet,
    Replica,
    day_rate,
    figures,
    least_wait,
    poisson,
    run_fleet,
    simulate,
    traffic,
)

from sleb.benchmarks.environment import describe_machine, shown_command
from sleb.benchmarks.load.load import arrival_times
from sleb.benchmarks.old import load
from sleb.benchmarks.record import Measurement, Result, write_result
from sleb.engine.depth_policy import DepthPolicy
from sleb.engine.llm import LLM
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.terminal import tell

PROMPT, OUTPUT = 128, 64  # median tokens of the simulated day's requests
_PARTS = {"read": "of a step, ms", "row": "of a row, ms", "token": "of a prompt's token, ms"}


def measure_costs(model: str, depths: Sequence[int], seats: int) -> tuple[Costs, float]:
    """Steps of an engine with 1 to `seats` rows and prompts of 16 to 256 tokens, fitted by least squares of the
    relative error; and the median relative error of the fit."""
    engine = LLM(
        model, tiers=list(depths), max_num_seqs=seats, max_model_len=2048, prefix_caching=False
    ).engine
    shares = {depth: engine.weight_bytes(depth) / engine.weight_bytes(depths[0]) for depth in depths}
    rng, rows, seconds = random.Random(0), [], []
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    for turn, depth, count in itertools.product(range(3), depths, (1, 2, 4, 8, 16, seats)):
        for number in range(count):
            prompt = [rng.randrange(100, 40_000) for _ in range(rng.choice((16, 64, 256)))]
            engine.add_request(f"{turn}-{depth}-{count}-{number}", prompt, params, depth)
        while engine.has_unfinished():
            left = engine.work().prompt_tokens.get(depth, 0)
            decoding = sum(each.num_computed >= each.num_prompt_tokens for each in engine.scheduler.running)
            begin = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begin)
            computed = left - engine.work().prompt_tokens.get(depth, 0)
            rows.append([shares[depth] * each for each in (1, decoding, computed)])
    made, taken = np.array(rows), np.array(seconds)
    found, *_ = np.linalg.lstsq(made / taken[:, None], np.ones(len(taken)), rcond=None)
    parts = np.maximum(found, 0.0)
    read, row, token = map(float, parts)
    return Costs(read, row, token, shares), float(np.median(np.abs(made @ parts / taken - 1)))


def costs_result(costs: Costs, error: float, settings: dict[str, Any]) -> Result:
    """As a file."""
    told = [
        Measurement("a step at depth 0", "all depths", name, 1e3 * getattr(costs, part))
        for part, name in _PARTS.items()
    ]
    told += [
        Measurement("share of depth 0", f"depth {depth}", "share", share)
        for depth, share in costs.shares.items()
    ]
    result = _result("step-costs", settings, told)
    result.notes.append(f"Half of the steps are within {error:.0%} of what the fit says.")
    return result


def read_costs(path: Path) -> Costs:
    """What `costs_result` wrote."""
    rows = load(path).measurements
    read, row, token = (
        next(each.value or 0.0 for each in rows if each.metric == name) / 1e3 for name in _PARTS.values()
    )
    shares = {int(each.subject.split()[1]): each.value or 0.0 for each in rows if each.metric == "share"}
    return Costs(read, row, token, shares)


def replay(costs: Costs, result: Result, seats: int, target: float) -> list[Measurement]:
    """Each level of a file of `sleb bench serve --rate`, measured and simulated; the ratio of the two is a fact."""
    told: list[Measurement] = []
    measured = {each.key: each.value for each in result.measurements}
    for each in [each for each in result.measurements if each.metric == "tokens/s"]:
        facts, depth = (
            each.facts,
            int(each.subject.rpartition(":sleb-")[2] if ":sleb-" in each.subject else 0),
        )
        count = facts["completed"] + facts["failed"]
        prompt = round(facts["total_input_tokens"] / max(facts["completed"], 1))
        seed = f"{result.settings['seed']} {facts['level']} 1"
        times = itertools.islice(arrival_times(facts["requests_per_second"], seed), count)
        arrivals = [Arrival(now, prompt, result.settings["output_tokens"], depth) for now in times]
        replica = Replica(costs, seats, BUDGET)
        simulate(arrivals, least_wait([replica]), [replica])
        span = max(each.end or 0.0 for each in arrivals)
        found = figures(arrivals, target, {depth: 1.0}, span)
        found["tokens/s"] = sum(each.output for each in arrivals) / span
        for metric in ("tokens/s", "goodput requests/s", "TTFT p50 ms"):
            own = measured.get((each.case, each.subject, metric))
            if own is not None:
                told.append(Measurement(each.case, f"{each.subject}, measured", metric, own))
                over = {"over_measured": found[metric] / own} if own else {}
                told.append(
                    Measurement(each.case, f"{each.subject}, simulated", metric, found[metric], facts=over)
                )
    return told


def simulate_days(costs: Costs, arguments: argparse.Namespace) -> list[Measurement]:
    """Figures of fleets over days of several seeds: mean, least and greatest."""
    losses = {int(k): float(v) for k, v in (each.split(":") for each in arguments.losses.split(","))}
    depths, count, seats, span = tuple(costs.shares), arguments.replicas, arguments.seats, arguments.seconds
    policy = DepthPolicy(depths, arguments.target, math.inf, hold=span / 72)
    deepest, half = depths[-1], arguments.replicas // 2
    # What the fleet can answer at depth 0: full batches' steps, and the prompts of as many.
    step = costs.seconds({depths[0]: seats}, {})
    capacity = count * seats / (OUTPUT * step + seats * PROMPT * costs.token)
    rate = day_rate(arguments.load * capacity, span)
    fleets = {
        f"all at depth {depths[0]}": Fleet(((depths[:1], count),), depths[:1]),
        f"all at depth {deepest}": Fleet((((deepest,), count),), (deepest,)),
        "auto": Fleet(((None, count),), (None,)),
        "half of each, mixed": Fleet((((depths[0], deepest), count),), (depths[0], deepest)),
        "half of each, in pools": Fleet(
            ((depths[:1], half), ((deepest,), count - half)), (depths[0], deepest)
        ),
    }
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(arguments.seeds):
        rng = random.Random(seed)
        times = list(poisson(rate, 3 * arguments.load * capacity, span, rng))
        requests = traffic(times, PROMPT, OUTPUT, rng)
        for name, fleet in fleets.items():
            arrivals = run_fleet(fleet, costs, requests, policy, seats, seed)
            for metric, value in figures(arrivals, arguments.target, losses, span).items():
                found[name, metric].append(value)
            tell(f"day {seed + 1} of {arguments.seeds}: {name}")
    case = f"{count} replicas, {arguments.load:g} of their capacity at depth {depths[0]}"
    return [
        Measurement(case, name, metric, mean(some), (min(some), max(some)))
        for (name, metric), some in found.items()
    ]


def _result(kind: str, settings: dict[str, Any], measurements: list[Measurement]) -> Result:
    command = shown_command(sys.argv, settings.get("model", ""))
    environment = describe_machine(torch.device("cpu"), torch.bfloat16, "", command)
    shown = {name: value for name, value in settings.items() if not isinstance(value, Path)}
    return Result(kind, environment, shown, measurements)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("costs", "day", "replay"):
        command = commands.add_parser(name)
        command.add_argument("--json", type=Path, required=True)
        command.add_argument("--seats", type=int, default=32, help="requests in a step")
        if name == "costs":
            command.add_argument("--model", default="smollm2")
            command.add_argument("--depths", default="0,3,6")
            continue
        command.add_argument("--costs", type=Path, required=True)
        command.add_argument("--target", type=float, default=0.8, help="seconds to the first token")
        if name == "replay":
            command.add_argument("--result", type=Path, required=True)
            continue
        command.add_argument("--replicas", type=int, default=4)
        command.add_argument("--seconds", type=float, default=1440.0, help="of a simulated day")
        command.add_argument(
            "--load", type=float, default=1.0, help="the evening's peak, as a share of the capacity"
        )
        command.add_argument("--seeds", type=int, default=6, help="days")
        command.add_argument(
            "--losses", default="0:1,3:1.5,6:2.5", help="times depth 0's perplexity, by depth"
        )
    arguments = parser.parse_args()
    settings = vars(arguments)
    if arguments.command == "costs":
        depths = [int(each) for each in arguments.depths.split(",")]
        result = costs_result(*measure_costs(arguments.model, depths, arguments.seats), settings)
    elif arguments.command == "replay":
        costs, measured = read_costs(arguments.costs), load(arguments.result)
        result = _result("replay", settings, replay(costs, measured, arguments.seats, arguments.target))
    else:
        result = _result("fleet-simulation", settings, simulate_days(read_costs(arguments.costs), arguments))
    write_result(arguments.json, result)
    for each in result.measurements:
        tell(f"{each.subject}: {each.metric} {each.value:.4g}")


if __name__ == "__main__":
    main()
