"""Lines answered by the server's own application in this process: its bytes are those that HTTP would bring."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import orjson

from sleb.batch.lines import Ask
from sleb.batch.options import BatchOptions
from sleb.batch.progress import first_error
from sleb.batch.sources import Block
from sleb.errors import RequestError, SlebError
from sleb.server.app import create_app
from sleb.server.context import ServerContext
from sleb.server.engine_thread.async_engine import AsyncEngine
from sleb.server.options import ServeOptions

if TYPE_CHECKING:
    from sleb.engine.engine import Engine

_MAX_QUEUE = 10**6  # of the engine: what waits is bounded here
_SECONDS_BUSY = 0.05  # before a request that found the queue full is sent again
_BUSY = 503


class Answerer:
    """Answers blocks of lines; belongs to an event loop. See `open_answerer`.

    Attributes:
        num_errors: rows so far that are errors, of whichever kind.
    """

    def __init__(self, context: ServerContext, http: httpx.AsyncClient, num_at_once: int) -> None:
        self.context = context
        self.num_errors = 0
        self._http = http
        self._room = asyncio.Semaphore(num_at_once)

    @property
    def num_output_tokens(self) -> int:
        """That the engine has made so far."""
        engine = self.context.engine
        assert isinstance(engine, AsyncEngine)
        return engine.stats.num_output_tokens

    async def answer(
        self, block: Block, asks: Sequence[Ask], on_row: Callable[[], None] = lambda: None
    ) -> list[bytes]:
        """A row for each line, in their order. Raises EngineDeadError.

        The engine gets them sorted by tier and beginning: rows of a depth stand together, and a prefix is computed
        once. Every second block begins with the tier that the one before ends with.
        """
        direction = -1 if block.index % 2 else 1
        order = sorted(range(len(asks)), key=lambda i: (direction * self._depth(asks[i]), asks[i].prefix))
        rows = [b""] * len(asks)

        async def work(index: int) -> None:
            rows[index] = await self._answer(asks[index], _row_id(block, index))
            on_row()

        try:
            async with asyncio.TaskGroup() as group:
                for index in order:
                    group.create_task(work(index))
        except* SlebError as errors:
            raise first_error(errors) from None
        return rows

    def _depth(self, ask: Ask) -> int:
        try:
            return self.context.tier(ask.model).depth
        except RequestError:
            return -1  # an error in no time

    async def _answer(self, ask: Ask, row_id: str) -> bytes:
        if ask.error is not None:
            self.num_errors += 1
            return _error_row(ask, row_id)
        headers = {"Content-Type": "application/json", "X-Request-Id": row_id}
        async with self._room:
            while True:
                response = await self._http.post(ask.url, content=ask.body, headers=headers)
                if response.status_code != _BUSY:
                    break
                self.context.engine.check()
                await asyncio.sleep(_SECONDS_BUSY)
        self.num_errors += response.status_code >= 400
        return _row(ask, row_id, response)


@asynccontextmanager
async def open_answerer(engine: Engine, max_num_seqs: int, options: BatchOptions) -> AsyncIterator[Answerer]:
    """Starts the engine's thread under the application, and ends it at the end."""
    serve_options = ServeOptions(
        served_model_names=options.served_model_names,
        tool_format=options.tool_format,
        max_body_mb=options.max_line_mb + 1,  # with what --body adds
        max_queue=_MAX_QUEUE,
        response_store_mb=0,
        warm_up=False,
    )
    context = ServerContext.create(engine, serve_options, max_num_seqs)
    app = create_app(context)
    gc.collect()
    gc.freeze()  # what is loaded now stays: collections need not look at it again
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    server_logger = logging.getLogger("sleb.server")
    server_logger.addFilter(_is_of_no_request)
    lifespan = app.router.lifespan_context(app)
    await lifespan.__aenter__()
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            yield Answerer(context, http, 2 * max_num_seqs)  # as many again are ready when one ends
    finally:
        await lifespan.__aexit__(None, None, None)  # as a server ends, whatever came
        server_logger.removeFilter(_is_of_no_request)


def _is_of_no_request(record: logging.LogRecord) -> bool:
    """A line of the log for each request that failed tells nothing that its row does not."""
    return "request" not in getattr(record, "facts", ())


def _row_id(block: Block, index: int) -> str:
    digest = hashlib.blake2b(f"{block.name} {index}".encode(), digest_size=12)
    return f"batch_req_{digest.hexdigest()}"


def _row(ask: Ask, row_id: str, response: httpx.Response) -> bytes:
    """OpenAI's row with the body's bytes as they are."""
    return (
        b'{"id":%b,"custom_id":%b,"response":{"status_code":%d,"request_id":%b,"body":%b},"error":null}'
        % (
            orjson.dumps(row_id),
            orjson.dumps(ask.custom_id),
            response.status_code,
            orjson.dumps(response.headers.get("x-request-id", row_id)),
            response.content,
        )
    )


def _error_row(ask: Ask, row_id: str) -> bytes:
    assert ask.error is not None
    error = {"code": ask.error.code, "message": str(ask.error), "line": ask.number}
    return orjson.dumps({"id": row_id, "custom_id": ask.custom_id, "response": None, "error": error})
