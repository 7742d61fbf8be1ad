"""The engine's process of a server with fronts: what they send goes to the engine, and what it makes goes to them.

What is one for the server is here: the queue and its limit, the answers that are kept, the state of the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from sleb.engine.depth_policy import Choice
from sleb.engine.outputs import StepOutput
from sleb.errors import EngineDeadError, SlebError
from sleb.server.engine_process.channel import Channel, Kind
from sleb.server.engine_process.codec import (
    grammars_of,
    pack_error,
    pack_output,
    unpack_jobs,
    unpack_spec,
)
from sleb.server.engine_process.spawn import FrontProcess
from sleb.server.engine_thread.answers import Answers
from sleb.server.engine_thread.async_engine import AsyncEngine
from sleb.server.errors import ApiError
from sleb.server.grammar.grammar_spec import GrammarSpec, Part
from sleb.server.responses.store import Entry, ResponseStore

logger = logging.getLogger("sleb.server")

_SECONDS_TO_TELL = 2.0  # for a front to answer a call; one that hangs is left out


class RelayedAnswers(Answers):
    """Answers that a front waits for: whatever comes is packed and sent there.

    Args:
        first: the front's number of the first job.
    """

    def __init__(
        self, front: Front, first: int, request_ids: list[str], abort: Callable[[Answers], None]
    ) -> None:
        super().__init__(request_ids, abort)
        self._front, self._first = front, first
        self._known = [False] * len(request_ids)  # whether a front has what seldom changes of a job

    def accept(self, depth: Choice | None = None) -> None:
        told = None if depth is None else (depth.depth, depth.degraded)
        self._front.channel.send(Kind.ACCEPTED, self._first, told)

    def put(self, output: StepOutput) -> None:
        index = self._index[output.request_id]
        ends = output.finish_reason is not None
        if ends:
            self._unfinished.discard(output.request_id)
        whole = (
            ends
            or not self._known[index]
            or output.new_logprobs is not None
            or output.prompt_logprobs is not None
        )
        self._known[index] = output.timings.first_token is not None
        self._front.outputs.append(pack_output(self._first + index, output, whole=whole))
        if not self._unfinished:
            self._front.answers.pop(self._first, None)

    def notify(self) -> None:
        """All increments of a step are put before the first answers are notified, so the rest find nothing."""
        self._front.flush()

    def fail(self, error: Exception) -> None:
        self._front.channel.send(Kind.FAILED, self._first, pack_error(error))
        self._front.answers.pop(self._first, None)
        self.close()


class Front:
    """A front process as the engine's process sees it.

    Attributes:
        outputs: packed increments of the step that is being delivered.
        answers: that are open, by the front's number of their first job. compiling: those numbers of requests whose
            grammar is not there yet.
        started: set when clients can connect to it.
    """

    channel: Channel

    def __init__(self, process: FrontProcess) -> None:
        self.process = process
        self.outputs: list[Any] = []
        self.answers: dict[int, RelayedAnswers] = {}
        self.compiling: set[int] = set()
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    def flush(self) -> None:
        if self.outputs:
            self.channel.send(Kind.OUTPUTS, self.outputs)
            self.outputs = []


class Hub:
    """Connects an engine with its fronts. Belongs to one event loop.

    on_lost: called when a front has ended that was not told to.
    """

    def __init__(self, engine: AsyncEngine, store: ResponseStore, on_lost: Callable[[Front], None]) -> None:
        self.engine = engine
        self.fronts: list[Front] = []
        self._store = store
        self._on_lost = on_lost
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._dead: EngineDeadError | None = None
        self._calls: dict[str, Callable[..., Awaitable[Any]]] = {
            name: getattr(self, f"_call_{name}")
            for name in ("compile", "find", "get", "delete", "items", "scrape")
        }

    async def connect(self, process: FrontProcess) -> Front:
        """Begins to listen to a front."""
        front = Front(process)
        front.channel = Channel(partial(self._on_message, front), partial(self._on_end, front))
        await front.channel.connect(process.take_socket())
        self.fronts.append(front)
        self._tell_state(front)
        return front

    def tell_state(self, dead: EngineDeadError | None = None) -> None:
        """Lets every front know whether the engine is warm, drains or is dead."""
        self._dead = dead or self._dead or self.engine.dead
        for front in self.fronts:
            self._tell_state(front)

    def stop(self, seconds: int, exit_code: int) -> None:
        """Lets every front end, once its clients have had `seconds` to read the end of their answers."""
        self._stopping = True
        for front in self.fronts:
            front.channel.send(Kind.STOP, seconds, exit_code)

    def _tell_state(self, front: Front) -> None:
        engine = self.engine
        dead = None if self._dead is None else pack_error(self._dead)
        front.channel.send(
            Kind.STATE, engine.draining, engine.leaving, engine.warm, engine.warm_up_failure, dead
        )

    def _on_end(self, front: Front) -> None:
        front.ended.set()
        for answers in list(front.answers.values()):
            answers.close()
        front.answers.clear()
        front.compiling.clear()
        if not self._stopping and self._dead is None:
            self._on_lost(front)

    def _on_message(self, front: Front, message: list[Any]) -> None:
        kind, *rest = message
        match kind:
            case Kind.SUBMIT:
                self._submit(front, *rest)
            case Kind.ABORT:
                front.compiling.discard(rest[0])
                if (answers := front.answers.pop(rest[0], None)) is not None:
                    answers.close()
            case Kind.PUT:
                owner, identifier, response, turns, item_ids = rest
                self._store.keep(owner, Entry(identifier, response, tuple(turns), tuple(item_ids)))
            case Kind.STARTED:
                front.started.set()
            case Kind.CALL:
                self._spawn(self._answer(front, *rest))

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Jobs.

    def _submit(self, front: Front, first: int, packed: list[Any]) -> None:
        kept = {parts: self.engine.compiler.kept(parts) for parts in grammars_of(packed)}
        if None in kept.values():  # it gave way to others since it was compiled for this request
            self._spawn(self._compile_and_open(front, first, packed, list(kept)))
        else:
            self._open(front, first, packed, kept)

    async def _compile_and_open(
        self, front: Front, first: int, packed: list[Any], grammars: Sequence[tuple[Part, ...]]
    ) -> None:
        front.compiling.add(first)
        try:
            found = {parts: await self.engine.compile(GrammarSpec(parts, "grammar")) for parts in grammars}
        except SlebError as error:
            front.compiling.discard(first)
            front.channel.send(Kind.FAILED, first, pack_error(error))
            return
        if first in front.compiling:  # else it was given up meanwhile
            front.compiling.discard(first)
            self._open(front, first, packed, found)

    def _open(self, front: Front, first: int, packed: list[Any], grammars: dict[Any, Any]) -> None:
        try:
            jobs = unpack_jobs(packed, grammars.__getitem__)
            answers = self.engine.open(jobs, make=partial(RelayedAnswers, front, first))
        except SlebError as error:
            front.channel.send(Kind.FAILED, first, pack_error(error))
            return
        assert isinstance(answers, RelayedAnswers)
        front.answers[first] = answers

    # Calls.

    async def _answer(self, front: Front, number: int, name: str, arguments: list[Any]) -> None:
        try:
            result, error = await self._calls[name](front, *arguments), None
        except Exception as raised:
            result, error = None, pack_error(raised)
        front.channel.send(Kind.RESULT, number, error, result)

    async def _call_compile(self, front: Front, packed: list[Any]) -> None:
        await self.engine.compile(unpack_spec(packed))

    async def _call_find(self, front: Front, owner: bytes, identifier: str, cancel: bool) -> Any:
        with_kept = partial(self._store.get, owner, identifier)
        try:
            return with_kept().whole()
        except ApiError:
            for told in await self._ask_others(front, "of_running", owner, identifier, cancel):
                if told is not None:
                    return told
            return with_kept().whole()

    async def _call_get(self, front: Front, owner: bytes, identifier: str, param: str | None) -> Any:
        try:
            kept = self._store.get(owner, identifier, param)
        except ApiError:
            await self._settle(front)
            kept = self._store.get(owner, identifier, param)
        return msgspec.to_builtins(kept, builtin_types=(bytes,))

    async def _call_delete(self, front: Front, owner: bytes, identifier: str) -> None:
        try:
            self._store.delete(owner, identifier)
        except ApiError:
            await self._settle(front)
            self._store.delete(owner, identifier)

    async def _call_items(self, front: Front, owner: bytes, item_ids: list[str]) -> Any:
        found = self._store.items(owner, item_ids)
        if len(found) < len(set(item_ids)):
            await self._settle(front)
            found = self._store.items(owner, item_ids)
        return found

    async def _call_scrape(self, front: Front) -> Any:
        others = await self._ask_others(front, "counts")
        auto = self.engine.auto_stats
        told = None if auto is None else msgspec.to_builtins(auto)
        return [msgspec.to_builtins(self.engine.stats), told, [each for each in others if each is not None]]

    async def _settle(self, front: Front) -> None:
        """Waits until what the other fronts have sent so far is read: an answer that one of them has just told may be
        asked for at another before it is kept."""
        await self._ask_others(front, "of_running", b"", "", False)

    async def _ask_others(self, front: Front, name: str, *arguments: Any) -> list[Any]:
        """What each other front answers to a call; None for one that does not."""

        async def ask(other: Front) -> Any:
            try:
                async with asyncio.timeout(_SECONDS_TO_TELL):
                    _, result = await other.channel.call(name, *arguments)
                    return result
            except (TimeoutError, ConnectionError):
                return None

        return await asyncio.gather(*(ask(other) for other in self.fronts if other is not front))
