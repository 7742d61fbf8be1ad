"""The simulation of a fleet, against queueing theory, a case by hand and what must not be lost."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest

from sleb.engine.depth_policy import DepthPolicy

sys.path.append(str(Path(__file__).resolve().parents[2] / "research"))

from fleet import Arrival, Costs, Fleet, Replica, day_rate, figures, poisson, run_fleet, simulate, traffic

COSTS = Costs(0.02, 0.0005, 0.0006, {0: 1.0, 3: 0.9, 6: 0.8})
POLICY = DepthPolicy((0, 3, 6), 0.8, math.inf, hold=20.0)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_one_seat_waits_as_m_d_1_does(load):
    """Poisson arrivals, one server, the same service for all: the mean wait is load × service / (2 (1 − load))."""
    costs, rng = Costs(0.5, 0.0, 0.05, {0: 1.0}), random.Random(3)
    service = 0.5 + 0.05 * 10
    times = list(poisson(lambda now: load / service, load / service, 60_000 * service, rng))
    arrivals = [Arrival(now, 10, 1, 0) for now in times]
    replica = Replica(costs, 1, 1000)
    simulate(arrivals, lambda each: replica, [replica])
    waits = [each.first - each.time - service for each in arrivals]
    assert sum(waits) / len(waits) == pytest.approx(load * service / (2 * (1 - load)), rel=0.1)


def test_a_case_by_hand():
    costs = Costs(1.0, 0.1, 0.01, {0: 1.0, 1: 0.5})
    first, second = Arrival(0.0, 10, 3, 0), Arrival(0.5, 10, 2, 1)
    replica = Replica(costs, 4, 512)
    simulate([first, second], lambda each: replica, [replica])
    assert first.first == pytest.approx(1.1)  # 1 + 10 × 0.01
    assert second.first == pytest.approx(1.1 + 1.0 + 0.1 + 0.05)  # beside a row at depth 0
    assert first.end == second.end == pytest.approx(2.25 + 1.0 + 0.1 + 0.05)


def test_a_long_prompt_takes_several_steps():
    costs = Costs(1.0, 0.0, 0.01, {0: 1.0})
    each, replica = Arrival(0.0, 250, 1, 0), Replica(costs, 4, 100)
    simulate([each], lambda each: replica, [replica])
    assert each.first == pytest.approx(3 * 1.0 + 2.5)


@pytest.mark.parametrize(
    "fleet",
    [
        Fleet((((0,), 2),), (0,)),
        Fleet(((None, 2),), (None,)),
        Fleet((((0, 6), 2),), (0, 6)),
        Fleet((((0,), 1), ((6,), 1)), (0, 6)),
    ],
)
def test_every_request_ends_once(fleet):
    rng = random.Random(1)
    times = list(poisson(day_rate(20.0, 60.0), 60.0, 60.0, rng))
    arrivals = run_fleet(fleet, COSTS, traffic(times, 128, 32, rng), POLICY, 8, 1)
    assert len(arrivals) == len(times) > 100
    for each in arrivals:
        if each.refused:
            assert each.first is each.end is None
        else:
            assert each.left == 0 and each.made == each.output
            assert each.time <= each.begun <= each.first <= each.end
            assert each.depth in (0, 3, 6)


def test_a_policy_answers_more_in_time_than_either_depth_when_much_comes():
    rng = random.Random(2)
    times = list(poisson(lambda now: 25.0 if 30 < now < 60 else 4.0, 25.0, 120.0, rng))
    load = traffic(times, 128, 32, rng)
    fleets = {
        depth: Fleet((((depth,) if depth is not None else None, 1),), (depth,)) for depth in (0, 6, None)
    }
    found = {
        depth: figures(run_fleet(fleet, COSTS, load, POLICY, 16, 1), 0.8, {0: 1.0, 3: 1.5, 6: 2.5}, 120.0)
        for depth, fleet in fleets.items()
    }
    goodput = {depth: each["goodput requests/s"] for depth, each in found.items()}
    assert goodput[None] > goodput[6] > goodput[0]
    quality = {depth: each["times depth 0's perplexity"] for depth, each in found.items()}
    assert quality[0] == 1.0 < quality[None] < quality[6] == pytest.approx(2.5)


def test_a_quiet_fleet_stays_at_the_first_depth():
    load = traffic([float(now) for now in range(0, 200, 4)], 64, 16, random.Random(0))
    arrivals = run_fleet(Fleet(((None, 1),), (None,)), COSTS, load, POLICY, 16, 1)
    assert {each.depth for each in arrivals} == {0}
