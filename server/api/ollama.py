"""Ollama's paths below /api: chat and generate, what is served, and what this server does not do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import RequestError
from sleb.server.answer.converse import Begun, begin
from sleb.server.answer.generation import Generation, Prompt
from sleb.server.answer.ollama_writer import ChatWriter, GenerateWriter, error_body, now
from sleb.server.answer_models import Count
from sleb.server.context import ServerContext, get_context
from sleb.server.conversation import Conversation
from sleb.server.errors import ApiError, json_response, shorten
from sleb.server.grammar.grammar_spec import GrammarSpec
from sleb.server.grammar.structured import json_grammar
from sleb.server.grammar.token_rules import grammar_source
from sleb.server.message.incoming import MAX_MESSAGES
from sleb.server.message.parser import MarkedParser, MessageShape
from sleb.server.message.thinking import can_think, thinking_variables
from sleb.server.message.tools import MAX_TOOLS, Tool, make_tool_use
from sleb.server.protocol import (
    WHOLE,
    FalseByDefault,
    FixedDepth,
    SamplingBody,
    TrueByDefault,
    in_range,
    num_alternatives,
    refuse_of_chat,
)
from sleb.server.protocol import (
    Body as RequestBody,
)
from sleb.server.routing import GENERATION_ERRORS, Route, errors, success
from sleb.server.text_threads import run

_LATEST = ":latest"  # what its clients put behind a name without a tag
_QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "stream": False}
_PROMPT = {"prompt": "What is the capital of Japan?", "options": {"num_predict": 64}, "stream": False}


class OllamaRoute(Route):
    """A route with errors in Ollama's shape."""

    @classmethod
    def error_body(cls, error: ApiError, request_id: str) -> dict[str, Any]:
        return error_body(error)


class OllamaError(TypedDict):
    """Every error of Ollama's paths, whatever its status."""

    error: str


def _no_images(value: Any) -> Any:
    if value:
        raise PydanticCustomError("images", "this model reads text only: leave them out")
    return value


Images = Annotated[
    Annotated[list[str], Field(max_length=0)] | None,
    BeforeValidator(_no_images, json_schema_input_type=Annotated[list[str], Field(max_length=0)] | None),
]
Think = bool | Literal["low", "medium", "high", "max"] | None
Format = Annotated[
    Literal["", "json"] | dict[str, Any] | None, Field(description="json: any object; or a JSON schema.")
]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class OllamaCalledFunction(_Part):
    name: str
    arguments: dict[str, Any] | None = None


class OllamaEarlierCall(_Part):
    id: str | None = None
    function: OllamaCalledFunction


class OllamaMessageParam(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Images = None
    tool_calls: list[OllamaEarlierCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def as_message(self) -> dict[str, Any]:
        """The same as chat completions have it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function"} | call.model_dump(exclude_none=True) for call in self.tool_calls
            ]
        if self.tool_name is not None:
            message["name"] = self.tool_name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class OllamaOptions(SamplingBody):
    """What of Ollama's options shapes an answer; those about loading are passed over."""

    max_tokens: Annotated[
        int | None, Field(ge=-2, le=2**63 - 1, description="-1 and -2: to the end of the context."), WHOLE
    ] = None

    @classmethod
    def prepare(cls, fields: dict[str, Any]) -> dict[str, Any]:
        refuse_of_chat(fields, cls.model_fields)
        return super().prepare(fields)


class _GenerationFields(RequestBody):
    """What /api/chat and /api/generate share."""

    model: str | None = None
    depth: FixedDepth = None
    stream: TrueByDefault = True
    format: Format = None
    options: OllamaOptions | None = None
    think: Think = None
    logprobs: FalseByDefault = False
    top_logprobs: Annotated[int | None, in_range("logprobs"), WHOLE] = None
    keep_alive: float | str | None = Field(None, description="Changes nothing: a model stays loaded.")

    @classmethod
    def prepare(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields that are none of the body's are read as its options."""
        own = {name: value for name, value in fields.items() if name in cls.model_fields}
        options = own.get("options")
        if options is None or isinstance(options, dict):
            others = {name: value for name, value in fields.items() if name not in own}
            own["options"] = OllamaOptions.prepare(others | (options or {}))
        return own

    def unknown_names(self) -> Iterator[str]:
        if self.options is not None:
            yield from self.options.unknown_names()

    def check(self) -> None:
        num_alternatives(self.logprobs, self.top_logprobs)

    @property
    def num_top(self) -> int | None:
        """Alternatives told with each token; None: no log-probabilities."""
        return num_alternatives(self.logprobs, self.top_logprobs)

    def sampling(self) -> dict[str, Any]:
        """The fields of SamplingParams that were given."""
        given = self.options.sampling() if self.options is not None else {}
        return given | {"max_tokens": -1} if given.get("max_tokens") == -2 else given

    def grammar(self) -> GrammarSpec | None:
        """Of the answer. Raises RequestError for a schema that is none."""
        if self.format in (None, ""):
            return None
        return json_grammar(None if self.format == "json" else self.format, "format")

    def converse(
        self, messages: list[dict[str, Any]], model: str | None, template: str | None, **more: Any
    ) -> Conversation:
        """The conversation that is asked for. template: the model's, whose variables say whether it thinks."""
        if self.think not in (None, False) and not can_think(template):
            raise RequestError(f"{shorten(self.model)} does not support thinking", param="think")
        think = None if self.think is None else self.think is not False
        return Conversation(
            messages=messages,
            model=model,
            stream=self.stream,
            sampling=self.sampling(),
            answer=self.grammar(),
            template_variables=thinking_variables(
                template, think, self.think if isinstance(self.think, str) else None
            ),
            num_logprobs=self.num_top,
            fixed_depth=self.depth == "fixed",
            **more,
        )


class OllamaChatBody(_GenerationFields):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessageParam], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = (
        None
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None


class OllamaGenerateBody(_GenerationFields):
    """POST /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: FalseByDefault = False
    images: Images = None


class OllamaFigures(TypedDict, total=False):
    done_reason: Literal["stop", "length", "load"]
    total_duration: Count
    load_duration: Count
    prompt_eval_count: Count
    prompt_eval_duration: Count
    eval_count: Count
    eval_duration: Count


class OllamaTokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]
    top_logprobs: NotRequired[list[dict[str, Any]]]


class OllamaFunction(TypedDict):
    index: Count
    name: str
    arguments: dict[str, Any]


class OllamaCall(TypedDict):
    function: OllamaFunction


class OllamaMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[OllamaCall]]


class OllamaChatAnswer(OllamaFigures):
    """Durations are in nanoseconds."""

    model: str
    created_at: str
    message: OllamaMessage
    done: bool
    logprobs: NotRequired[list[OllamaTokenLogprob]]


class OllamaGenerateAnswer(OllamaFigures):
    """Durations are in nanoseconds."""

    model: str
    created_at: str
    response: str
    thinking: NotRequired[str]
    done: bool
    logprobs: NotRequired[list[OllamaTokenLogprob]]


router = APIRouter(route_class=OllamaRoute)

_NDJSON = "application/x-ndjson"
_LINES = "lines of JSON, the last of them with the figures"


@router.post(
    "/api/chat",
    response_model=OllamaChatAnswer,
    responses=success(OllamaChatAnswer, media_type=_NDJSON, stream=_LINES)
    | errors(*GENERATION_ERRORS, model=OllamaError),
)
async def chat(
    request: Request,
    body: Annotated[OllamaChatBody, Body(openapi_examples={"question": {"value": _QUESTION}})],
) -> Response:
    """An answer to a conversation, in Ollama's shape; without messages, whether the model is loaded."""
    context = get_context(request)
    model = find_model(context, body.model)
    if not body.messages:
        return _loaded(context, body.model, {"message": {"role": "assistant", "content": ""}})
    tools = make_tool_use([tool.function for tool in body.tools or ()], None, True)
    template = context.engine.model.chat_template_for(tools is not None)
    messages = [message.as_message() for message in body.messages]
    begun = await begin(request, body.converse(messages, model, template, tools=tools))
    return await ChatWriter(begun, body.stream, body.model, body.num_top).answer(request)


@router.post(
    "/api/generate",
    response_model=OllamaGenerateAnswer,
    responses=success(OllamaGenerateAnswer, media_type=_NDJSON, stream=_LINES)
    | errors(*GENERATION_ERRORS, model=OllamaError),
)
async def generate(
    request: Request,
    body: Annotated[OllamaGenerateBody, Body(openapi_examples={"question": {"value": _PROMPT}})],
) -> Response:
    """An answer to a prompt, in Ollama's shape; without one, whether the model is loaded."""
    context = get_context(request)
    model = find_model(context, body.model)
    if not body.prompt:
        return _loaded(context, body.model, {"response": ""})
    template = context.engine.model.chat_template_for(False)
    if body.raw:
        begun = await _begin_raw(request, body, body.prompt, model)
    else:
        said = [("system", body.system), ("user", body.prompt)]
        messages = [{"role": role, "content": text} for role, text in said if text]
        begun = await begin(request, body.converse(messages, model, template))
    return await GenerateWriter(begun, body.stream, body.model, body.num_top).answer(request)


async def _begin_raw(request: Request, body: OllamaGenerateBody, text: str, model: str | None) -> Begun:
    """A prompt that no template is put around."""
    context = get_context(request)
    context.engine.check()
    for name, value in (("system", body.system), ("think", body.think)):
        if value:
            raise RequestError(
                f"a raw prompt has no template, and so no place for {name}: leave it out", param=name
            )
    served, selection = context.engine.model, context.select(model, fixed=body.depth == "fixed")
    sampling = {"max_tokens": None} | body.sampling() | {"logprobs": body.num_top}
    SamplingParams(**sampling)  # a value out of range is told before anything is computed
    prompt = Prompt(await run(lambda: served.encode_prompt(text), request.state.num_bytes), text)
    grammar = await grammar_source(context.engine, None, None, body.grammar())
    params = SamplingParams(**sampling, grammar=grammar)
    generation = Generation(context, request.state.request_id, selection, [prompt], params)
    return Begun(context, generation, MessageShape(lambda: MarkedParser(None, None)))


def find_model(context: ServerContext, asked: str | None) -> str | None:
    """The name by which a model is served that was asked for with a tag or without.

    Raises RequestError model_not_found, in the words by which Ollama's clients know it.
    """
    if asked is None:
        return None
    for name in (asked, asked.removesuffix(_LATEST)):
        try:
            context.tier(name)
        except RequestError:
            continue
        return name
    raise RequestError(
        f"model '{shorten(asked)[1:-1]}' not found; served models: {', '.join(context.listed)}",
        param="model",
        code="model_not_found",
    )


def _loaded(context: ServerContext, model: str | None, empty: dict[str, Any]) -> Response:
    context.engine.check()
    head = {"model": model or context.tier(None).id, "created_at": now()}
    return json_response(head | empty | {"done": True, "done_reason": "load"})
