"""OpenTelemetry: a span for each request, by FastAPI's own support, sent where the OTEL_ variables say.

Needs the extra `otel`. Without such a variable nothing is recorded, and a request costs nothing more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from sleb.server.exchange import Exchange

logger = logging.getLogger("sleb.server")

_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NEEDED = ("fastapi.telemetry", "opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
# Fact of the log -> attribute, as the semantic conventions for generative AI have it.
_ATTRIBUTES = {
    "model": "gen_ai.response.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "generated_tokens": "gen_ai.usage.output_tokens",
}


def settings(leaves_out: Callable[[Any], bool]) -> dict[str, Any]:
    """An argument of FastAPI, which older ones pass over: spans of requests, since /metrics and the log have the rest.

    leaves_out: whether a request, by its ASGI scope, gets none.
    """
    asked = next((name for name in _VARIABLES if os.environ.get(name)), None)
    try:
        for module in _NEEDED if asked else ():
            import_module(module)
    except ImportError:
        logger.warning('%s is set, but no traces are sent: pip install "sleb[otel]"', asked)
        asked = None
    wanted = {"auto_configure": asked is not None, "metrics": False, "logs": False, "operation_spans": False}
    return {"telemetry": wanted | {"exclude": leaves_out}}


def current_span() -> Any:
    """The span of the present request, None if none is recorded."""
    try:
        from opentelemetry.trace import get_current_span
    except ImportError:  # an older FastAPI comes without it
        return None
    span = get_current_span()
    return span if span.is_recording() else None


def trace_id(span: Any) -> str | None:
    """As collectors show it."""
    return None if span is None else format(span.get_span_context().trace_id, "032x")


def describe(span: Any, request_id: str, exchange: Exchange) -> None:
    """What is known of a request whose answer is over, onto its span, if that has not ended."""
    if span is None or not span.is_recording():
        return
    answer: Mapping[str, Any] = exchange.answer
    known = {name: answer.get(fact) for fact, name in _ATTRIBUTES.items()}
    if (first := answer.get("first_token_ms")) is not None:
        known["gen_ai.latency.time_to_first_token"] = first / 1e3  # vLLM's name
    if "reason" in answer:
        known["gen_ai.response.finish_reasons"] = answer["reason"].split("+")
    known |= {"sleb.request_id": request_id, "sleb.api_key": exchange.key, "sleb.error": exchange.failure}
    span.set_attributes({name: value for name, value in known.items() if value is not None})
