"""What every endpoint of one server shares."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from sleb.engine.encoding import longest_token
from sleb.errors import ConfigError, RequestError
from sleb.server.answer.token_text import TokenTexts
from sleb.server.bench_result import BenchResult, perplexity_increase
from sleb.server.body_reader import BodyReader
from sleb.server.engine_thread.async_engine import AsyncEngine
from sleb.server.engine_thread.handle import EngineHandle
from sleb.server.engine_thread.metrics import ServerMetrics
from sleb.server.errors import shorten
from sleb.server.names import AutoModel, auto_name, name_tiers
from sleb.server.options import ServeOptions
from sleb.server.responses.shared import LocalResponses, Responses
from sleb.server.responses.store import ResponseStore

if TYPE_CHECKING:
    from sleb.engine.engine import Engine
    from sleb.engine.requests.tier import Tier

_LEAST_MAX_BODY = 4 * 2**20  # bytes
_BYTES_PER_TOKEN = 16  # escapes of JSON included


@dataclass(frozen=True)
class Selection:
    """What answers a request.

    tier: if the server chooses, the shallowest that it may. model: what the answer says of its model: what was asked,
    as it was written, else the tier's id.
    """

    tier: Tier
    model: str
    is_auto: bool = False


@dataclass
class ServerContext:
    """The engine, the options and what is remembered between requests.

    names: every name that a request may give, in the order in which they are listed: see `name_tiers`.
    responses: what /v1/responses keeps.
    max_characters: of a prompt; a longer one cannot fit the context, whatever its tokens are.
    results: what was measured of the model, the operator's files first.
    auto: the model whose depth the server chooses, if there is one.
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
    auto: AutoModel | None = None
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
        context = cls.of(handle, options, LocalResponses(store))
        if context.auto is not None:
            handle.choose_depths(context.auto.policy, context.auto.depths)
        return context

    @classmethod
    def of(cls, engine: EngineHandle, options: ServeOptions, responses: Responses) -> ServerContext:
        """A context for whatever stands for the engine. Raises as `create` does."""
        model = engine.model
        # Room for any prompt that fits the context.
        max_body_bytes = options.max_body_bytes or max(
            _LEAST_MAX_BODY, _BYTES_PER_TOKEN * model.max_model_len
        )
        keys = [key.name for key in options.keys if key.name]
        names = name_tiers(model.tiers, model.default_tier, options.names)
        results = (*options.results, *map(BenchResult.load, map(str, model.shipped_results)))
        auto: AutoModel | None = None
        if (policy := options.depth_policy) is not None:
            name = auto_name(policy, model.model_name, names)
            increases = {
                depth: perplexity_increase(model.layer_map, results, depth) for depth in policy.depths
            }
            auto = AutoModel(name, policy, policy.allowed(increases))
            if not auto.depths:
                raise ConfigError(
                    f"--auto begins with depth {policy.depths[0]}, which is past max-perplexity, or not measured; "
                    "begin with depth 0"
                )
        return cls(
            engine=engine,
            options=options,
            token_texts=TokenTexts(model.tokenizer),
            names=names,
            metrics=ServerMetrics(model, options.metrics_prefix, keys),
            bodies=BodyReader(max_body_bytes, options.read_timeout),
            max_characters=model.max_model_len * longest_token(model.tokenizer),
            responses=responses,
            results=results,
            auto=auto,
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
        if self.auto is not None and lower == self.auto.name.lower():
            return self.engine.model.tier(self.auto.depths[0])
        for known, tier in self.names.items():
            if known.lower() == lower:
                return tier
        raise RequestError(
            f"the model {shorten(name)} does not exist; served models: {', '.join(self.listed)}",
            param="model",
            code="model_not_found",
        )

    @property
    def listed(self) -> list[str]:
        """Every name that a request may give."""
        return [*self.names, *([] if self.auto is None else [self.auto.name])]

    def select(self, name: str | None, *, fixed: bool = False) -> Selection:
        """What a request asks for by its `model`. Raises RequestError model_not_found.

        fixed: whether the depth shall be the shallowest even where the server might choose.
        """
        tier = self.tier(name)
        if name is None or self.auto is None or name.lower() != self.auto.name.lower():
            return Selection(tier, tier.id if name is None else name)
        return Selection(tier, tier.id, is_auto=not fixed)


def get_context(request: Request) -> ServerContext:
    """The context of the server that got `request`."""
    context: ServerContext = request.app.state.context
    return context
