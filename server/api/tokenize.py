"""POST /tokenize and /detokenize, GET /tokenizer_info: vLLM's shapes, by which lm-eval does without a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from fastapi import APIRouter, Body, Request, Response
from typing_extensions import TypedDict

from sleb.errors import RequestError
from sleb.server.answer_models import Count
from sleb.server.context import ServerContext, get_context
from sleb.server.errors import json_response
from sleb.server.message.incoming import normalise_messages
from sleb.server.protocol import DetokenizeBody, TokenizeBody
from sleb.server.routing import Route, errors, success
from sleb.server.text_threads import run

if TYPE_CHECKING:
    from tokenizers import Tokenizer

router = APIRouter(route_class=Route)

_QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}]}
_TOKENS = {"tokens": [3, 1, 2]}
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokens(TypedDict):
    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | None


class Prompt(TypedDict):
    prompt: str


class AddedToken(TypedDict):
    content: str
    lstrip: bool
    normalized: bool
    rstrip: bool
    single_word: bool
    special: bool


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    model_max_length: Count
    vocab_size: Count
    added_tokens_decoder: dict[str, AddedToken]
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    sep_token: str | None
    cls_token: str | None
    mask_token: str | None
    chat_template: NotRequired[str]


@router.post(
    "/tokenize",
    response_model=Tokens,
    responses=success(
        links={"text": {"operationId": "detokenize", "requestBody": {"tokens": "$response.body#/tokens"}}}
    )
    | errors(400, 404, 413),
)
async def tokenize(
    request: Request, body: Annotated[TokenizeBody, Body(openapi_examples={"question": {"value": _QUESTION}})]
) -> Response:
    """Token ids of a prompt, or of a conversation by the model's chat template."""
    context = get_context(request)
    context.tier(body.model)
    tokens = await run(lambda: _tokens(context, body), request.state.num_bytes)
    answer = {
        "count": len(tokens),
        "max_model_len": context.engine.model.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = list(map(_tokenizer(context).id_to_token, tokens))
    return json_response(answer)


@router.post(
    "/detokenize",
    operation_id="detokenize",
    response_model=Prompt,
    responses=success() | errors(400, 404, 413),
)
async def detokenize(
    request: Request, body: Annotated[DetokenizeBody, Body(openapi_examples={"three": {"value": _TOKENS}})]
) -> Response:
    """The text of token ids, special ones included."""
    context = get_context(request)
    context.tier(body.model)
    tokenizer = _tokenizer(context)
    size = tokenizer.get_vocab_size()
    for token_id in body.tokens:
        if token_id >= size:
            raise RequestError(
                f"{token_id} in tokens is not a token id; ids go from 0 to {size - 1}", param="tokens"
            )
    # A batch of one, because `decode` holds the interpreter's lock.
    [text] = await run(
        lambda: tokenizer.decode_batch([body.tokens], skip_special_tokens=False), request.state.num_bytes
    )
    return json_response({"prompt": text})


@router.get("/tokenizer_info", response_model=TokenizerInfo, responses=success() | errors(400))
async def tokenizer_info(request: Request) -> Response:
    """The special tokens, the chat template and what else a client needs who renders prompts by itself."""
    context = get_context(request)
    tokenizer = _tokenizer(context)
    named = context.engine.model.text.named_tokens
    added = tokenizer.get_added_tokens_decoder()
    info: dict[str, Any] = {name: named.get(name) for name in _SPECIAL_NAMES}
    info |= {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what loads every tokenizer.json
        "model_max_length": context.engine.model.max_model_len,
        "vocab_size": tokenizer.get_vocab_size(),
        "added_tokens_decoder": {
            str(token_id): {name: getattr(token, name) for name in AddedToken.__annotations__}
            for token_id, token in added.items()
        },
    }
    template = context.engine.model.text.chat_template
    if template is not None:
        info["chat_template"] = template
    return json_response(info)


def _tokens(context: ServerContext, body: TokenizeBody) -> list[int]:
    served = context.engine.model
    if body.messages is None:
        return served.encode(body.prompt or "", body.add_special_tokens is not False)
    own = {
        "tools": body.tools,
        "add_generation_prompt": body.add_generation_prompt is not False,
        "continue_final_message": bool(body.continue_final_message),
        "variables": body.chat_template_kwargs or {},
    }
    template = served.chat_template_for(bool(body.tools))
    return served.render_chat(normalise_messages(body.messages, template), **own)


def _tokenizer(context: ServerContext) -> Tokenizer:
    tokenizer = context.engine.model.tokenizer
    if tokenizer is None:
        raise RequestError("this model has no tokenizer; send and read token ids")
    return tokenizer
