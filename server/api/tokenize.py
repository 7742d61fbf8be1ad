"""POST /tokenize and /detokenize, GET /tokenizer_info: vLLM's shapes, by which lm-eval does without a tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sleb.errors import RequestError
from sleb.server.answer.generation import LARGE_TEXT
from sleb.server.context import ServerContext, get_context
from sleb.server.errors import json_response, shorten
from sleb.server.message.incoming import normalise_messages
from sleb.server.protocol import Integers, read_body

if TYPE_CHECKING:
    from tokenizers import Tokenizer

router = APIRouter()

MAX_TOKENS = 2**20
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

Body = TypeVar("Body", bound=BaseModel)
T = TypeVar("T")


class TokenizeBody(BaseModel):
    """POST /tokenize: either `prompt` or `messages`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = Field(
        None, description="True unless given, for a prompt; a chat template brings its own."
    )
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = Field(None, description="True unless given; for messages.")
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    tokens: Annotated[Integers, Field(max_length=MAX_TOKENS)]


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of a conversation by the model's chat template."""
    context = get_context(request)
    data = await read_body(request, context.options.max_body_bytes)
    body = _parse(data, TokenizeBody)
    context.tier(body.model)
    tokens = await _run(lambda: _tokens(context, body), len(data))
    answer = {
        "count": len(tokens),
        "max_model_len": context.engine.engine.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = list(map(_tokenizer(context).id_to_token, tokens))
    return json_response(answer)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids, special ones included."""
    context = get_context(request)
    data = await read_body(request, context.options.max_body_bytes)
    body = _parse(data, DetokenizeBody)
    context.tier(body.model)
    tokenizer = _tokenizer(context)
    size = tokenizer.get_vocab_size()
    for token_id in body.tokens:
        if not 0 <= token_id < size:
            raise RequestError(
                f"{token_id} in tokens is not a token id; ids go from 0 to {size - 1}", param="tokens"
            )
    text = await _run(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False), len(data))
    return json_response({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """The special tokens, the chat template and what else a client needs who renders prompts by itself."""
    context = get_context(request)
    tokenizer = _tokenizer(context)
    named = context.engine.engine.text.named_tokens
    added = tokenizer.get_added_tokens_decoder()
    info: dict[str, Any] = {name: named.get(name) for name in _SPECIAL_NAMES}
    info |= {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what loads every tokenizer.json
        "model_max_length": context.engine.engine.max_model_len,
        "vocab_size": tokenizer.get_vocab_size(),
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in added.items()
        },
    }
    template = context.engine.engine.text.chat_template
    if template is not None:
        info["chat_template"] = template
    return json_response(info)


def _tokens(context: ServerContext, body: TokenizeBody) -> list[int]:
    engine = context.engine.engine
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either 'prompt' or 'messages'", param="prompt")
    if body.messages is None:
        return engine.encode(body.prompt or "", body.add_special_tokens is not False)
    if body.add_special_tokens:
        raise RequestError(
            "add_special_tokens is for prompts; the chat template writes those of messages: leave it out",
            param="add_special_tokens",
        )
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other; leave one out",
            param="continue_final_message",
        )
    own = {
        "tools": body.tools,
        "add_generation_prompt": body.add_generation_prompt is not False,
        "continue_final_message": bool(body.continue_final_message),
    }
    given = body.chat_template_kwargs or {}
    for name in ("messages", *own):
        if name in given:
            raise RequestError(
                f"'{name}' cannot be given in chat_template_kwargs; it is a field of the request",
                param="chat_template_kwargs",
            )
    return engine.render_chat(normalise_messages(body.messages), **given, **own)


def _tokenizer(context: ServerContext) -> Tokenizer:
    tokenizer = context.engine.engine.tokenizer
    if tokenizer is None:
        raise RequestError("this model has no tokenizer; send and read token ids")
    return tokenizer


async def _run(work: Callable[[], T], num_bytes: int) -> T:
    """The result of `work`, off the event loop when it may take long."""
    return work() if num_bytes < LARGE_TEXT else await asyncio.to_thread(work)


def _parse(data: bytes, model: type[Body]) -> Body:
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name, value = str(first["loc"][0]), first["input"]
        if first["type"] == "missing":
            raise RequestError(f"'{name}' is missing", param=name) from None
        shown = "" if isinstance(value, list | dict) else f" {shorten(value)}"
        raise RequestError(f"bad value{shown} for '{name}': {first['msg']}", param=name) from None
