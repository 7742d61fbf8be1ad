"""GET /metrics and /version: what the server has counted, and what it is."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from typing_extensions import TypedDict

from sleb.server.context import get_context
from sleb.server.errors import json_response
from sleb.server.routing import Route, success
from sleb.version import __version__

router = APIRouter(route_class=Route)


class Version(TypedDict):
    version: str


@router.get("/version", response_model=Version, responses=success())
async def version() -> Response:
    """The version of sleb."""
    return json_response({"version": __version__})


@router.get("/metrics", response_class=PlainTextResponse, responses=success())
async def metrics(request: Request) -> Response:
    """Counters and histograms in Prometheus' text format.

    Not in OpenMetrics', whatever the request accepts: prometheus-client would write underscores for our colons there.
    """
    text = generate_latest(get_context(request).metrics.registry)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
