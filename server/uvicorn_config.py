"""How uvicorn serves the application."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import cast

import uvicorn
from fastapi import FastAPI

from sleb.server.options import ServeOptions
from sleb.server.shutdown import SECONDS_TO_FLUSH
from sleb.server.wire import BoundedProtocol, WireLimits

_SECONDS_IDLE = 75  # before an unused connection is closed: longer than clients keep theirs
_BACKLOG = 2048


def uvicorn_config(
    app: FastAPI, options: ServeOptions, count: Callable[[int], int] | None = None
) -> uvicorn.Config:
    """How uvicorn serves `app`. count: see `WireLimits`."""
    limits = WireLimits(options.read_timeout, options.write_timeout, options.max_connections, count)
    config = uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", partial(BoundedProtocol, limits)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        # Whoever can write into a folder of this machine is believed who the client is, as 127.0.0.1 is.
        forwarded_allow_ips="*" if options.uds else None,
        timeout_keep_alive=_SECONDS_IDLE,
        timeout_graceful_shutdown=SECONDS_TO_FLUSH,
    )
    config.load()
    # uvicorn's own would ask for passwords, and come after the model is loaded
    config.ssl = options.ssl_context
    return config
