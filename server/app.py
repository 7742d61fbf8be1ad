"""The web application: routes, errors, and the life of the engine's thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import sleb
from sleb.server import chat, completions, health, models
from sleb.server.context import ServerContext
from sleb.server.errors import install_handlers
from sleb.server.middleware import ApiKeys, Gate

logger = logging.getLogger("sleb.server")


def create_app(context: ServerContext) -> FastAPI:
    """The application; it starts the engine's thread when it is started, and ends it when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        context.engine.start()
        log = asyncio.create_task(log_throughput(context))
        yield
        log.cancel()
        await context.engine.stop()

    # The pages of /docs come from a CDN, which a server without a network does not have.
    app = FastAPI(
        title="sleb",
        version=sleb.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.context = context
    routers = [chat.router, completions.router, models.router, health.router]
    for router in routers:
        app.include_router(router)
    install_handlers(app)
    routes = [route for router in routers for route in router.routes]
    app.add_middleware(Gate, keys=ApiKeys(context.options.api_keys), routes=routes)
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
            logger.info(
                "prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, KV cache %.1f %%, "
                "prefix hits %.1f %%",
                (num_prompt - num_cached) / interval,
                num_output / interval,
                now.num_running,
                now.num_waiting,
                now.kv_cache_usage * 100,
                num_cached / num_prompt * 100 if num_prompt else 0.0,
            )
