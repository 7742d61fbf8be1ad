"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from sleb.engine.outputs import StepOutput
from sleb.errors import RequestError
from sleb.server.answers import AnswerWriter, Piece
from sleb.server.context import ServerContext, get_context
from sleb.server.errors import shorten
from sleb.server.generation import LARGE_TEXT, Generation, Prompt
from sleb.server.logprobs import chat_logprobs
from sleb.server.protocol import ChatBody, parse_body, read_body

router = APIRouter()

MAX_MESSAGES = 4096
_OWN_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message")


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """An answer to a conversation, by the model's own chat template."""
    context = get_context(request)
    data = await read_body(request, context.options.max_body_bytes)
    context.engine.check()
    body = parse_body(data, ChatBody, context.unknown_fields)
    tier = context.tier(body.model)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling_params(max_tokens=max_tokens, logprobs=num_logprobs)
    prompt = Prompt(await _render(context, body, len(data)))
    generation = Generation(context, request.state.request_id, tier, [prompt], params)
    return await ChatWriter(context, generation, body).answer(request)


async def _render(context: ServerContext, body: ChatBody, num_bytes: int) -> list[int]:
    messages = normalise_messages(body.messages)
    options = dict(body.chat_template_kwargs or {})
    for name in _OWN_ARGUMENTS:
        if name in options:
            raise RequestError(
                f"'{name}' cannot be given in chat_template_kwargs; it is a field of the request",
                param="chat_template_kwargs",
            )
    options["add_generation_prompt"] = body.add_generation_prompt is not False
    options["continue_final_message"] = body.continue_final_message
    render = context.engine.engine.render_chat
    if num_bytes < LARGE_TEXT:
        return render(messages, **options)
    return await asyncio.to_thread(render, messages, **options)


def normalise_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a string (or None). Raises RequestError for what a text model cannot read."""
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"there are {len(messages)} messages; send 1 to {MAX_MESSAGES}", param="messages")
    return [_normalise(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalise(message: dict[str, Any], where: str) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not 0 < len(role) <= 64:
        raise RequestError(
            f"{where}.role is {shorten(role)}; it must be a name such as 'system', 'user' or 'assistant'",
            param=f"{where}.role",
        )
    if content is None and role != "assistant":
        raise RequestError(f"{where}.content is missing", param=f"{where}.content")
    return message | {"content": _join_parts(content, f"{where}.content")}


def _join_parts(content: Any, where: str) -> str | None:
    """The text of a message; text parts are joined by line ends."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of text parts", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(
                f"{where}[{index}] has type {shorten(kind)}; this model reads text only: send parts of type 'text'",
                param=f"{where}[{index}]",
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{index}].text must be a string", param=f"{where}[{index}].text")
        texts.append(part["text"])
    return "\n".join(texts)


class ChatWriter(AnswerWriter):
    """Choices with messages and deltas."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    body: ChatBody

    def read(self, choice: int, output: StepOutput, is_first: bool) -> Piece:
        logprobs = None
        if self.body.logprobs:
            num_top = self.body.top_logprobs or 0
            logprobs = chat_logprobs(output.new_logprobs or [], num_top, self.context.token_texts)
        return Piece(
            choice=choice,
            text=output.new_text,
            token_ids=list(output.new_token_ids),
            logprobs=logprobs,
            is_first=is_first,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )

    def chunk_choices(self, piece: Piece) -> list[dict[str, Any]]:
        empty = {"index": piece.choice, "delta": {}, "logprobs": None, "finish_reason": None}
        choices: list[dict[str, Any]] = []
        with_ids = self.body.return_token_ids
        if piece.is_first:
            choices.append(empty | {"delta": {"role": "assistant", "content": ""}})
            if with_ids:
                choices[0]["prompt_token_ids"] = self.generation.prompt_of(piece.choice).token_ids
        if piece.text or (piece.token_ids and (with_ids or piece.logprobs is not None)):
            choices.append(empty | {"delta": {"content": piece.text}, "logprobs": piece.logprobs})
            if with_ids:
                choices[-1]["token_ids"] = piece.token_ids
        if piece.finish_reason is not None:
            choices.append(empty | {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason})
        return choices

    def whole_choice(self, piece: Piece) -> dict[str, Any]:
        choice = {
            "index": piece.choice,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = self.generation.prompt_of(piece.choice).token_ids
            choice["token_ids"] = piece.token_ids
        return choice
