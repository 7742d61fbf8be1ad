"""The web application: routes and errors."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from sleb.server import api, traces
from sleb.server.api import docs
from sleb.server.browsers import Callers
from sleb.server.context import ServerContext
from sleb.server.errors import install_handlers
from sleb.server.keys import ApiKeys
from sleb.server.middleware import Gate, find_route
from sleb.server.routing import Route, errors
from sleb.version import __version__


def create_app(context: ServerContext) -> FastAPI:
    """The application; it starts the engine when it is started, and stops it when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        context.engine.start()
        yield
        await context.engine.stop()

    routers = find_routers()
    routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
    root = context.options.root

    def is_open(scope: Scope) -> bool:
        """Whether a request is for probes or the page's files."""
        return find_route(scope["path"], routes, root)[1].is_open

    # FastAPI's own pages come from a CDN, which a server without a network does not have: see sleb.server.api.docs.
    app = FastAPI(
        title="sleb",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # it is a route of ours, and so has OPTIONS and metrics as they have
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        **traces.settings(leaves_out=is_open),
    )
    app.state.context = context
    schemes = (  # described only: see ApiKeys
        HTTPBearer(scheme_name="key", auto_error=False),
        APIKeyHeader(name="x-api-key", scheme_name="x-api-key", auto_error=False),
    )
    dependencies = [Security(scheme) for scheme in schemes]
    for router in routers:
        kind, guarded = router.route_class, dict[str, Any]()
        assert issubclass(kind, Route)
        if context.options.keys and not kind.is_open:
            guarded = {"dependencies": dependencies, "responses": errors(401, model=kind.error_model)}
        app.include_router(router, **guarded)
    install_handlers(app)
    docs.install(app, routes)
    keys = ApiKeys(context.options.keys, [route for route in routes if route.is_open])
    callers = Callers(context.options.host, context.options.allowed_hosts, context.options.origins)
    app.add_middleware(Gate, callers=callers, keys=keys, routes=routes, metrics=context.metrics, root=root)
    if context.options.origins:  # outermost: a browser asks first, without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=context.options.origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=(
                "X-Request-Id",
                "Server-Timing",
                "X-Stop-Reason",
                "X-Sleb-Depth",
                "X-Sleb-Degraded",
                "Retry-After",
            ),
        )
    return app


def find_routers() -> list[APIRouter]:
    """The `router` of every module of sleb.server.api: a new endpoint is a new file there."""
    names = sorted(module.name for module in pkgutil.iter_modules(api.__path__))
    return [importlib.import_module(f"{api.__name__}.{name}").router for name in names]
