"""GET /metrics and /version: what the server has counted, and what it is."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from typing_extensions import TypedDict

from sleb.server.context import get_context
from sleb.server.errors import json_response
from sleb.server.routing import Route, success
from sleb.version import __version__

router = APIRouter(route_class=Route)
_TEXT = {"text/plain": {"schema": {"type": "string"}}}


class Version(TypedDict):
    version: str


@router.get("/version", response_model=Version, responses=success())
async def version() -> Response:
    """The version of sleb."""
    return json_response({"version": __version__})


# A Response of no type: FastAPI would take that of the text for the errors' too.
@router.get("/metrics", response_class=Response, responses={200: success()[200] | {"content": _TEXT}})
async def metrics(request: Request) -> Response:
    """Counters and histograms in Prometheus' text format.

    Not in OpenMetrics', whatever the request accepts: prometheus-client would write underscores for our colons there.
    """
    context = get_context(request)
    text = context.metrics.text(await context.engine.scrape())
    return Response(text, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
