"""What every endpoint of one server shares."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from sleb.server.async_engine import AsyncEngine
from sleb.server.token_text import TokenTexts

if TYPE_CHECKING:
    from sleb.engine.engine import Engine
    from sleb.engine.request import Tier


@dataclass(frozen=True)
class ServerOptions:
    """Options of the HTTP side.

    Attributes:
        api_keys: any of them opens the guarded endpoints; none: everybody may.
        max_queue: requests that may wait beyond those computed at once.
        drain_timeout: seconds that open requests get to finish when the server is told to stop.
        max_body_bytes: of one request.
        keep_alive_seconds: of silence in a stream before a comment says that it lives.
        log_interval: seconds between lines about throughput, while there is any.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_queue: int = 1024
    drain_timeout: float = 30.0
    max_body_bytes: int = 32 * 2**20
    keep_alive_seconds: float = 15.0
    log_interval: float = 10.0


@dataclass
class ServerContext:
    """The engine, the options and what is remembered between requests."""

    engine: AsyncEngine
    options: ServerOptions
    token_texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))
    unknown_fields: set[str] = field(default_factory=set)

    @classmethod
    def create(cls, engine: Engine, options: ServerOptions, max_num_seqs: int) -> ServerContext:
        """A context for an engine that computes `max_num_seqs` requests at once; its thread is not started."""
        return cls(
            AsyncEngine(engine, max_num_seqs + options.max_queue), options, TokenTexts(engine.tokenizer)
        )

    def tier(self, name: str | None) -> Tier:
        """The tier that a request's `model` names, whatever its case. Raises RequestError model_not_found."""
        engine = self.engine.engine
        if name is not None:
            for tier in engine.tiers:
                if tier.id == name.lower():
                    return tier
        return engine.tier(name)


def get_context(request: Request) -> ServerContext:
    """The context of the server that got `request`."""
    context: ServerContext = request.app.state.context
    return context
