"""The engine behind the event loop: one thread owns it, and everybody else sends it commands.

    event loop                                engine thread
    submit ──── _Add ────►  commands ────►    add_request      (RequestError: that request's answer alone)
    Answers.close ─ _Abort ►                  abort
    Answers.next ◄── one call_soon_threadsafe a step ── step

If `step` raises, or `add_request` raises anything but RequestError, the thread ends: every open request gets an
EngineDeadError, so does every later one, and `on_death` tells the server to stop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleb.engine.depth_policy import Choice, DepthPolicy
from sleb.errors import EngineDeadError, RequestError
from sleb.server.engine_thread.answers import Answers, Job
from sleb.server.engine_thread.auto_depth import AutoDepth, AutoStats
from sleb.server.engine_thread.chores import log_throughput, warm_up
from sleb.server.engine_thread.handle import EngineHandle, Observer
from sleb.server.engine_thread.intervals import Intervals
from sleb.server.engine_thread.metrics import Scrape
from sleb.server.errors import OverloadedError, ShuttingDownError
from sleb.server.grammar.grammars import GrammarCompiler, compiler_for

if TYPE_CHECKING:
    from sleb.engine.engine import Engine
    from sleb.engine.outputs import EngineStats
    from sleb.engine.requests.grammar import GrammarSource
    from sleb.server.grammar.grammar_spec import GrammarSpec

logger = logging.getLogger("sleb.server")

_SECONDS_OF_COMMANDS = 0.02  # before the next step
_SECONDS_BETWEEN_CHECKS = 60.0  # of the engine's page accounting, when it is idle


@dataclass(frozen=True)
class _Add:
    answers: Answers
    jobs: dict[str, Job]


@dataclass(frozen=True)
class _Abort:
    request_ids: frozenset[str]


class AsyncEngine(EngineHandle):
    """Runs an engine in a thread of its own.

    Args:
        engine: touched by nobody else from `start` on, but for what it serves.
        max_open: jobs that may be open at once, running and queued.
        stream_interval: see `Intervals`. warm_up: whether every tier answers once before it is `warm`.
        log_interval: seconds between lines about throughput, while there is any.
    """

    def __init__(
        self,
        engine: Engine,
        max_open: int,
        *,
        stream_interval: int = 1,
        warm_up: bool = False,
        log_interval: float = 10.0,
    ) -> None:
        super().__init__(engine.served)
        self.warm = not warm_up
        self._log_interval = log_interval
        self._chores: list[asyncio.Task[None]] = []
        self.engine = engine
        self.max_open = max_open
        self.stats: EngineStats = engine.stats()
        self.auto: AutoDepth | None = None
        self.auto_stats: AutoStats | None = None
        self._intervals = Intervals(stream_interval)
        self._dead: EngineDeadError | None = None
        self._commands: deque[_Add | _Abort] = deque()
        self._adding: Iterator[bool] | None = None  # of the last command, while it has more jobs
        self._condition = threading.Condition()
        self._stopping = False
        self._last_check = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="sleb-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._chores.append(asyncio.create_task(log_throughput(self, self._log_interval)))
        if not self.warm:
            self._chores.append(asyncio.create_task(warm_up(self)))

    @property
    def dead(self) -> EngineDeadError | None:
        if (
            self._dead is None
            and self._loop is not None
            and not self._stopping
            and not self._thread.is_alive()
        ):
            self._dead = EngineDeadError("the engine's thread has ended")
        return self._dead

    @property
    def running(self) -> bool:
        """Whether the thread is alive; after `stop`, True means that it hangs in a step."""
        return self._thread.is_alive()

    def check(self) -> None:
        super().check()
        if self._stopping:
            raise ShuttingDownError

    def choose_depths(self, policy: DepthPolicy, depths: tuple[int, ...]) -> None:
        """Lets requests leave their depth to `policy`, which may choose of `depths`; before `start`."""
        self.auto = AutoDepth(self.engine, policy, depths)
        self.auto_stats = self.auto.stats()

    def become_warm(self) -> None:
        """Every tier has answered once, or could not."""
        if self.auto is not None:
            self.auto.forget_pace()
        self.warm = True
        self.on_change()

    @property
    def compiler(self) -> GrammarCompiler:
        return compiler_for(self.model)

    async def compile(self, spec: GrammarSpec) -> GrammarSource:
        return await self.compiler.compile(spec)

    async def scrape(self) -> Scrape:
        return Scrape(self.stats, None if self.auto is None else self.auto_stats)

    def open(
        self,
        jobs: Sequence[Job],
        observe: Observer = lambda output, now: None,
        make: Callable[[list[str], Callable[[Answers], None]], Answers] = Answers,
    ) -> Answers:
        """As any handle's; raises RequestError and OverloadedError, too, for more jobs than may be open."""
        self.check()
        if len(jobs) > self.max_open:
            raise RequestError(
                f"the request asks for {len(jobs)} answers (prompts × n), but this server holds at most "
                f"{self.max_open} at once; send fewer, or raise --max-queue",
                param="n",
            )
        if len(self._open) + len(jobs) > self.max_open:
            raise OverloadedError(
                f"the queue is full: {len(self._open)} of {self.max_open} requests are open and this one needs "
                f"{len(jobs)}; try again later, or raise --max-queue"
            )
        return super().open(jobs, observe, make)

    def _hand_over(self, answers: Answers, jobs: Mapping[str, Job]) -> None:
        self._send(_Add(answers, dict(jobs)))

    def _withdraw(self, answers: Answers, request_ids: frozenset[str]) -> None:
        self._send(_Abort(request_ids))

    def leave(self) -> None:
        """Lets /ready say that requests had better go elsewhere; they are taken still."""
        self.leaving = True
        self.on_change()

    async def drain(self, timeout: float) -> bool:
        """Takes nothing new and waits for what is open; after `timeout` seconds the rest gets an error.

        True if everything was finished in time.
        """
        self.draining = True
        self.on_change()
        deadline = time.monotonic() + timeout
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        finished = not self._open
        self.fail_open(
            ShuttingDownError("the server is shutting down and the request did not finish in time")
        )
        return finished

    async def stop(self, timeout: float = 5.0) -> None:
        """Ends the thread after the step that it is in; gives up waiting after `timeout` seconds."""
        for task in self._chores:
            task.cancel()
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout)

    def _send(self, command: _Add | _Abort) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _fail_dead(self, error: EngineDeadError) -> None:
        self._dead = error
        self.fail_open(error)
        self.on_death()

    # From here on: the engine thread.

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except BaseException as error:
            logger.critical("the engine has stopped", exc_info=error)
            dead = EngineDeadError(f"the engine has stopped after an internal error ({type(error).__name__})")
            self._dead = dead
            self._post(self._fail_dead, dead)

    def _turn(self) -> None:
        """Commands for a while, then one step: a request of a thousand prompts lets others go on."""
        engine, deadline = self.engine, time.monotonic() + _SECONDS_OF_COMMANDS
        while self._has_commands and time.monotonic() < deadline:
            self._apply()
        if engine.has_unfinished():
            outputs = self._intervals.push(engine.step())
            if outputs:
                self._post(self._deliver, outputs)
        self.stats = engine.stats()
        if self.auto is not None:
            self.auto_stats = self.auto.stats()

    def _wait(self) -> bool:
        """Sleeps until there is work; False when the thread shall end."""
        if not self._has_commands and not self._stopping and not self.engine.has_unfinished():
            self._check_integrity()
            with self._condition:
                self._condition.wait_for(lambda: self._commands or self._stopping)
        return not self._stopping

    def _check_integrity(self) -> None:
        now = time.monotonic()
        if now - self._last_check > _SECONDS_BETWEEN_CHECKS:
            self._last_check = now
            self.engine.check_integrity()

    @property
    def _has_commands(self) -> bool:
        return bool(self._adding or self._commands)

    def _apply(self) -> None:
        """The next command, or a job more of the last one."""
        if self._adding is None:
            command = self._commands.popleft()
            if isinstance(command, _Abort):
                for request_id in command.request_ids:
                    self.engine.abort(request_id)
                    self._intervals.forget(request_id)
                return
            self._adding = self._add(command)
        if not next(self._adding, False):
            self._adding = None

    def _add(self, command: _Add) -> Iterator[bool]:
        """Adds a request's jobs; yields True before each but the first."""
        added: list[str] = []
        firsts: dict[int, str] = {}
        choice: Choice | None = None
        try:
            first_job = next(iter(command.jobs.values()))
            if first_job.conversation is not None and self.auto is not None:
                num_tokens = sum(len(job.prompt_token_ids) for job in command.jobs.values())
                choice = self.auto.choose(num_tokens, first_job.conversation)
            for request_id, job in command.jobs.items():
                if added:
                    yield True
                # Jobs of one prompt share its list: the first computes it, the others fork.
                first = firsts.setdefault(id(job.prompt_token_ids), request_id)
                self.engine.add_request(
                    request_id,
                    job.prompt_token_ids,
                    job.params,
                    job.depth if choice is None else choice.depth,
                    fork_of=None if first == request_id else first,
                )
                added.append(request_id)
        except (RequestError, OverloadedError) as error:
            for request_id in added:
                self.engine.abort(request_id)
            self._post(command.answers.fail, error)
        else:
            self._post(command.answers.accept, choice)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            logger.debug("an output came after the event loop was closed")
