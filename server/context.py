"""What every endpoint of one server shares."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from sleb.errors import ConfigError, RequestError
from sleb.server.answer.token_text import TokenTexts
from sleb.server.engine_thread.async_engine import AsyncEngine
from sleb.server.engine_thread.metrics import ServerMetrics

if TYPE_CHECKING:
    from sleb.engine.engine import Engine
    from sleb.engine.requests.tier import Tier
    from sleb.server.bench_result import BenchResult

_MAX_NAME = 200  # characters of a model's name that an error repeats


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
        log_format: text | json. log_level: debug | info | warning | error.
        request_timeout: seconds after which a request ends with an error; None: never.
        cors_origins: of web pages that may call the API from a browser; "*": all.
        served_model_names: other names of the model; each tier has one of its own for each.
        bench_results: where speedups, and perplexities that the layer map lacks, are taken from.
        warm_up: whether every tier answers once before /ready says that it is.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_queue: int = 1024
    drain_timeout: float = 30.0
    max_body_bytes: int = 32 * 2**20
    keep_alive_seconds: float = 15.0
    log_interval: float = 10.0
    log_format: str = "text"
    log_level: str = "info"
    request_timeout: float | None = None
    cors_origins: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    bench_results: tuple[BenchResult, ...] = ()
    warm_up: bool = False


@dataclass
class ServerContext:
    """The engine, the options and what is remembered between requests.

    names: every name that a request may give, in the order in which they are listed: ids, then aliases.
    """

    engine: AsyncEngine
    options: ServerOptions
    token_texts: TokenTexts
    names: dict[str, Tier]
    metrics: ServerMetrics
    created: int = field(default_factory=lambda: int(time.time()))
    unknown_fields: Counter[str] = field(default_factory=Counter)
    warm: bool = True

    @classmethod
    def create(cls, engine: Engine, options: ServerOptions, max_num_seqs: int) -> ServerContext:
        """A context for an engine that computes `max_num_seqs` requests at once; its thread is not started.

        Raises ConfigError for an alias that another tier has already.
        """
        behind_loop = AsyncEngine(engine, max_num_seqs + options.max_queue)
        unknown_fields: Counter[str] = Counter()
        return cls(
            engine=behind_loop,
            options=options,
            token_texts=TokenTexts(engine.tokenizer),
            names=name_tiers(engine, options.served_model_names),
            metrics=ServerMetrics(behind_loop, unknown_fields),
            unknown_fields=unknown_fields,
            warm=not options.warm_up,
        )

    def tier(self, name: str | None) -> Tier:
        """The tier that a request's `model` names, whatever its case. Raises RequestError model_not_found."""
        if name is None:
            return self.engine.engine.default_tier
        for known, tier in self.names.items():
            if known.lower() == name.lower():
                return tier
        shown = name if len(name) <= _MAX_NAME else name[:_MAX_NAME] + "..."
        raise RequestError(
            f"the model '{shown}' does not exist; served models: {', '.join(self.names)}",
            param="model",
            code="model_not_found",
        )


def name_tiers(engine: Engine, aliases: tuple[str, ...]) -> dict[str, Tier]:
    """Tiers by id, then by alias: `alias:sleb-k` is depth k, `alias` the full model, or without it the default tier.

    Raises ConfigError for an alias by which another tier is known.
    """
    names = {tier.id: tier for tier in engine.tiers}
    full = next((tier for tier in engine.tiers if tier.depth == 0), engine.default_tier)
    for alias in aliases:
        deeper = {f"{alias}:sleb-{tier.depth}": tier for tier in engine.tiers if tier.depth}
        for name, tier in {alias: full, **deeper}.items():
            known = {each.lower(): other for each, other in names.items()}.get(name.lower())
            if known is None:
                names[name] = tier
            elif known != tier:
                raise ConfigError(
                    f"--served-model-name '{alias}' would name depth {tier.depth} {name}, which is depth "
                    f"{known.depth} already; choose another name"
                )
    return names


def get_context(request: Request) -> ServerContext:
    """The context of the server that got `request`."""
    context: ServerContext = request.app.state.context
    return context
