"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages, by the types of Anthropic's SDK."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request, Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from sleb.errors import RequestError
from sleb.server.answer.converse import begin, count_tokens
from sleb.server.answer.messages_writer import (
    NO_THREADS,
    MessagesAnswer,
    MessagesError,
    MessagesEvent,
    MessagesWriter,
    error_body,
)
from sleb.server.answer_models import Count
from sleb.server.context import get_context
from sleb.server.conversation import Conversation
from sleb.server.errors import ApiError, json_response, shorten
from sleb.server.grammar.structured import json_grammar
from sleb.server.message.incoming import MAX_MESSAGES
from sleb.server.message.thinking import thinking_variables
from sleb.server.message.tools import (
    MAX_TOOLS,
    Function,
    FunctionName,
    Parameters,
    ToolName,
    ToolUse,
    make_tool_use,
)
from sleb.server.protocol import (
    WHOLE,
    FalseByDefault,
    FixedDepth,
    SamplingBody,
    TemplateArguments,
    described_as,
    in_range,
    refuse_of_chat,
)
from sleb.server.routing import GENERATION_ERRORS, MODEL_LINK, Route, errors, success

_OVERLOADED = 529  # Anthropic's status; its SDKs try again at every one from 500 on
_EXAMPLE = {
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
}
_TOOL_EXAMPLE = {
    "max_tokens": 128,
    "system": "You answer in one sentence.",
    "messages": [
        {"role": "user", "content": "What is the weather in Oslo?"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "-3 °C, snow"}],
        },
    ],
    "tools": [
        {
            "name": "weather",
            "description": "The weather in a city",
            "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
        }
    ],
}


class _Part(BaseModel):
    """A part of a request; what else it has (`cache_control`, `citations`) changes no answer."""

    model_config = ConfigDict(strict=True)


class TextBlockParam(_Part):
    type: Literal["text"]
    text: str


class ThinkingBlockParam(_Part):
    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlockParam(_Part):
    """Is passed over: nobody here can read it."""

    type: Literal["redacted_thinking"]


class ToolUseBlockParam(_Part):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _blocks(*kinds: str) -> Any:
    """Checks the types of blocks in words; a string is one block of text."""

    def check(value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        for number, block in enumerate(value if isinstance(value, list) else ()):
            kind = block.get("type") if isinstance(block, dict) else None
            if kind not in kinds:
                raise PydanticCustomError(
                    "block_type",
                    "block {number} has type {kind}; this model reads text only: blocks here are of type {kinds}",
                    {"number": number, "kind": shorten(kind), "kinds": ", ".join(kinds)},
                )
        return value

    return check


_Texts = Annotated[list[TextBlockParam], Field(fail_fast=True)]
Texts = Annotated[_Texts, BeforeValidator(_blocks("text"), json_schema_input_type=str | _Texts)]


class ToolResultBlockParam(_Part):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None


_UserBlocks = Annotated[
    list[Annotated[TextBlockParam | ToolResultBlockParam, Field(discriminator="type")]], Field(fail_fast=True)
]
_AssistantBlocks = Annotated[
    list[
        Annotated[
            TextBlockParam | ThinkingBlockParam | RedactedThinkingBlockParam | ToolUseBlockParam,
            Field(discriminator="type"),
        ]
    ],
    Field(fail_fast=True),
]


class UserMessageParam(_Part):
    role: Literal["user"]
    content: Annotated[
        _UserBlocks,
        BeforeValidator(_blocks("text", "tool_result"), json_schema_input_type=str | _UserBlocks),
    ]


class AssistantMessageParam(_Part):
    role: Literal["assistant"]
    content: Annotated[
        _AssistantBlocks,
        BeforeValidator(
            _blocks("text", "thinking", "redacted_thinking", "tool_use"),
            json_schema_input_type=str | _AssistantBlocks,
        ),
    ]


class SystemMessageParam(_Part):
    role: Literal["system"]
    content: Texts


MessageParam = Annotated[
    UserMessageParam | AssistantMessageParam | SystemMessageParam, Field(discriminator="role")
]


def _object_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("input_schema", "the schema of an input must be of type 'object'")
    return schema


class CustomToolParam(_Part):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: Annotated[dict[str, Any], AfterValidator(_object_schema), described_as(Parameters)]

    def as_function(self) -> Function:
        """The same as chat completions have it."""
        fields = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return Function.model_validate({name: value for name, value in fields.items() if value is not None})


class ServerToolParam(_Part):
    """One of Anthropic's own, such as web_search_20250305, which is not here: passed over, and named in the log."""

    type: str = Field(json_schema_extra={"not": {"const": "custom"}})


def _tool_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "custom" if kind in (None, "custom") else "server"


ToolParam = Annotated[
    Annotated[CustomToolParam, Tag("custom")] | Annotated[ServerToolParam, Tag("server")],
    Discriminator(_tool_tag),
]


class ToolChoiceParam(_Part):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedToolChoiceParam(_Part):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(_Part):
    """enabled and disabled are told to a chat template that knows them; the others leave it to the model."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(None, description="Not enforced.")
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted: thoughts come as empty blocks."
    )


class OutputFormatParam(_Part):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfigParam(_Part):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormatParam | None = None


class CountTokensBody(SamplingBody):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    depth: FixedDepth = None
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Texts | None = None
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[ToolChoiceParam | NamedToolChoiceParam, Field(discriminator="type")] | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfigParam | None = None
    output_format: OutputFormatParam | None = Field(None, description="As output_config.format.")
    chat_template_kwargs: TemplateArguments | None = None

    @classmethod
    def prepare(cls, fields: dict[str, Any]) -> dict[str, Any]:
        refuse_of_chat(fields, cls.model_fields)
        if fields.get("thread") is not None:  # whose next turn would bring new messages alone
            raise RequestError(
                "threads are not kept here; send every message with each request, and no 'thread'",
                param="thread",
                code=NO_THREADS,
            )
        return super().prepare(fields)

    def unknown_names(self) -> Iterator[str]:
        yield from super().unknown_names()
        yield from (
            f"tools of type {tool.type}" for tool in self.tools or () if isinstance(tool, ServerToolParam)
        )

    def tool_use(self) -> ToolUse | None:
        """The tools that are ours to offer, and the choice among them."""
        functions = [tool.as_function() for tool in self.tools or () if isinstance(tool, CustomToolParam)]
        choice = self.tool_choice
        if isinstance(choice, NamedToolChoiceParam):
            asked: Any = FunctionName(name=choice.name)
        else:
            asked = None if choice is None else "required" if choice.type == "any" else choice.type
        return make_tool_use(functions, asked, not (choice and choice.disable_parallel_tool_use))

    def conversation(self, template: str | None, stream: bool = False) -> Conversation:
        """What is asked for. template: the model's, whose variables say whether it thinks.

        Raises RequestError for tools and schemas that are malformed.
        """
        tools = self.tool_use()
        messages, prefilled = to_messages(self.system or [], self.messages)
        config = self.output_config or OutputConfigParam()
        form = config.format or self.output_format
        asked = self.thinking.type if self.thinking is not None else None
        think = {"enabled": True, "disabled": False}.get(asked or "")
        return Conversation(
            messages=messages,
            model=self.model,
            stream=stream,
            sampling=self.sampling(),
            tools=tools,
            answer=None if form is None else json_grammar(form.json_schema, "output_config"),
            template_variables=thinking_variables(template, think, config.effort)
            | (self.chat_template_kwargs or {}),
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
            fixed_depth=self.depth == "fixed",
        )


class MessagesBody(CountTokensBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, in_range("max_tokens"), WHOLE] = Field(validation_alias="max_tokens")
    stream: FalseByDefault = False


class TokensCount(TypedDict):
    input_tokens: Count


class MessagesRoute(Route):
    """A route with errors in Anthropic's shape."""

    error_model = MessagesError

    @classmethod
    def error_body(cls, error: ApiError, request_id: str) -> dict[str, Any]:
        return error_body(error, request_id)

    @classmethod
    def error_status(cls, error: ApiError) -> int:
        return _OVERLOADED if error.code == "overloaded" else error.status


router = APIRouter(route_class=MessagesRoute)


@router.post(
    "/v1/messages",
    response_model=MessagesAnswer,
    responses=success(
        MessagesEvent, MODEL_LINK, stream="Anthropic's events, from message_start to message_stop"
    )
    | errors(*GENERATION_ERRORS, _OVERLOADED, model=MessagesError),
)
async def create_message(
    request: Request,
    body: Annotated[
        MessagesBody,
        Body(openapi_examples={"question": {"value": _EXAMPLE}, "tools": {"value": _TOOL_EXAMPLE}}),
    ],
) -> Response:
    """An answer to a conversation, in Anthropic's shape."""
    begun = await begin(request, body.conversation(_template(request, body), body.stream))
    shows_thoughts = body.thinking is None or body.thinking.display != "omitted"
    return await MessagesWriter(begun, body.stream, shows_thoughts).answer(request)


@router.post(
    "/v1/messages/count_tokens",
    response_model=TokensCount,
    responses=success() | errors(400, 404, 413, model=MessagesError),
)
async def count_message_tokens(
    request: Request,
    body: Annotated[CountTokensBody, Body(openapi_examples={"question": {"value": _EXAMPLE}})],
) -> Response:
    """How many tokens the prompt of such a conversation has."""
    num_tokens = await count_tokens(request, body.conversation(_template(request, body)))
    return json_response({"input_tokens": num_tokens})


def _template(request: Request, body: CountTokensBody) -> str | None:
    template: str | None = get_context(request).engine.model.chat_template_for(bool(body.tools))
    return template


def to_messages(
    system: Sequence[TextBlockParam], messages: Sequence[MessageParam]
) -> tuple[list[dict[str, Any]], bool]:
    """A conversation as chat completions have it, and whether its answer goes on with the last message.

    Neighbours of one role are one turn. Results of tools become messages of their own, in their place.
    """
    found = [{"role": "system", "content": _texts(system)}] if system else []
    names: dict[str, str] = {}  # of tools, by the ids of their calls
    last: list[Any] = []
    for role, turn in groupby(messages, lambda message: message.role):
        last = [block for message in turn for block in message.content]
        if role == "assistant":
            names |= {block.id: block.name for block in last if isinstance(block, ToolUseBlockParam)}
            found.append(_assistant(last))
        else:
            found += _others(role, last, names)
    if messages[-1].role != "assistant" or "tool_calls" in found[-1]:
        return found, False
    if any(isinstance(block, TextBlockParam) and block.text for block in last):
        return found, True
    return found[:-1], False  # there is nothing that an answer could go on with


def _assistant(blocks: Iterable[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": _texts(blocks)}
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlockParam)]
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, ToolUseBlockParam)
    ]
    return message | {"tool_calls": calls} if calls else message


def _others(role: str, blocks: list[Any], names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What a user or a system said, and results of tools."""
    if not blocks:
        yield {"role": role, "content": ""}
    for is_result, group in groupby(blocks, lambda block: isinstance(block, ToolResultBlockParam)):
        if not is_result:
            yield {"role": role, "content": _texts(group)}
            continue
        for block in group:
            result: dict[str, Any] = {"role": "tool", "tool_call_id": block.tool_use_id}
            if block.tool_use_id in names:
                result["name"] = names[block.tool_use_id]
            texts = _texts(block.content or ())
            result["content"] = texts if not block.is_error else [_text("The tool failed:"), *texts]
            yield result


def _texts(blocks: Iterable[Any]) -> list[dict[str, Any]]:
    return [_text(block.text) for block in blocks if isinstance(block, TextBlockParam)]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
