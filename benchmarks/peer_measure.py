"""Engines taking turns: a test's repetitions, each within the quiet policy."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from sleb.benchmarks.harness import Progress, alternated_orders
from sleb.benchmarks.idle import run_quietly
from sleb.benchmarks.peer_engines import Engine, Task
from sleb.benchmarks.peer_entrants import Entrants
from sleb.benchmarks.peer_options import PeerOptions, PeerTest, Round
from sleb.benchmarks.peer_results import Repetition, Samples, Turn

# A prompt takes a fraction of a second, so a turn is the median of several.
_RUNS_OF_A_PROMPT = 3
_BANDWIDTH_BYTES = 512 << 20
# After so many turns in a row that others disturbed in spite of all attempts, no more time is spent on waiting.
_PATIENCE = 3


class Contest:
    """What all engines have done so far.

    Attributes:
        entrants: the engines. samples: complete repetitions by test. first_tokens: of each contestant's warm-ups.
    """

    def __init__(
        self,
        options: PeerOptions,
        report: Callable[[Progress], None] = lambda progress: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.options = options
        self.entrants = Entrants(options, report, say)
        self.samples: Samples = {}
        self.first_tokens: dict[str, dict[str, list[int]]] = {}
        self._report, self._say = report, say
        self._policy = options.policy
        self._num_in_vain = 0
        self._rng = random.Random(options.seed)
        self._num_done = self._num_runs = 0

    def run(self, on_test: Callable[[], None]) -> None:
        """Measures all tests; on_test is called after each. Raises PeerError if an engine of ours fails."""
        plans = {test: self.entrants.rounds(test) for test in self.options.tests}
        turns = sum(len(each.sequence) for rounds in plans.values() for each in rounds)
        warm_ups = sum(len(self._warming(rounds)) for rounds in plans.values())
        self._num_runs = turns * self.options.repetitions + warm_ups
        for test in plans:
            self._run_test(test)
            on_test()
        self._report(Progress(self._num_runs, self._num_runs, "done"))

    def _warming(self, rounds: Sequence[Round]) -> list[str]:
        """Who needs a run before the ones that count."""
        ours = [own.name for each in rounds for own in each.own]
        names = dict.fromkeys([*ours, *(each.peer for each in rounds)])
        return [name for name in names if self.entrants.engine(name).warms]

    def _run_test(self, test: PeerTest) -> None:
        self.samples.setdefault(test, [])
        for name in self._warming(self.entrants.rounds(test)):
            self._show(test, name, "warm-up")
            with self.entrants.dropping(name, test=test):
                measured = self.entrants.engine(name).turn(self.entrants.task(test, name, 0))
                self.first_tokens.setdefault(str(test), {})[name] = measured.token_ids[:16]
            self._num_done += 1
        rounds = self.entrants.rounds(test)
        orders = alternated_orders(range(len(rounds)), self.options.repetitions, self._rng)
        for number, order in enumerate(orders, 1):
            repetition = Repetition({}, [])
            self._read_bandwidth(test, repetition)
            for each in (rounds[index] for index in order):
                if not self.entrants.takes_part(each.peer, test):
                    continue
                with self.entrants.dropping(each.peer, test=test):
                    repetition.rounds[each.peer] = self._run_round(test, each, number)
                self._read_bandwidth(test, repetition)
            self.samples[test].append(repetition)

    def _run_round(self, test: PeerTest, each: Round, number: int) -> dict[str, Turn]:
        names = list(each.sequence)
        if number % 2 == 0:
            names.reverse()
        as_text = not self.entrants.engine(each.peer).takes_ids
        num_runs = _RUNS_OF_A_PROMPT if test.kind == "prompt" else 1
        turns = {}
        for name in names:
            self._show(test, name, f"repetition {number} of {self.options.repetitions}")
            task = self.entrants.task(test, name, number, num_runs)
            task.as_text = as_text
            turns[name] = self._turn(task, self.entrants.engine(name))
        return turns

    def _turn(self, task: Task, engine: Engine) -> Turn:
        known = engine.pids is not None
        # What cannot be told from others must not count as others.
        policy = self._policy if known else replace(self._policy, limit=1.0, retries=0)
        done = run_quietly(lambda: engine.turn(task), engine.pids or (), policy)
        self._num_done += 1
        self._be_patient(done.disturbed)
        measured = done.result
        share = done.others_share if known else None
        return Turn(measured.rate, measured.seconds, share, done.disturbed, done.attempts)

    def _be_patient(self, disturbed: bool) -> None:
        self._num_in_vain = self._num_in_vain + 1 if disturbed else 0
        policy = self._policy
        if self._num_in_vain == _PATIENCE and (policy.wait_seconds or policy.retries):
            self._policy = replace(policy, wait_seconds=0.0, retries=0)
            notice = "The machine would not become idle: after a while runs waited for it no longer."
            self.entrants.notices.append(notice)
            self._say(notice)

    def _read_bandwidth(self, test: PeerTest, repetition: Repetition) -> None:
        worker = self.entrants.bandwidth
        if not test.single or worker is None or not self.entrants.takes_part("bandwidth", test):
            return
        with self.entrants.dropping("bandwidth"):
            done = run_quietly(
                lambda: worker.call("read", num_bytes=_BANDWIDTH_BYTES), (worker.pid,), self._policy
            )
            if not done.disturbed:
                repetition.bandwidth.append(done.result["gb_per_second"])

    def _show(self, test: PeerTest, name: str, which: str) -> None:
        self._report(Progress(self._num_done, self._num_runs, f"{test}, {name}, {which}"))
