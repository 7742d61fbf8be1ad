"""What /openapi.json says beyond the routes themselves: bodies, answers and errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sleb.server.protocol import ChatBody, CompletionBody
from sleb.server.tokenize import DetokenizeBody, TokenizeBody

REFERENCE = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Operation:
    """A documented endpoint: its body, the schema of its answer, and the errors that it has of its own."""

    answer: str
    body: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    streams: bool = False
    media_type: str = "application/json"


_GENERATION_ERRORS = (400, 404, 413, 500, 503, 504)
OPERATIONS = {
    "/v1/chat/completions": Operation("ChatCompletion", ChatBody, _GENERATION_ERRORS, streams=True),
    "/v1/completions": Operation("Completion", CompletionBody, _GENERATION_ERRORS, streams=True),
    "/v1/embeddings": Operation("Error", None, (501,)),
    "/v1/models": Operation("ModelList"),
    "/v1/models/{model_id}": Operation("Model", None, (404,)),
    "/tokenize": Operation("Tokens", TokenizeBody, (400, 404, 413)),
    "/detokenize": Operation("Prompt", DetokenizeBody, (400, 404, 413)),
    "/tokenizer_info": Operation("TokenizerInfo", None, (400,)),
    "/health": Operation("Status", None, (503,)),
    "/ready": Operation("Status", None, (503,)),
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


def _object(
    required: dict[str, Any], optional: dict[str, Any] | None = None, text: str = ""
) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
    }
    return schema | ({"description": text} if text else {})


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=name)}


_TEXT, _INTEGER, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_MAYBE_TEXT = {"type": ["string", "null"]}
_ANY_OBJECT: dict[str, Any] = {"type": ["object", "null"]}
_FINISH = {"type": ["string", "null"], "description": "stop, length or tool_calls; null while it goes on."}


def _answer(kind: str, choice: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    required = {
        "id": _TEXT,
        "object": {"const": kind},
        "created": _INTEGER,
        "model": _TEXT,
        "system_fingerprint": _MAYBE_TEXT,
        "choices": _list(choice),
    }
    speed = {
        "timings": _object({}, None, "llama.cpp's fields, in milliseconds and tokens a second."),
        "metrics": _object(
            {}, None, "arrival_time, time_in_queue, time_to_first_token, generation_time (seconds)"
        ),
    }
    return _object(required | usage, speed)


def _choice(content: dict[str, Any]) -> dict[str, Any]:
    return _object({"index": _INTEGER, **content, "logprobs": _ANY_OBJECT, "finish_reason": _FINISH})


_MESSAGE = _object({"role": {"const": "assistant"}, "content": _MAYBE_TEXT, "refusal": _MAYBE_TEXT})
_DELTA = _object({}, {"role": _TEXT, "content": _MAYBE_TEXT})
_USAGE = {"usage": _reference("Usage")}
_MAYBE_USAGE = {"usage": {"anyOf": [_reference("Usage"), {"type": "null"}]}}


def answer_schemas() -> dict[str, dict[str, Any]]:
    """Schemas of what is answered, by name."""
    completion = _answer("text_completion", _choice({"text": _TEXT}), _USAGE)
    completion_chunk = _answer("text_completion", _choice({"text": _TEXT}), {})
    chat_chunk = _answer("chat.completion.chunk", _choice({"delta": _DELTA}), {})
    for chunk in (completion_chunk, chat_chunk):
        chunk["properties"] |= _MAYBE_USAGE
    cached = _object({"cached_tokens": _INTEGER})
    error = {"message": _TEXT, "type": _TEXT, "param": _MAYBE_TEXT, "code": _MAYBE_TEXT}
    model = {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _INTEGER,
        "owned_by": _TEXT,
        "root": _TEXT,
        "parent": _MAYBE_TEXT,
        "max_model_len": _INTEGER,
        "pruning": _reference("Pruning"),
    }
    return {
        "ChatCompletion": _answer("chat.completion", _choice({"message": _MESSAGE}), _USAGE),
        "ChatCompletionChunk": chat_chunk,
        "Completion": completion,
        "CompletionChunk": completion_chunk,
        "Error": _object({"error": _object(error)}, None, "Every error, whatever its status."),
        "Metrics": _TEXT | {"description": "Prometheus' text format."},
        "Model": _object(model),
        "ModelList": _object({"object": {"const": "list"}, "data": _list(_reference("Model"))}),
        "Prompt": _object({"prompt": _TEXT}),
        "Pruning": _object(
            {
                "depth": _INTEGER,
                "num_blocks": _INTEGER,
                "blocks_kept": _INTEGER,
                "units_removed": _list(_TEXT),
                "weight_bytes": _INTEGER,
                "kv_bytes_per_token": _INTEGER,
                "perplexity": _ANY_OBJECT,
                "speedup": _ANY_OBJECT,
            },
            None,
            "perplexity: dense, pruned, dataset. speedup: value, test, batch, device. Null where not measured.",
        ),
        "Status": _object({"status": _TEXT}),
        "TokenizerInfo": _object({"tokenizer_class": _TEXT, "eos_token": _MAYBE_TEXT}),
        "Tokens": _object(
            {"count": _INTEGER, "max_model_len": _INTEGER, "tokens": _list(_INTEGER)},
            {"token_strs": {"type": ["array", "null"], "items": _TEXT}},
        ),
        "Usage": _object(
            {
                "prompt_tokens": _INTEGER,
                "completion_tokens": _INTEGER,
                "total_tokens": _INTEGER,
                "prompt_tokens_details": cached,
            }
        ),
        "Version": _object({"version": _TEXT}),
    }


def complete(document: dict[str, Any], has_keys: bool) -> dict[str, Any]:
    """The framework's document, which knows paths and parameters only, with everything else in it."""
    schemas = answer_schemas()
    for path, methods in document["paths"].items():
        operation = OPERATIONS.get(path)
        for described in methods.values():
            if operation is not None:
                _describe(described, operation, schemas)
            if has_keys and path not in OPEN_PATHS:
                described["security"] = [{"key": []}]
                described["responses"]["401"] = _error(401)
    document["components"] = {"schemas": dict(sorted(schemas.items()))}
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _describe(described: dict[str, Any], operation: Operation, schemas: dict[str, dict[str, Any]]) -> None:
    if operation.body is not None:
        schema = operation.body.model_json_schema(ref_template=REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[operation.body.__name__] = schema
        content = {"application/json": {"schema": _reference(operation.body.__name__)}}
        described["requestBody"] = {"required": True, "content": content}
    answers: dict[str, Any] = {operation.media_type: {"schema": _reference(operation.answer)}}
    text = "The answer."
    if operation.streams:
        text = (
            "The answer; with `stream`, events whose data are chunks, and a last one whose data are [DONE]."
        )
        answers["text/event-stream"] = {"schema": _reference(f"{operation.answer}Chunk")}
    described["responses"] = {"200": {"description": text, "content": answers}}
    if operation.answer == "Error":
        described["responses"] = {}
    described["responses"] |= {str(status): _error(status) for status in operation.errors}


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference("Error")}}
    return {"description": _ERROR_TEXTS[status], "content": content}
