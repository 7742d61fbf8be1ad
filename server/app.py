"""The web application: routes, errors, and the life of the engine's thread."""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from sleb.server import api, traces
from sleb.server.api import docs, health
from sleb.server.browsers import Callers
from sleb.server.context import ServerContext
from sleb.server.errors import install_handlers
from sleb.server.keys import ApiKeys
from sleb.server.middleware import Gate, find_route
from sleb.server.routing import Route, errors
from sleb.version import __version__

logger = logging.getLogger("sleb.server")


def create_app(context: ServerContext) -> FastAPI:
    """The application; it starts the engine's thread when it is started, and ends it when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        context.engine.start()
        tasks = [asyncio.create_task(log_throughput(context))]
        if not context.warm:
            tasks.append(asyncio.create_task(health.warm_up(context)))
        yield
        for task in tasks:
            task.cancel()
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
            expose_headers=("X-Request-Id", "Server-Timing", "X-Stop-Reason", "Retry-After"),
        )
    return app


def find_routers() -> list[APIRouter]:
    """The `router` of every module of sleb.server.api: a new endpoint is a new file there."""
    names = sorted(module.name for module in pkgutil.iter_modules(api.__path__))
    return [importlib.import_module(f"{api.__name__}.{name}").router for name in names]


async def log_throughput(context: ServerContext) -> None:
    """A line every `log_interval` seconds in which something was computed, but for the tokens of warming up."""
    engine, interval = context.engine, context.options.log_interval
    while not context.warm:
        await asyncio.sleep(min(interval, 0.2))
    before = engine.stats
    while True:
        await asyncio.sleep(interval)
        now = engine.stats
        num_prompt = now.num_prompt_tokens - before.num_prompt_tokens
        num_cached = now.num_cached_tokens - before.num_cached_tokens
        num_output = now.num_output_tokens - before.num_output_tokens
        before = now
        if num_prompt or num_output or now.num_running:
            facts = {
                "prompt_tokens_per_second": (num_prompt - num_cached) / interval,
                "generated_tokens_per_second": num_output / interval,
                "running": now.num_running,
                "waiting": now.num_waiting,
                "kv_cache_percent": now.kv_cache_usage * 100,
                "prefix_hit_percent": num_cached / num_prompt * 100 if num_prompt else 0.0,
            }
            progress = ""
            if now.num_to_prefill:  # a long prompt may take longer than a line
                progress = f", {now.num_prefilled} of {now.num_to_prefill} prompt tokens computed"
            logger.info(
                "prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, KV cache %.1f %%, "
                "prefix hits %.1f %%%s",
                *facts.values(),
                progress,
                extra={"facts": facts | {"prefilled": now.num_prefilled, "to_prefill": now.num_to_prefill}},
            )
