"""The web application: routes, errors, and the life of the engine's thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from sleb.server.api import chat, completions, docs, health, models, tokenize
from sleb.server.api import chat_page as page
from sleb.server.context import ServerContext
from sleb.server.errors import install_handlers
from sleb.server.middleware import ApiKeys, Gate
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

    # FastAPI's own pages come from a CDN, which a server without a network does not have: see sleb.server.api.docs.
    app = FastAPI(
        title="sleb",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.context = context
    modules = (chat, completions, models, tokenize, health, docs, page)
    routers = [module.router for module in modules]
    for router in routers:
        app.include_router(router)
    install_handlers(app)
    routes = [route for router in routers for route in router.routes]
    docs.install(app)
    keys = ApiKeys(context.options.api_keys)
    app.add_middleware(Gate, keys=keys, routes=routes, metrics=context.metrics)
    if context.options.cors_origins:  # outermost: a browser asks first, without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=context.options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Server-Timing", "Retry-After"),
        )
    return app


async def log_throughput(context: ServerContext) -> None:
    """A line every `log_interval` seconds in which something was computed."""
    engine, interval = context.engine, context.options.log_interval
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
            logger.info(
                "prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, KV cache %.1f %%, "
                "prefix hits %.1f %%",
                *facts.values(),
                extra={"facts": facts},
            )
