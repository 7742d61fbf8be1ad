"""Replicas of one model under a load, on paper: the model of `research/fleet_simulation.py`.

A step costs what its fullest row's weights take to read, and more for every row and every token of a prompt, each at
its depth's share. Seats, queue, the budget of tokens and the policy of depths are the engine's own
(`sleb.engine.depth_policy`, `sleb.engine.pace`). Left out: pages, prefix caches, failures, the network.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sleb.engine.depth_policy import DepthGovernor, DepthPolicy
from sleb.engine.pace import Pace, Work

BUDGET = 512  # tokens of prompts in a step


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: read + row × rows + token × tokens of prompts, of depth 0; a depth takes its share of each."""

    read: float
    row: float
    token: float
    shares: Mapping[int, float]

    def seconds(self, rows: Mapping[int, int], prompts: Mapping[int, int]) -> float:
        """Of a step with decoding rows and tokens of prompts by depth: all of it reads what its fullest row needs."""
        fullest = min(itertools.chain(rows, prompts))
        work = sum(self.row * self.shares[depth] * count for depth, count in rows.items())
        work += sum(self.token * self.shares[depth] * count for depth, count in prompts.items())
        return self.read * self.shares[fullest] + work


@dataclass
class Arrival:
    """A request, and what became of it. depth: None leaves it to the replica. Times in seconds."""

    time: float
    prompt: int
    output: int
    depth: int | None
    left: int = 0  # tokens of the prompt that are not computed
    made: int = 0
    begun: float | None = None
    first: float | None = None
    end: float | None = None
    refused: bool = False


@dataclass
class Replica:
    """An engine: seats, a queue, a budget of prompt tokens for each step, and maybe a policy.

    now: up to where it has been simulated.
    """

    costs: Costs
    seats: int
    budget: int
    policy: DepthPolicy | None = None
    now: float = 0.0
    running: list[Arrival] = field(default_factory=list)
    waiting: deque[Arrival] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.pace = Pace(self.costs.shares, self.budget, self.seats)
        depths = tuple(self.costs.shares) if self.policy is None else self.policy.depths
        self.governor = None if self.policy is None else DepthGovernor(self.policy, depths, 0.0)

    def work(self) -> Work:
        """What stands before a new request."""
        prompts: Counter[int] = Counter()
        for each in itertools.chain(self.running, self.waiting):
            prompts[each.depth or 0] += each.left
        return Work(+prompts, len(self.waiting), self.seats - len(self.running))

    def wait(self, prompt: int, depth: int) -> float:
        """Predicted seconds to the first token of a new request."""
        work = self.work()
        return self.pace.wait(work, prompt, depth) if work.is_any else 0.0

    def admit(self, each: Arrival) -> None:
        """Takes or refuses a request that comes now."""
        if each.depth is None:
            assert self.governor is not None
            work = self.work()
            ahead = self.pace.wait(work, 0, self.governor.depth) if work.is_any else 0.0
            choice = self.governor.choose(
                each.time, ahead, lambda depth: self.pace.wait(work, each.prompt, depth)
            )
            if choice is None:
                each.refused = True
                return
            each.depth = choice.depth
        each.left = each.prompt
        self.waiting.append(each)

    def run(self, until: float) -> None:
        """Steps that begin before `until`; idle, it waits for it."""
        while self.now < until and (self.running or self.waiting):
            self._step()
        if until < math.inf:
            self.now = max(self.now, until)

    def _step(self) -> None:
        while self.waiting and len(self.running) < self.seats:
            begun = self.waiting.popleft()
            begun.begun = self.now
            self.running.append(begun)
        rows: Counter[int] = Counter()
        prompts: Counter[int] = Counter()
        room, moves = self.budget, []
        for each in self.running:
            assert each.depth is not None
            if each.left:
                count = min(each.left, room)
                room -= count
                if count:
                    prompts[each.depth] += count
                    moves.append((each, count))
            else:
                rows[each.depth] += 1
                moves.append((each, 0))
        seconds = self.costs.seconds(rows, prompts)
        self.now += seconds
        self.pace.observe_step(seconds, min(itertools.chain(rows, prompts)), prompts)
        for each, count in moves:
            each.left -= count
            if not each.left:
                self._token(each)

    def _token(self, each: Arrival) -> None:
        each.made += 1
        if each.first is None:
            each.first = self.now
        if each.made >= each.output:
            each.end = self.now
            self.running.remove(each)
            assert each.begun is not None
            self.pace.observe_seat(self.now - each.begun)


def simulate(
    arrivals: Sequence[Arrival], route: Callable[[Arrival], Replica], replicas: Sequence[Replica]
) -> None:
    """Every arrival, in the order of their times, to the replica that `route` chooses, and on until all have ended."""
    for each in arrivals:
        for replica in replicas:
            replica.run(each.time)
        route(each).admit(each)
    for replica in replicas:
        replica.run(math.inf)


def least_wait(replicas: Sequence[Replica]) -> Callable[[Arrival], Replica]:
    """A router that knows the predicted wait at each replica; of equals the first."""
    return lambda each: min(replicas, key=lambda replica: replica.wait(each.prompt, each.depth or 0))


def figures(
    arrivals: Sequence[Arrival], target: float, losses: Mapping[int, float], span: float
) -> dict[str, float]:
    """goodput: answers a second whose first token came in time. losses: times depth 0's perplexity, by depth."""
    done = [each for each in arrivals if not each.refused]
    waits = sorted((each.first or math.inf) - each.time for each in done)
    tokens = sum(each.output for each in done)
    quality = sum(each.output * math.log(losses[each.depth or 0]) for each in done) / max(tokens, 1)
    return {
        "goodput requests/s": sum(wait <= target for wait in waits) / span,
        "TTFT p50 ms": 1e3 * waits[len(waits) // 2],
        "TTFT p95 ms": 1e3 * waits[int(len(waits) * 0.95)],
        "answered %": 100 * len(done) / len(arrivals),
        "times depth 0's perplexity": math.exp(quality),
    }


def poisson(rate: Callable[[float], float], most: float, span: float, rng: random.Random) -> Iterator[float]:
    """Times of a process whose rate varies, by thinning (Lewis and Shedler 1979). most: no rate is above it."""
    now = 0.0
    while (now := now + rng.expovariate(most)) < span:
        if rng.random() * most < rate(now):
            yield now


def day_rate(base: float, span: float) -> Callable[[float], float]:
    """Requests a second over a day of `span` seconds: quiet at night, two peaks, and three bursts of four minutes of 24
    hours that are twice as high."""

    def rate(now: float) -> float:
        hour = 24 * now / span
        shape = (
            0.35 + 0.45 * math.exp(-(((hour - 11) / 3) ** 2)) + 0.55 * math.exp(-(((hour - 20) / 2.5) ** 2))
        )
        burst = any(0 <= hour - start < 0.4 for start in (9.5, 14.0, 20.2))
        return base * shape * (2.0 if burst else 1.0)

    return rate


def traffic(
    times: Sequence[float], prompt: int, output: int, rng: random.Random
) -> list[tuple[float, int, int]]:
    """Log-normal lengths with these medians; logs of chats have such tails (BurstGPT, arXiv 2401.17644)."""

    def length(median: int, sigma: float) -> int:
        return max(1, min(round(median * math.exp(rng.gauss(0, sigma))), 8 * median))

    return [(now, length(prompt, 0.7), length(output, 0.6)) for now in times]


@dataclass(frozen=True)
class Fleet:
    """Pools of replicas, and what requests ask for.

    Attributes:
        pools: the depths that a pool serves, or None for the policy, and how many replicas it has.
        asked: depths that requests ask for, each as often; None leaves it to the replica.
    """

    pools: tuple[tuple[tuple[int, ...] | None, int], ...]
    asked: tuple[int | None, ...]


def run_fleet(
    fleet: Fleet,
    costs: Costs,
    load: Sequence[tuple[float, int, int]],
    policy: DepthPolicy,
    seats: int,
    seed: int,
) -> list[Arrival]:
    """What becomes of a load of times, prompt lengths and answer lengths."""
    rng, replicas = random.Random(seed), list[Replica]()
    routes: dict[int | None, Callable[[Arrival], Replica]] = {}
    for depths, count in fleet.pools:
        pool = [Replica(costs, seats, BUDGET, policy if depths is None else None) for _ in range(count)]
        replicas += pool
        routes |= dict.fromkeys((None,) if depths is None else depths, least_wait(pool))
    arrivals = [Arrival(*each, rng.choice(fleet.asked)) for each in load]
    simulate(arrivals, lambda each: routes[each.depth](each), replicas)
    return arrivals
