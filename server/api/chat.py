"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field, Json
from typing_extensions import TypedDict

from sleb.server.answer.chat_writer import ChatWriter
from sleb.server.answer.generation import Generation, Prompt
from sleb.server.answer_models import Answer, Choice, Count, Error, FinishReason, PromptLogprobs, Usage
from sleb.server.context import ServerContext, get_context
from sleb.server.grammar.grammar_spec import GrammarSpec
from sleb.server.grammar.structured import answer_grammar
from sleb.server.grammar.token_rules import grammar_source
from sleb.server.json_input import num_characters
from sleb.server.message.incoming import normalise_messages
from sleb.server.message.parser import MessageParser, MessageShape
from sleb.server.message.reasoning import END_THINK, THINK, ReasoningParser
from sleb.server.message.special_tokens import special_token_id, thought_rules
from sleb.server.message.tool_parser import MARKS, ToolParser
from sleb.server.message.tool_prompt import offer_in_text
from sleb.server.message.tools import ToolUse, call_format, knows_tools, read_tools
from sleb.server.protocol import ChatBody
from sleb.server.routing import GENERATION_ERRORS, MODEL_LINK, Route, errors, success
from sleb.server.text_threads import run

if TYPE_CHECKING:
    from tokenizers import Tokenizer

router = APIRouter(route_class=Route)

_NUM_LAST_TOKENS = 16  # of a prompt, in which a mark and the line ends after it have room
_EXAMPLE = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 64,
}


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChosenLogprob] | None
    refusal: None


class FunctionCall(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[Annotated[list[ToolCall], Field(min_length=1)]]
    function_call: NotRequired[FunctionCall]


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: NotRequired[PromptLogprobs]
    usage: Usage


class FunctionCallPart(TypedDict, total=False):
    name: str
    arguments: str


class ToolCallPart(TypedDict):
    index: Count
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallPart


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: Annotated[list[ToolCallPart], Field(min_length=1)]
    function_call: FunctionCallPart


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class ChatCompletionEvent(TypedDict):
    data: Literal["[DONE]"] | Json[ChatCompletionChunk | Error]


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=success(ChatCompletionEvent, MODEL_LINK) | errors(*GENERATION_ERRORS),
)
async def create_chat_completion(
    request: Request, body: Annotated[ChatBody, Body(openapi_examples={"question": {"value": _EXAMPLE}})]
) -> Response:
    """An answer to a conversation, by the model's own chat template."""
    context = get_context(request)
    context.engine.check()
    tier = context.tier(body.model)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    special: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": num_logprobs}
    special["prompt_logprobs"] = body.prompt_logprobs
    body.sampling_params(**special)  # a value out of range is told before anything is computed
    tools, answer = read_tools(body), answer_grammar(body)
    prompt = Prompt(await _render(context, body, tools, request.state.num_bytes)).cut(
        body.truncate_prompt_tokens, max_tokens, context.engine.engine.max_model_len
    )
    reading = _Reading(context, body, tools, prompt)
    special["grammar"] = await grammar_source(context.engine.engine, body, reading.grammar(answer))
    special["shown_special_ids"] = reading.shown_special_ids
    params = body.sampling_params(**special)
    generation = Generation(context, request.state.request_id, tier, [prompt], params)
    shape = MessageShape(reading.make_parser, legacy=tools is not None and tools.legacy)
    return await ChatWriter(context, generation, body, shape).answer(request)


class _Reading:
    """How the answer to a request is read, which depends on the model: its template, its tokens, its prompt."""

    def __init__(self, context: ServerContext, body: ChatBody, tools: ToolUse | None, prompt: Prompt) -> None:
        engine = context.engine.engine
        self._tools = tools
        self._template = engine.chat_template_for(tools is not None)
        self._tokenizer = engine.tokenizer
        self._thought_open = _opens_thought(body, prompt, self._tokenizer)
        known = self._tokenizer is not None and self._tokenizer.token_to_id(THINK) is not None
        self._thinks = self._thought_open or known or THINK in (self._template or "")

    @property
    def shown_special_ids(self) -> list[int]:
        """The marks that the answer is read by and that a decoder would leave out as special tokens."""
        marks = [THINK, END_THINK] if self._thinks else []
        if self._tools is not None:
            marks += MARKS
        found = (special_token_id(mark, self._tokenizer) for mark in marks)
        return [token_id for token_id in found if token_id is not None]

    def grammar(self, answer: GrammarSpec | None) -> GrammarSpec | None:
        """That of the calls, if there must be some, or of the answer, which may also be calls; after any thoughts."""
        spec, tools = answer, self._tools
        if tools is not None and (tools.must_call or answer is not None):
            calls = tools.grammar(call_format(self._template), self._tokenizer)
            spec = calls if answer is None or tools.must_call else calls.or_else(answer)
        if spec is None or not self._thought_open:
            return spec
        return spec.after(thought_rules(self._tokenizer))

    def make_parser(self) -> MessageParser:
        """A parser for one choice."""
        reasoning = ReasoningParser(self._thought_open) if self._thinks else None
        tools = self._tools
        if tools is None:
            return MessageParser(reasoning, None)
        parser = ToolParser(tools.names, tools.schemas, live=tools.must_call, single=not tools.parallel)
        return MessageParser(reasoning, parser)


def _opens_thought(body: ChatBody, prompt: Prompt, tokenizer: Tokenizer | None) -> bool:
    """Whether the prompt ends inside of thoughts."""
    if tokenizer is None:
        return False
    if body.continue_final_message:
        content = str(body.messages[-1].get("content") or "")
        return content.rfind(THINK) > content.rfind(END_THINK)
    end = tokenizer.decode(prompt.token_ids[-_NUM_LAST_TOKENS:], skip_special_tokens=False)
    return str(end).rstrip().endswith(THINK)


async def _render(context: ServerContext, body: ChatBody, tools: ToolUse | None, num_bytes: int) -> list[int]:
    return await run(lambda: _render_now(context, body, tools, num_bytes), num_bytes)


def _render_now(context: ServerContext, body: ChatBody, tools: ToolUse | None, num_bytes: int) -> list[int]:
    template = context.engine.engine.chat_template_for(tools is not None)
    messages = normalise_messages(body.messages, template)
    options: dict[str, Any] = {
        "add_generation_prompt": body.add_generation_prompt is not False,
        "continue_final_message": body.continue_final_message,
        "variables": body.chat_template_kwargs or {},
    }
    if not knows_tools(template):
        messages = offer_in_text(messages, [] if tools is None else tools.tools)
    elif tools is not None:
        options["tools"] = tools.tools
    if num_bytes > context.max_characters:  # they may be escapes and names
        context.check_length(num_characters([messages, options]))
    return context.engine.engine.render_chat(messages, **options)
