"""Whether the server lives, whether it takes requests, and what it is."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

import sleb
from sleb.server.context import get_context
from sleb.server.errors import json_response

router = APIRouter()


@router.get("/health")
@router.get("/v1/health")
async def health(request: Request) -> Response:
    """200 while the engine lives, also while the server drains; 503 engine_dead when it does not."""
    engine = get_context(request).engine
    if engine.dead is not None:
        raise engine.dead
    return json_response({"status": "draining" if engine.draining else "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while new requests are taken, else the 503 that they would get."""
    get_context(request).engine.check()
    return json_response({"status": "ready"})


@router.get("/version")
async def version() -> Response:
    """The version of sleb."""
    return json_response({"version": sleb.__version__})


@router.get("/")
async def index(request: Request) -> Response:
    """A pointer to the API."""
    tier = get_context(request).engine.engine.default_tier
    return json_response({"server": "sleb", "model": tier.id, "models": "/v1/models", "health": "/health"})
