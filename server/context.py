"""What every endpoint of one server shares."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from sleb.engine.encoding import longest_token
from sleb.errors import RequestError
from sleb.server.answer.token_text import TokenTexts
from sleb.server.bench_result import BenchResult
from sleb.server.body_reader import BodyReader
from sleb.server.engine_thread.async_engine import AsyncEngine
from sleb.server.engine_thread.handle import EngineHandle
from sleb.server.engine_thread.metrics import ServerMetrics
from sleb.server.errors import shorten
from sleb.server.names import name_tiers
from sleb.server.options import ServeOptions
from sleb.server.responses.shared import LocalResponses, Responses
from sleb.server.responses.store import ResponseStore

if TYPE_CHECKING:
    from sleb.engine.engine import Engine
    from sleb.engine.requests.tier import Tier

_LEAST_MAX_BODY = 4 * 2**20  # bytes
_BYTES_PER_TOKEN = 16  # escapes of JSON included


@dataclass
class ServerContext:
    """The engine, the options and what is remembered between requests.

    names: every name that a request may give, in the order in which they are listed: see `name_tiers`.
    responses: what /v1/responses keeps.
    max_characters: of a prompt; a longer one cannot fit the context, whatever its tokens are.
    results: what was measured of the model, the operator's files first.
    """

    engine: EngineHandle
    options: ServeOptions
    token_texts: TokenTexts
    names: dict[str, Tier]
    metrics: ServerMetrics
    bodies: BodyReader
    max_characters: int
    responses: Responses
    results: tuple[BenchResult, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def create(cls, engine: Engine, options: ServeOptions, max_num_seqs: int) -> ServerContext:
        """A context for an engine that computes `max_num_seqs` requests at once; its thread is not started.

        Raises ConfigError for a name of a depth that is not served, or that another tier has already.
        """
        handle = AsyncEngine(
            engine,
            max_num_seqs + options.max_queue,
            stream_interval=options.stream_interval,
            warm_up=options.warm_up,
            log_interval=options.log_interval,
        )
        store = ResponseStore(int(options.response_store_mb * 2**20), options.response_store_seconds)
        return cls.of(handle, options, LocalResponses(store))

    @classmethod
    def of(cls, engine: EngineHandle, options: ServeOptions, responses: Responses) -> ServerContext:
        """A context for whatever stands for the engine. Raises as `create` does."""
        model = engine.model
        # Room for any prompt that fits the context.
        max_body_bytes = options.max_body_bytes or max(
            _LEAST_MAX_BODY, _BYTES_PER_TOKEN * model.max_model_len
        )
        names = [key.name for key in options.keys if key.name]
        return cls(
            engine=engine,
            options=options,
            token_texts=TokenTexts(model.tokenizer),
            names=name_tiers(model.tiers, model.default_tier, options.names),
            metrics=ServerMetrics(model, options.metrics_prefix, names),
            bodies=BodyReader(max_body_bytes, options.read_timeout),
            max_characters=model.max_model_len * longest_token(model.tokenizer),
            responses=responses,
            results=(*options.results, *map(BenchResult.load, map(str, model.shipped_results))),
        )

    @property
    def unknown_fields(self) -> Counter[str]:
        """How often each field came that no request has."""
        return self.metrics.counts.unknown_fields

    def check_length(self, num_characters: int) -> None:
        """Raises RequestError context_length_exceeded for a conversation that has too many tokens in any case."""
        if num_characters > self.max_characters:
            most = self.engine.model.max_model_len
            least = num_characters * most // self.max_characters if self.max_characters else num_characters
            raise RequestError(
                f"the prompt has {least} tokens or more, but the context holds {most} tokens of prompt and answer "
                "together; shorten the prompt",
                param="messages",
                code="context_length_exceeded",
            )

    def tier(self, name: str | None) -> Tier:
        """The tier that a request's `model` names, whatever its case. Raises RequestError model_not_found."""
        if name is None:
            return self.engine.model.default_tier
        lower = name.lower()  # once: it may be megabytes
        for known, tier in self.names.items():
            if known.lower() == lower:
                return tier
        raise RequestError(
            f"the model {shorten(name)} does not exist; served models: {', '.join(self.names)}",
            param="model",
            code="model_not_found",
        )

    def name_of(self, tier: Tier, asked: str | None) -> str:
        """What an answer of `tier` says of its model: what was asked, as it was written, else the tier's id."""
        return tier.id if asked is None else asked


def get_context(request: Request) -> ServerContext:
    """The context of the server that got `request`."""
    context: ServerContext = request.app.state.context
    return context
