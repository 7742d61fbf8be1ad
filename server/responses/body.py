"""The body of POST /v1/responses, and what this server makes of each of its fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sleb.engine.requests.sampling_params import MAX_INTEGER
from sleb.errors import RequestError
from sleb.server.conversation import Conversation
from sleb.server.errors import shorten
from sleb.server.grammar.grammar_spec import GrammarSpec
from sleb.server.grammar.structured import answer_grammar, json_grammar
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
    GenerationBody,
    StreamOptions,
    TemplateArguments,
    TrueByDefault,
    describe_other_names,
    described_as,
    in_range,
    refuse_of_chat,
    refuse_unsupported,
)
from sleb.server.responses.items import MAX_ITEMS, InputItem

LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")  # what the model is shown of a tool


class FunctionTool(BaseModel):
    """A function that can be called."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = Field(
        None, description="Accepted; calls that must be made fit their schema anyway."
    )


class OtherTool(BaseModel):
    """A tool of another kind, which this server has not: ignored, named once in the log and counted."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(min_length=1, json_schema_extra={"not": {"const": "function"}})]


class ChosenFunction(BaseModel):
    type: Literal["function"]
    name: str


class AllowedFunctions(BaseModel):
    """Those of the tools that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(min_length=1, max_length=MAX_TOOLS)]


ToolChoice = Literal["none", "auto", "required"] | ChosenFunction | AllowedFunctions


class PlainText(BaseModel):
    type: Literal["text"]


class JsonObject(BaseModel):
    type: Literal["json_object"]


class JsonText(BaseModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextConfig(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    format: Annotated[dict[str, Any] | None, described_as(PlainText | JsonObject | JsonText | None)] = None
    verbosity: Literal["low", "medium", "high"] | None = Field(default=None, description="Accepted.")


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    effort: Effort | None = Field(
        default=None,
        description="Told to the chat template, where it knows enable_thinking or reasoning_effort.",
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="Accepted: thoughts are told whole."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesStreamOptions(StreamOptions):
    include_obfuscation: FalseByDefault = Field(False, description="Accepted: nothing is padded.")


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


def _describe_input(schema: dict[str, Any]) -> None:
    """It may be missing or empty beside previous_response_id only."""
    describe_other_names(schema)
    given = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]}
    earlier = {"previous_response_id": {"type": "string"}}
    schema["anyOf"] = [
        {"required": ["input"], "properties": {"input": given}},
        {"required": ["previous_response_id"], "properties": earlier},
    ]


class ResponsesBody(GenerationBody):
    """POST /v1/responses, and /v1/responses/input_tokens."""

    model_config = ConfigDict(json_schema_extra=_describe_input)

    input: Annotated[
        Any, described_as(str | Annotated[list[InputItem], Field(max_length=MAX_ITEMS)] | None)
    ] = Field(None, description="A text, or items. May be missing beside previous_response_id.")
    instructions: str | None = Field(
        None, description="A system message before the input; previous_response_id does not bring it along."
    )
    previous_response_id: str | None = Field(
        None, description="An answer that is kept: its input and its output stand before this input."
    )
    max_output_tokens: Annotated[
        int | None, Field(ge=1, le=MAX_INTEGER, description="Thoughts count. Wins over max_tokens."), WHOLE
    ] = None
    tools: Annotated[
        Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None,
        described_as(Annotated[list[FunctionTool | OtherTool], Field(max_length=MAX_TOOLS)] | None),
    ] = None
    tool_choice: Annotated[Any, described_as(ToolChoice | None)] = None
    parallel_tool_calls: TrueByDefault = True
    max_tool_calls: Annotated[
        int | None,
        Field(ge=1, le=MAX_INTEGER, description="Accepted: it is about OpenAI's own tools."),
        WHOLE,
    ] = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: the oldest messages go until the rest fits, those of the system stay."
    )
    include: list[Includable] | None = None
    top_logprobs: Annotated[int | None, in_range("logprobs", f"Told if `include` has {LOGPROBS}."), WHOLE] = (
        None
    )
    stream_options: ResponsesStreamOptions | None = None
    store: TrueByDefault = True
    metadata: Metadata | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    n: Annotated[int | None, Field(ge=1, le=1), WHOLE] = None
    background: Literal[False] | None = Field(None, description="Not supported.")
    return_token_ids: Literal[False] = False
    prompt_logprobs: Annotated[Any, described_as(None)] = None
    conversation: Annotated[Any, described_as(None)] = Field(None, description="Not supported.")
    prompt: Annotated[Any, described_as(None)] = Field(None, description="Not supported.")
    moderation: Annotated[Any, described_as(None)] = Field(None, description="Not supported.")
    context_management: Annotated[
        Any, described_as(Annotated[list[dict[str, Any]], Field(max_length=0)] | None)
    ] = Field(None, description="Not supported.")

    @classmethod
    def prepare(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if fields.get("background") is True:
            refuse_unsupported("background", "background is", "stream the answer, or wait for it")
        refuse_of_chat(fields, cls.model_fields)
        return super().prepare(fields)

    def check(self) -> None:
        super().check()
        if self.conversation is not None:
            refuse_unsupported("conversation", "conversations are", "use previous_response_id")
        if self.prompt is not None:
            refuse_unsupported("prompt", "prompts that are kept are", "send input and instructions")
        if self.moderation is not None:
            refuse_unsupported("moderation", "moderation is", "leave it out")
        if self.context_management not in (None, []):
            refuse_unsupported("context_management", "compaction is", "set truncation to auto")
        if self.prompt_logprobs is not None:
            refuse_unsupported("prompt_logprobs", "prompt_logprobs are", "ask /v1/chat/completions")

    def unknown_names(self) -> Iterator[str]:
        yield from super().unknown_names()
        for field in ("text", "reasoning"):
            yield from (
                f"{field}.{name}" for name in getattr(getattr(self, field), "model_extra", None) or {}
            )
        for tool in self.tools or ():
            if isinstance(kind := tool.get("type"), str) and kind != "function":
                yield f"tools.type={kind}"

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives told with each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    def functions(self) -> list[Function]:
        """The tools that are functions. Raises RequestError for one that is malformed."""
        found = []
        for index, tool in enumerate(self.tools or ()):
            where = f"tools[{index}]"
            kind = tool.get("type")
            if not isinstance(kind, str) or not kind:
                raise RequestError(
                    f"{where}.type is {shorten(kind)}; it must be 'function'", param=f"{where}.type"
                )
            if kind == "function":
                found.append(_read_function(tool, where))
        return found

    def tool_use(self) -> ToolUse | None:
        """What is said about tools; None if there are none to be called. Raises RequestError."""
        choice, allowed = _read_choice(self.tool_choice)
        return make_tool_use(self.functions(), choice, self.parallel_tool_calls, allowed=allowed)

    def answer_grammar(self) -> GrammarSpec | None:
        """That of `text.format`, or of the fields of others for it. Raises RequestError."""
        own, other = _text_grammar(self.text), answer_grammar(self)
        if own is not None and other is not None:
            raise RequestError(
                f"{own.param} and {other.param} exclude each other; leave one out", param=other.param
            )
        return own or other

    def to_conversation(
        self, messages: list[dict[str, Any]], tools: ToolUse | None, template: str | None
    ) -> Conversation:
        """What is asked for. template: that of the chat. Raises RequestError."""
        given = self.sampling()
        if self.max_output_tokens is not None:
            given["max_tokens"] = self.max_output_tokens
        effort = None if self.reasoning is None else self.reasoning.effort
        return Conversation(
            messages=messages,
            model=self.model,
            stream=self.stream,
            sampling=given,
            tools=tools,
            answer=self.answer_grammar(),
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words,
            template_variables=thinking_variables(
                template, None if effort is None else effort != "none", effort
            )
            | (self.chat_template_kwargs or {}),
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            num_logprobs=self.num_logprobs,
            fixed_depth=self.depth == "fixed",
        )

    def echo(self) -> dict[str, Any]:
        """The fields that an answer repeats, with what stands for those that were not sent."""
        text, reasoning = self.text or TextConfig(), self.reasoning or Reasoning()
        tools = [
            {"type": "function"} | {name: function.given.get(name) for name in _FUNCTION_FIELDS}
            for function in self.functions()
        ]
        given_format = text.format or {"type": "text"}
        if given_format.get("type") == "json_schema":
            given_format = {"name": "answer"} | {
                name: value for name, value in given_format.items() if value is not None
            }
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "safety_identifier": self.safety_identifier,
            "text": {"format": given_format, "verbosity": text.verbosity or "medium"},
            "tool_choice": self.tool_choice or "auto",
            "tools": tools,
            "top_logprobs": self.top_logprobs or 0,
            "truncation": self.truncation or "disabled",
            "user": self.user,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
        }


def _read_function(tool: dict[str, Any], where: str) -> Function:
    shown = {name: tool[name] for name in tool if name in _FUNCTION_FIELDS and tool[name] is not None}
    try:
        return Function.model_validate(shown)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join([where, *map(str, first["loc"])])
        what = "is missing" if first["type"] == "missing" else f"is wrong: {first['msg'][:300]}"
        raise RequestError(f"{param} {what}", param=param) from None


def _read_choice(choice: Any) -> tuple[str | FunctionName | None, list[str] | None]:
    """What is to be called, as `make_tool_use` takes it, and those that may be, None: all. Raises RequestError."""
    if choice is None or choice in ("none", "auto", "required"):
        return choice, None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return FunctionName(name=_chosen_name(choice)), None
    if kind == "allowed_tools":
        mode, tools = choice.get("mode"), choice.get("tools")
        if mode not in ("auto", "required"):
            raise _bad_choice(f"has the mode {shorten(mode)}; it must be 'auto' or 'required'")
        if not isinstance(tools, list) or not 0 < len(tools) <= MAX_TOOLS:
            raise _bad_choice(f"must list 1 to {MAX_TOOLS} tools")
        return mode, [_chosen_name(tool) for tool in tools]
    what = f"a tool of the type {shorten(kind)}, which this server has not" if kind else shorten(choice)
    raise _bad_choice(
        f"is {what}; it may be 'none', 'auto', 'required', or name a function or a list of allowed_tools"
    )


def _chosen_name(choice: Any) -> str:
    kind, name = (choice.get("type"), choice.get("name")) if isinstance(choice, dict) else (None, None)
    if kind != "function" or not isinstance(name, str):
        raise _bad_choice(f"has {shorten(choice)}; send {{'type': 'function', 'name': ...}}")
    return name


def _bad_choice(what: str) -> RequestError:
    return RequestError(f"tool_choice {what}", param="tool_choice")


def _text_grammar(text: TextConfig | None) -> GrammarSpec | None:
    given, param = (text and text.format) or {"type": "text"}, "text.format"
    kind = given.get("type")
    if kind == "text":
        return None
    schema: Any = None
    if kind == "json_schema":
        schema, param = given.get("schema"), "text.format.schema"
        if not isinstance(schema, dict):
            raise RequestError(
                f"{param} is {shorten(schema)}; it must be a JSON schema, an object", param=param
            )
    elif kind != "json_object":
        raise RequestError(
            f"text.format.type is {shorten(kind)}; it must be 'text', 'json_object' or 'json_schema'",
            param=param,
        )
    return json_grammar(schema, param)
