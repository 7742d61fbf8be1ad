"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Body, Request, Response
from pydantic import Json
from typing_extensions import TypedDict

from sleb.engine.outputs import TokenLogprobs
from sleb.engine.requests.detokenizer import NUM_CONTEXT_TOKENS
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import RequestError
from sleb.server.answer.choices_writer import ChoicesWriter
from sleb.server.answer.generation import Generation, Prompt
from sleb.server.answer.logprobs import completion_logprobs
from sleb.server.answer.token_text import TextOffsets
from sleb.server.answer.writer import Piece
from sleb.server.answer_models import Answer, Choice, Error, FinishReason, PromptLogprobs, Usage
from sleb.server.context import ServerContext, get_context
from sleb.server.grammar.structured import answer_grammar
from sleb.server.grammar.token_rules import grammar_source
from sleb.server.protocol import MAX_PROMPTS, CompletionBody, whole_numbers
from sleb.server.routing import GENERATION_ERRORS, MODEL_LINK, Route, errors, success
from sleb.server.text_threads import run

router = APIRouter(route_class=Route)

_SHAPES = "a string, a list of strings, a list of token ids or a list of lists of token ids"
_EXAMPLE = {"prompt": "The capital of France is", "max_tokens": 8}


class CompletionLogprobs(TypedDict):
    """Null for the first token of a prompt, which nothing comes before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: NotRequired[PromptLogprobs]
    finish_reason: FinishReason


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionEvent(TypedDict):
    data: Literal["[DONE]"] | Json[CompletionChunk | Error]


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses=success(CompletionEvent, MODEL_LINK) | errors(*GENERATION_ERRORS),
)
async def create_completion(
    request: Request, body: Annotated[CompletionBody, Body(openapi_examples={"prompt": {"value": _EXAMPLE}})]
) -> Response:
    """Continuations of prompts, or with `echo` and `max_tokens` 0 only their log-probabilities."""
    context = get_context(request)
    context.engine.check()
    selection = context.select(body.model, fixed=body.depth == "fixed")
    fields = body.sampling() | {"logprobs": body.logprobs}
    asked = [
        number
        for number in (body.prompt_logprobs, body.logprobs if body.echo else None)
        if number is not None
    ]
    fields["prompt_logprobs"] = max(asked, default=None)
    fields["grammar"] = await grammar_source(
        context.engine, body.allowed_token_ids, body.bad_words, answer_grammar(body)
    )
    params = SamplingParams(**fields)
    prompts = await _encode(context, body, request.state.num_bytes)
    prompts = [
        prompt.cut(body.truncate_prompt_tokens, params.max_tokens, context.engine.model.max_model_len)
        for prompt in prompts
    ]
    generation = Generation(context, request.state.request_id, selection, prompts, params)
    return await CompletionWriter(context, generation, body).answer(request)


def split_prompts(prompt: Any) -> list[str] | list[list[int]]:
    """Any of the four shapes of `prompt` as a list of prompts. Raises RequestError for any other."""
    if prompt is None:
        raise RequestError("'prompt' is missing", param="prompt")
    prompts: Any = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts:
        raise RequestError(f"'prompt' must be {_SHAPES}, and not empty", param="prompt")
    try:
        prompts = [whole_numbers(each) for each in whole_numbers(prompts)]
    except ValueError as error:
        raise RequestError(f"bad token id in 'prompt': {error}", param="prompt") from None
    if _is_token_ids(prompts):
        prompts = [prompts]
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"there are {len(prompts)} prompts; send at most {MAX_PROMPTS}", param="prompt")
    are_strings = all(isinstance(each, str) for each in prompts)
    if not are_strings and not all(_is_token_ids(each) for each in prompts):
        raise RequestError(f"'prompt' must be {_SHAPES}, not a mixture", param="prompt")
    return prompts  # type: ignore[no-any-return]


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


async def _encode(context: ServerContext, body: CompletionBody, num_bytes: int) -> list[Prompt]:
    encode = context.engine.model.encode_prompt

    def work() -> list[Prompt]:
        return [
            Prompt(encode(prompt, body.add_special_tokens), prompt)
            if isinstance(prompt, str)
            else Prompt(prompt)
            for prompt in split_prompts(body.prompt)
        ]

    return await run(work, num_bytes)


class CompletionWriter(ChoicesWriter):
    """Choices with text; `echo` puts the prompt before it."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"
    choices_have_prompt_logprobs = True
    body: CompletionBody

    def __init__(self, context: ServerContext, generation: Generation, body: CompletionBody) -> None:
        super().__init__(context, generation, body)
        self._offsets: dict[int, TextOffsets] = {}

    def _shown(self, piece: Piece) -> tuple[str, dict[str, list[Any] | None] | None]:
        """The text of a piece and its log-probabilities, with those of the prompt if it is told too."""
        prompt_ids, text, prompt_text = list[int](), piece.text, ""
        logprobs: list[TokenLogprobs | None] = list(piece.logprobs or [])
        if piece.is_first and self.body.echo:
            prompt = self.generation.prompt_of(piece.choice)
            prompt_ids, prompt_text = prompt.token_ids, self._prompt_text(prompt)
            text = prompt_text + text
            logprobs = list(piece.prompt_logprobs or [None] * len(prompt_ids)) + logprobs
        if self.body.logprobs is None:
            return text, None
        if piece.is_first:
            self._offsets[piece.choice] = self._begin_offsets(piece.choice)
        places = self._offsets[piece.choice]
        offsets = places.align(prompt_ids, prompt_text) if prompt_ids else []
        offsets += places.push(piece.token_ids)
        shown_ids, texts = prompt_ids + piece.token_ids, self.context.token_texts
        return text, completion_logprobs(shown_ids, logprobs, self.body.logprobs, texts, offsets)

    def _prompt_text(self, prompt: Prompt) -> str:
        tokenizer = self.context.engine.model.tokenizer
        if prompt.text is not None or tokenizer is None:
            return prompt.text or ""
        return str(tokenizer.decode(prompt.token_ids, skip_special_tokens=False))

    def _begin_offsets(self, choice: int) -> TextOffsets:
        texts, context = self.context.token_texts, self.generation.prompt_of(choice).token_ids
        begins = self.body.skip_special_tokens and all(map(texts.is_special, context[-NUM_CONTEXT_TOKENS:]))
        return TextOffsets(texts, skip_special=self.body.skip_special_tokens, begins=begins)

    @property
    def tells_logprobs(self) -> bool:
        return self.body.logprobs is not None

    def chunk_choices(self, piece: Piece) -> list[dict[str, Any]]:
        empty = {"index": piece.choice, "text": "", "logprobs": None, "finish_reason": None}
        choices: list[dict[str, Any]] = []
        with_ids = self.body.return_token_ids
        text, logprobs = self._shown(piece)
        if text or (logprobs is not None and logprobs["tokens"]) or with_ids:
            choices.append(empty | {"text": text, "logprobs": logprobs})
            if with_ids:
                choices[-1]["token_ids"] = piece.token_ids
            if with_ids and piece.is_first:
                choices[-1]["prompt_token_ids"] = self.generation.prompt_of(piece.choice).token_ids
        if piece.finish_reason is not None:
            choices.append(empty | {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason})
        return choices

    def content(self, piece: Piece) -> dict[str, Any]:
        text, logprobs = self._shown(piece)
        return {"text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
