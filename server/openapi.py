"""What /openapi.json says beyond the routes themselves: bodies, answers, headers and errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sleb.server.answer_schemas import answer_schemas
from sleb.server.body_schemas import body_schemas
from sleb.server.schema_terms import TEXT, Schema, reference

if TYPE_CHECKING:
    from sleb.server.context import ServerContext


@dataclass(frozen=True)
class Operation:
    """A documented endpoint: the schemas of its answer and its body, and the errors that it has of its own."""

    answer: str
    body: str | None = None
    errors: tuple[int, ...] = ()
    streams: bool = False
    media_type: str = "application/json"
    example: dict[str, Any] | None = None


_GENERATION_ERRORS = (400, 404, 413, 500, 503, 504)
_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
OPERATIONS = {
    "/v1/chat/completions": Operation(
        "ChatCompletion",
        "ChatBody",
        _GENERATION_ERRORS,
        streams=True,
        example={"messages": _QUESTION, "max_tokens": 64},
    ),
    "/v1/completions": Operation(
        "Completion",
        "CompletionBody",
        _GENERATION_ERRORS,
        streams=True,
        example={"prompt": "The capital of France is", "max_tokens": 8},
    ),
    "/v1/embeddings": Operation("Error", errors=(501,)),
    "/v1/models": Operation("ModelList"),
    "/v1/models/{model_id}": Operation("Model", errors=(404,)),
    "/tokenize": Operation("Tokens", "TokenizeBody", (400, 404, 413), example={"messages": _QUESTION}),
    "/detokenize": Operation("Prompt", "DetokenizeBody", (400, 404, 413), example={"tokens": [3, 1, 2]}),
    "/tokenizer_info": Operation("TokenizerInfo", errors=(400,)),
    "/health": Operation("Status", errors=(503,)),
    "/ready": Operation("Status", errors=(503,)),
    "/version": Operation("Version"),
    "/metrics": Operation("Metrics", media_type="text/plain"),
}
OPEN_PATHS = ("/health", "/ready")
_ERROR_TEXTS = {
    400: "A field is wrong (`param` names it), or the prompt does not fit (`context_length_exceeded`).",
    401: "Keys are configured and the request bears none of them: `invalid_api_key`.",
    404: "`model_not_found`; the message lists the models that exist.",
    413: "The body is too large.",
    500: "The engine could not finish this answer.",
    501: "Not what this server does: `unsupported`.",
    503: "`overloaded`, `warming_up`, `shutting_down` or `engine_dead`; Retry-After says when to come back.",
    504: "The request took longer than the server allows: `timeout`.",
}
_HEADERS: dict[str, Schema] = {
    "X-Request-Id": {
        "description": "The request's own, or a new one.",
        "schema": {"type": "string", "minLength": 1},
    },
    "Server-Timing": {"description": "Milliseconds of each phase.", "schema": TEXT},
}
_ERROR_HEADERS: dict[int, dict[str, Schema]] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    503: {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}},
}


def complete(document: dict[str, Any], context: ServerContext) -> dict[str, Any]:
    """The framework's document, which knows paths and parameters only, with everything else in it."""
    engine = context.engine.engine
    vocab_size = engine.spec.vocab_size
    tokenizer_size = vocab_size if engine.tokenizer is None else engine.tokenizer.get_vocab_size()
    schemas = answer_schemas() | body_schemas(vocab_size, tokenizer_size)
    has_keys = bool(context.options.api_keys)
    for path, methods in document["paths"].items():
        operation = OPERATIONS.get(path)
        for described in methods.values():
            if operation is not None:
                _describe(described, operation)
            if has_keys and path not in OPEN_PATHS:
                described["security"] = [{"key": []}]
                described["responses"]["401"] = _error(401)
    _link(document["paths"])
    document["components"] = {"schemas": dict(sorted(schemas.items()))}
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _describe(described: dict[str, Any], operation: Operation) -> None:
    if operation.body is not None:
        content: dict[str, Any] = {"schema": reference(operation.body)}
        if operation.example is not None:
            content["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    answers: dict[str, Any] = {operation.media_type: {"schema": reference(operation.answer)}}
    text = "The answer."
    if operation.streams:
        text = (
            "The answer; with `stream`, events whose data are chunks, and a last one whose data are [DONE]."
        )
        # The keyword of OpenAPI 3.2; 3.1 has none for the items of a stream.
        answers["text/event-stream"] = {"itemSchema": reference(f"{operation.answer}Event")}
    described["responses"] = {"200": {"description": text, "headers": _HEADERS, "content": answers}}
    if operation.answer == "Error":
        described["responses"] = {}
    described["responses"] |= {str(status): _error(status) for status in operation.errors}


def _error(status: int) -> dict[str, Any]:
    return {
        "description": _ERROR_TEXTS[status],
        "headers": _HEADERS | _ERROR_HEADERS.get(status, {}),
        "content": {"application/json": {"schema": reference("Error")}},
    }


def _link(paths: dict[str, Any]) -> None:
    """What one answer is good for in the next request."""
    get_model = paths["/v1/models/{model_id}"]["get"]["operationId"]
    one_model = {"operationId": get_model, "parameters": {"model_id": "$response.body#/data/0/id"}}
    paths["/v1/models"]["get"]["responses"]["200"]["links"] = {"model": one_model}
    for path in ("/v1/chat/completions", "/v1/completions"):
        link = {"operationId": get_model, "parameters": {"model_id": "$response.body#/model"}}
        paths[path]["post"]["responses"]["200"]["links"] = {"model": link}
    detokenize = paths["/detokenize"]["post"]["operationId"]
    body = {"tokens": "$response.body#/tokens"}
    paths["/tokenize"]["post"]["responses"]["200"]["links"] = {
        "text": {"operationId": detokenize, "requestBody": body}
    }
