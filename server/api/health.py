"""Whether the server lives and whether it takes requests: without a key, for whoever watches it."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter, Request, Response
from typing_extensions import TypedDict

from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import EngineDeadError
from sleb.server.context import ServerContext, get_context
from sleb.server.engine_thread.answers import Job
from sleb.server.errors import ApiError, OverloadedError, ShuttingDownError, json_response
from sleb.server.grammar.grammars import compiler_for
from sleb.server.routing import OpenRoute, errors, success

router = APIRouter(route_class=OpenRoute)
logger = logging.getLogger("sleb.server")

_WARM_UP_PROMPT = 16  # tokens
_WARM_UP_TOKENS = 4
_SECONDS_BETWEEN_TRIES = 0.1


class Status(TypedDict):
    status: str


@router.get("/health", response_model=Status, responses=success() | errors(503))
@router.get("/v1/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """200 while the engine lives, also while the server drains; 503 engine_dead when it does not."""
    engine = get_context(request).engine
    if engine.dead is not None:
        raise engine.dead
    return json_response({"status": "draining" if engine.draining else "ok"})


@router.get("/ready", response_model=Status, responses=success() | errors(503))
async def ready(request: Request) -> Response:
    """200 once every tier is warm and while new requests are taken, else 503 that says why not."""
    context = get_context(request)
    context.engine.check()
    if context.warm_up_failure is not None:
        raise ApiError(
            503,
            f"the server could not warm up: {context.warm_up_failure}",
            type="server_error",
            code="warm_up_failed",
        )
    if not context.warm:
        raise ApiError(
            503,
            "the server is warming up",
            type="server_error",
            code="warming_up",
            headers={"Retry-After": "1"},
        )
    return json_response({"status": "ready"})


async def warm_up(context: ServerContext) -> None:
    """Lets every tier answer once, so that no client pays for what is done at the first time; then /ready is 200.

    Should that fail, requests are taken all the same, but /ready says why they, too, may fail.
    """
    engine = context.engine
    length = max(min(_WARM_UP_PROMPT, engine.model.max_model_len - _WARM_UP_TOKENS), 1)
    params = SamplingParams(max_tokens=_WARM_UP_TOKENS, temperature=0, ignore_eos=True)
    try:
        for tier in engine.model.tiers:
            await _answer_once(context, Job([0] * length, params, tier.depth))
    except (EngineDeadError, ShuttingDownError):
        return  # /ready says so itself
    except Exception as error:
        context.warm_up_failure = str(error) or type(error).__name__
        logger.error("warming up failed: %s", context.warm_up_failure)
    try:
        await asyncio.to_thread(compiler_for(engine.model).prepare)
    except Exception as error:  # requests without a grammar do not mind
        logger.warning("structured output cannot be had: %s", error)
    context.warm = True


async def _answer_once(context: ServerContext, job: Job) -> None:
    """Lets the engine do a job, when clients leave room for it. Raises what it raises, ApiError for a failed answer."""
    while True:
        try:
            answers = await context.engine.submit([job])
            break
        except OverloadedError:
            await asyncio.sleep(_SECONDS_BETWEEN_TRIES)
    try:
        while batch := await answers.next():
            for _, output in batch:
                if output.finish_reason == "error":
                    why = str(output.failure) if output.failure is not None else "the log has the details"
                    raise ApiError(500, f"an answer at depth {job.depth} failed; {why}")
    finally:
        answers.close()
