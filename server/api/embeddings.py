"""POST /v1/embeddings: refused, in words that name the reason."""

from __future__ import annotations

from fastapi import APIRouter, Response

from sleb.server.errors import ApiError
from sleb.server.routing import Route, errors

router = APIRouter(route_class=Route)


@router.post("/v1/embeddings", status_code=501, responses=errors(501))
async def embeddings() -> Response:
    """Not what this server does: 501."""
    raise ApiError(
        501,
        "this server generates text and makes no embeddings; send them to a server with an embedding model",
        code="unsupported",
    )
