"""The engine as a front sees it: behind a channel to the engine's process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from sleb.engine.depth_policy import Choice
from sleb.engine.outputs import EngineStats, StepOutput
from sleb.engine.requests.grammar import GrammarSource
from sleb.engine.served_model import ServedModel
from sleb.errors import EngineDeadError
from sleb.server.engine_process.channel import Channel, Kind
from sleb.server.engine_process.codec import (
    NamedGrammar,
    is_whole,
    pack_jobs,
    pack_spec,
    unpack_error,
    unpack_whole,
)
from sleb.server.engine_thread.answers import Answers, Job
from sleb.server.engine_thread.auto_depth import AutoStats
from sleb.server.engine_thread.handle import EngineHandle
from sleb.server.engine_thread.metrics import Scrape
from sleb.server.grammar.grammar_spec import GrammarSpec
from sleb.server.responses.shared import Responses
from sleb.server.responses.store import Entry, Kept


class EngineClient(EngineHandle):
    """Sends jobs to the engine's process, and hands out the increments that come back.

    Args:
        sock: connected to the engine's process. pids: of all processes of the server.

    Attributes:
        on_stop: called when this process shall end: seconds for clients to read the end of their answers, exit code.
        channel: to the engine's process. calls: what that may ask, by name.
    """

    def __init__(self, model: ServedModel, sock: socket.socket, pids: Sequence[int]) -> None:
        super().__init__(model)
        self.warm = False
        self.on_stop: Callable[[int, int], None] = lambda seconds, exit_code: None
        self.calls: dict[str, Callable[..., Any]] = {}
        self._sock, self._pids = sock, pids
        self.channel = Channel(self._on_message, self._on_end)
        self._dead: EngineDeadError | None = None
        self._stopping = False
        self._last: dict[str, StepOutput] = {}  # by request id, of answers that have begun
        self._answers: dict[int, Answers] = {}  # by the number of their first job, until they are closed

    async def connect(self) -> None:
        """Begins to listen, on the running event loop."""
        await self.channel.connect(self._sock)

    def start(self) -> None:
        """It has been connected already, so that it knows what to tell the first client."""

    async def stop(self) -> None:
        self._stopping = True
        self.channel.close()

    @property
    def dead(self) -> EngineDeadError | None:
        return self._dead

    async def call(self, name: str, *arguments: Any) -> Any:
        """What the engine's process answers. Raises what it raises, EngineDeadError when it has gone."""
        try:
            error, result = await self.channel.call(name, *arguments)
        except ConnectionError:
            raise self._dead or EngineDeadError("the engine's process has ended") from None
        if error is not None:
            raise unpack_error(error)
        return result

    async def compile(self, spec: GrammarSpec) -> GrammarSource:
        await self.call("compile", pack_spec(spec))
        return NamedGrammar(spec.parts)

    async def scrape(self) -> Scrape:
        stats, auto, others = await self.call("scrape")
        told = None if auto is None else msgspec.convert(auto, AutoStats)
        return Scrape(msgspec.convert(stats, EngineStats), told, others, self._pids)

    def _hand_over(self, answers: Answers, jobs: Mapping[str, Job]) -> None:
        first = _number(answers)
        self._answers[first] = answers
        self.channel.send(Kind.SUBMIT, first, pack_jobs(list(jobs.values())))

    def abort(self, answers: Answers) -> None:
        super().abort(answers)
        self._answers.pop(_number(answers), None)

    def _withdraw(self, answers: Answers, request_ids: frozenset[str]) -> None:
        for request_id in request_ids:
            self._last.pop(request_id, None)
        self.channel.send(Kind.ABORT, _number(answers))

    def _on_message(self, message: list[Any]) -> None:
        kind, *rest = message
        match kind:
            case Kind.OUTPUTS:
                self._deliver([output for each in rest[0] if (output := self._unpack(each)) is not None])
            case Kind.ACCEPTED:
                if (answers := self._answers.get(rest[0])) is not None:
                    answers.accept(None if rest[1] is None else Choice(*rest[1]))
            case Kind.FAILED:
                if (answers := self._answers.get(rest[0])) is not None:
                    answers.fail(unpack_error(rest[1]))
            case Kind.STATE:
                self._on_state(*rest)
            case Kind.STOP:
                self._stopping = True
                self.on_stop(*rest)
            case Kind.CALL:
                number, name, arguments = rest
                self.channel.send(Kind.RESULT, number, None, self.calls[name](*arguments))

    def _unpack(self, packed: Sequence[Any]) -> StepOutput | None:
        """An increment; None for one of an answer that was given up meanwhile."""
        request_id = f"r{packed[0]}"
        if is_whole(packed):
            output = unpack_whole(request_id, packed)
            if output.finish_reason is not None:
                self._last.pop(request_id, None)
            elif request_id in self._open:
                self._last[request_id] = output
            return output
        last = self._last.get(request_id)
        if last is None:
            return None
        _, token_ids, text, num_output = packed
        return StepOutput(  # in order, as the engine makes them
            request_id,
            token_ids,
            text,
            None,
            None,
            None,
            None,
            last.num_prompt_tokens,
            num_output,
            last.num_cached_tokens,
            last.timings,
        )

    def _on_state(
        self, draining: bool, leaving: bool, warm: bool, failure: str | None, dead: list[Any] | None
    ) -> None:
        self.draining, self.leaving, self.warm, self.warm_up_failure = draining, leaving, warm, failure
        if dead is not None and self._dead is None:
            error = unpack_error(dead)
            assert isinstance(error, EngineDeadError)
            self._die(error)

    def _on_end(self) -> None:
        if not self._stopping and self._dead is None:
            self._die(EngineDeadError("the engine's process has ended"))

    def _die(self, error: EngineDeadError) -> None:
        self._dead = error
        self.fail_open(error)
        self.on_death()


def _number(answers: Answers) -> int:
    """That of the first job, as the engine's process knows it."""
    return int(answers.request_ids[0][1:])


class RemoteResponses(Responses):
    """The answers that the engine's process keeps, and those that any front is making."""

    def __init__(self, engine: EngineClient, *, keeps: bool) -> None:
        super().__init__(keeps=keeps)
        self._engine = engine

    async def _find_elsewhere(self, owner: bytes, identifier: str, *, cancel: bool) -> dict[str, Any]:
        found: dict[str, Any] = await self._engine.call("find", owner, identifier, cancel)
        return found

    async def get(self, owner: bytes, identifier: str, param: str | None = None) -> Kept:
        return msgspec.convert(await self._engine.call("get", owner, identifier, param), Kept)

    async def delete(self, owner: bytes, identifier: str) -> None:
        await self._engine.call("delete", owner, identifier)

    async def items(self, owner: bytes, item_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = await self._engine.call("items", owner, list(item_ids))
        return found

    def put(
        self,
        owner: bytes,
        response: dict[str, Any],
        input_items: Sequence[dict[str, Any]],
        earlier: tuple[bytes, ...] = (),
    ) -> None:
        entry = Entry.of(response, input_items, earlier)
        self._engine.channel.send(
            Kind.PUT, owner, entry.identifier, entry.response, entry.turns, entry.item_ids
        )
