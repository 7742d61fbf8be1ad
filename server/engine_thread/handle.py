"""What the HTTP side asks of an engine, wherever that runs: in a thread of this process, or in another process."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleb.errors import EngineDeadError
from sleb.server.engine_thread.answers import Answers, Job
from sleb.server.errors import ShuttingDownError

if TYPE_CHECKING:
    from sleb.engine.outputs import StepOutput
    from sleb.engine.requests.grammar import GrammarSource
    from sleb.engine.served_model import ServedModel
    from sleb.server.engine_thread.metrics import Scrape
    from sleb.server.grammar.grammar_spec import GrammarSpec

Observer = Callable[["StepOutput", float], None]


@dataclass(frozen=True)
class _Open:
    """Whose answer it is, and who is told of each increment as it comes, with the time."""

    answers: Answers
    observe: Observer


class EngineHandle(ABC):
    """Takes jobs for an engine and hands out what it makes of them. All methods belong to one event loop.

    Attributes:
        model: what is served.
        draining: whether nothing new is taken. leaving: whether it will be so soon, and others had better be asked.
        warm: whether every tier has answered once. warm_up_failure: why one could not.
        on_death: called when the engine has stopped by itself. on_change: when it has become warm, or drains.
    """

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.draining = self.leaving = False
        self.warm = True
        self.warm_up_failure: str | None = None
        self.on_death: Callable[[], None] = lambda: None
        self.on_change: Callable[[], None] = lambda: None
        self._open: dict[str, _Open] = {}
        self._numbers = itertools.count()

    @property
    @abstractmethod
    def dead(self) -> EngineDeadError | None:
        """Why the engine has stopped, or None."""

    @abstractmethod
    def start(self) -> None:
        """Begins; outputs go to the running event loop."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends what `start` began."""

    @abstractmethod
    async def compile(self, spec: GrammarSpec) -> GrammarSource:
        """What an answer must follow. Raises as `GrammarCompiler.compile` does."""

    @abstractmethod
    async def scrape(self) -> Scrape:
        """What /metrics tells of the engine, and of the server's other processes."""

    @abstractmethod
    def _hand_over(self, answers: Answers, jobs: Mapping[str, Job]) -> None:
        """Gives jobs to the engine, which accepts or fails `answers`."""

    @abstractmethod
    def _withdraw(self, answers: Answers, request_ids: frozenset[str]) -> None:
        """Lets the engine forget what is unfinished of `answers` before its next step."""

    @property
    def num_open(self) -> int:
        """Jobs whose last output has not arrived."""
        return len(self._open)

    def check(self) -> None:
        """Raises what a new request would get: EngineDeadError, ShuttingDownError, or nothing."""
        if self.dead is not None:
            raise self.dead
        if self.draining:
            raise ShuttingDownError

    def open(
        self,
        jobs: Sequence[Job],
        observe: Observer = lambda output, now: None,
        make: Callable[[list[str], Callable[[Answers], None]], Answers] = Answers,
    ) -> Answers:
        """Hands `jobs` to the engine, all or none; whether it takes them is told by `accepted` of the answers.

        observe: called with each increment and the monotonic time, whether or not anybody reads the answers.

        Raises as `check` does.
        """
        self.check()
        named = {f"r{next(self._numbers)}": job for job in jobs}
        answers = make(list(named), self.abort)
        self._open.update(dict.fromkeys(named, _Open(answers, observe)))
        self._hand_over(answers, named)
        return answers

    async def submit(self, jobs: Sequence[Job], observe: Observer = lambda output, now: None) -> Answers:
        """As `open`, and waits until the engine has taken the jobs.

        Raises RequestError for a job that the engine refuses, OverloadedError, ShuttingDownError, EngineDeadError.
        """
        answers = self.open(jobs, observe)
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
            self._withdraw(answers, request_ids)

    def fail_open(self, error: Exception) -> None:
        """Ends every open request with `error`."""
        for answers in list(dict.fromkeys(each.answers for each in self._open.values())):
            answers.fail(error)

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
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
