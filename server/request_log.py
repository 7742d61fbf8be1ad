"""The log's line of a request: one each, for people or as facts."""

from __future__ import annotations

import logging

from starlette.types import Scope

from sleb.fields import shown_text
from sleb.server.exchange import Exchange

logger = logging.getLogger("sleb.server")

CLIENT_GONE = 499  # nginx's word for a client that did not wait
_MAX_PATH, _MAX_CLIENT = 200, 64  # characters


def log_request(
    scope: Scope,
    identifier: str,
    status: int,
    seconds: float,
    exchange: Exchange,
    *,
    trace: str | None,
    quiet: bool,
) -> None:
    """Writes the line of a request that is over.

    trace: the id of its OpenTelemetry trace. quiet: it is of interest to whoever looks for faults of this server only.
    Neither the query nor a key is told.
    """
    client = scope.get("client")
    facts = {
        "request": identifier,
        "method": scope["method"],
        "path": shown_text(scope["path"][:_MAX_PATH]),
        "status": status,
        "code": None if exchange.failure == str(status) else exchange.failure,
        "ms": round(seconds * 1e3, 3),
        "client": shown_text(client[0][:_MAX_CLIENT]) if client else "unknown",  # a proxy may have told it
        "key": exchange.key,
        "trace": trace,
        **exchange.answer,
    }
    text = "request %(request)s: %(method)s %(path)s %(status)d"
    text += " %(code)s" if facts["code"] else ""
    text += " in %(ms).0f ms, from %(client)s"
    text += ", key %(key)s" if facts["key"] else ""
    text += ", trace %(trace)s" if trace else ""
    if exchange.answer:
        text += (
            ", model %(model)s, prompt %(prompt_tokens)d tokens (%(cached_tokens)d cached), generated "
            "%(generated_tokens)d, first token "
        )
        text += "none" if facts["first_token_ms"] is None else "%(first_token_ms).0f ms"
        text += ", %(tokens_per_second).1f tokens/s, %(reason)s"
    failed = status >= 400 or exchange.failure is not None  # the latter alone: within a stream
    level = logging.DEBUG if quiet else logging.WARNING if failed and status != CLIENT_GONE else logging.INFO
    logger.log(level, text, facts, extra={"facts": facts})
