"""Whether the server lives and whether it takes requests: without a key, for whoever watches it."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from typing_extensions import TypedDict

from sleb.server.context import get_context
from sleb.server.errors import ApiError, ShuttingDownError, json_response
from sleb.server.routing import OpenRoute, errors, success

router = APIRouter(route_class=OpenRoute)


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
    if context.engine.leaving:
        raise ShuttingDownError
    if context.engine.warm_up_failure is not None:
        raise ApiError(
            503,
            f"the server could not warm up: {context.engine.warm_up_failure}",
            type="server_error",
            code="warm_up_failed",
        )
    if not context.engine.warm:
        raise ApiError(
            503,
            "the server is warming up",
            type="server_error",
            code="warming_up",
            headers={"Retry-After": "1"},
        )
    return json_response({"status": "ready"})
