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
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleb.engine.outputs import StepOutput
from sleb.errors import EngineDeadError, RequestError
from sleb.server.engine_thread.answers import Answers, Job
from sleb.server.errors import OverloadedError, ShuttingDownError

if TYPE_CHECKING:
    from sleb.engine.engine import Engine, EngineStats

logger = logging.getLogger("sleb.server")

Observer = Callable[[StepOutput, float], None]

_SECONDS_OF_COMMANDS = 0.02  # before the next step
_SECONDS_BETWEEN_CHECKS = 60.0  # of the engine's page accounting, when it is idle


@dataclass(frozen=True)
class _Add:
    answers: Answers
    jobs: dict[str, Job]


@dataclass(frozen=True)
class _Open:
    """Whose answer it is, and who is told of each increment as it comes, with the time."""

    answers: Answers
    observe: Observer


@dataclass(frozen=True)
class _Abort:
    request_ids: frozenset[str]


class AsyncEngine:
    """Runs an engine in a thread of its own. All methods belong to the event loop that called `start`.

    Args:
        engine: touched by nobody else from `start` on, but for its constants and its tokenizer.
        max_open: jobs that may be open at once, running and queued.
    """

    def __init__(self, engine: Engine, max_open: int) -> None:
        self.engine = engine
        self.model = engine.served
        self.max_open = max_open
        self.stats: EngineStats = engine.stats()
        self.draining = False
        self.on_death: Callable[[], None] = lambda: None
        self._dead: EngineDeadError | None = None
        self._open: dict[str, _Open] = {}
        self._numbers = itertools.count()
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

    @property
    def dead(self) -> EngineDeadError | None:
        """Why the engine has stopped, or None."""
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

    @property
    def num_open(self) -> int:
        """Jobs whose last output has not arrived."""
        return len(self._open)

    def check(self) -> None:
        """Raises what a new request would get: EngineDeadError, ShuttingDownError, or nothing."""
        if self.dead is not None:
            raise self.dead
        if self.draining or self._stopping:
            raise ShuttingDownError

    async def submit(self, jobs: Sequence[Job], observe: Observer = lambda output, now: None) -> Answers:
        """Hands `jobs` to the engine, all or none, and waits until it has taken them.

        observe: called with each increment and the monotonic time, whether or not anybody reads the answers.

        Raises RequestError for a job that the engine refuses, OverloadedError, ShuttingDownError, EngineDeadError.
        """
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
        named = {f"r{next(self._numbers)}": job for job in jobs}
        answers = Answers(list(named), self.abort)
        self._open.update(dict.fromkeys(named, _Open(answers, observe)))
        self._send(_Add(answers, named))
        try:
            await answers.accepted()
        except BaseException:
            answers.close()
            raise
        return answers

    def abort(self, answers: Answers) -> None:
        """Drops what is unfinished of `answers`; the engine forgets it before its next step."""
        request_ids = answers.unfinished
        for request_id in request_ids:
            self._open.pop(request_id, None)
        if request_ids:
            self._send(_Abort(request_ids))

    async def drain(self, timeout: float) -> bool:
        """Takes nothing new and waits for what is open; after `timeout` seconds the rest gets an error.

        True if everything was finished in time.
        """
        self.draining = True
        deadline = time.monotonic() + timeout
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        finished = not self._open
        self.fail_open(
            ShuttingDownError("the server is shutting down and the request did not finish in time")
        )
        return finished

    def fail_open(self, error: Exception) -> None:
        """Ends every open request with `error`."""
        for answers in list(dict.fromkeys(each.answers for each in self._open.values())):
            answers.fail(error)

    async def stop(self, timeout: float = 5.0) -> None:
        """Ends the thread after the step that it is in; gives up waiting after `timeout` seconds."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout)

    def _send(self, command: _Add | _Abort) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _deliver(self, outputs: list[StepOutput]) -> None:
        now = time.monotonic()
        told: dict[Answers, None] = {}
        for output in outputs:
            found = self._open.get(output.request_id)
            if found is None:  # aborted while the step ran
                continue
            if output.finish_reason is not None:
                del self._open[output.request_id]
            found.observe(output, now)
            found.answers.put(output)
            told[found.answers] = None
        for answers in told:
            answers.notify()

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
            outputs = engine.step()
            if outputs:
                self._post(self._deliver, outputs)
        self.stats = engine.stats()

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
                return
            self._adding = self._add(command)
        if not next(self._adding, False):
            self._adding = None

    def _add(self, command: _Add) -> Iterator[bool]:
        """Adds a request's jobs; yields True before each but the first."""
        added: list[str] = []
        firsts: dict[int, str] = {}
        try:
            for request_id, job in command.jobs.items():
                if added:
                    yield True
                # Jobs of one prompt share its list: the first computes it, the others fork.
                first = firsts.setdefault(id(job.prompt_token_ids), request_id)
                self.engine.add_request(
                    request_id,
                    job.prompt_token_ids,
                    job.params,
                    job.depth,
                    fork_of=None if first == request_id else first,
                )
                added.append(request_id)
        except RequestError as error:
            for request_id in added:
                self.engine.abort(request_id)
            self._post(command.answers.fail, error)
        else:
            self._post(command.answers.accept)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            logger.debug("an output came after the event loop was closed")
