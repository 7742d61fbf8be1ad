"""Tools that a request offers: checked, offered to the chat template, and the grammar of calls that must be made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from sleb.errors import RequestError
from sleb.server.errors import shorten
from sleb.server.grammar.grammar_spec import GrammarSpec, Part
from sleb.server.grammar.structured import schema_text
from sleb.server.message.special_tokens import literal
from sleb.server.message.tool_parser import END_TOOL_CALL, MARKS, PYTHON_TAG, TOOL_CALL, TOOL_CALLS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sleb.server.protocol import ChatBody

MAX_TOOLS = 256
MAX_CALLS = 32  # in an answer that must call
NAME_PATTERN = "[a-zA-Z0-9_.-]{1,64}"
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class Parameters(BaseModel):
    """A JSON schema."""

    type: Literal["object"] = "object"


class Function(BaseModel):
    """A function that can be called; `given` is all that was said of it, in its order, as the model shall see it."""

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
    description: str | None = None
    parameters: Parameters | None = None
    _given: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: ModelWrapValidatorHandler[Function]) -> Function:
        function = handler(value)
        function._given = value
        return function

    @property
    def given(self) -> dict[str, Any]:
        return self._given


class Tool(BaseModel):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: FunctionName


class AllowedList(BaseModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(BaseModel):
    """OpenAI's way to offer some of the tools only."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedList


@dataclass(frozen=True)
class CallFormat:
    """How a model writes a call: `begin`, an object with the name and the arguments under `key`, `end`.

    opening and closing stand around all calls.
    """

    begin: str
    key: str
    end: str
    separator: str
    opening: str = ""
    closing: str = ""


HERMES = CallFormat(f"{TOOL_CALL}\n", "arguments", f"\n{END_TOOL_CALL}", "\n")
LLAMA = CallFormat("", "parameters", "", ";")
MISTRAL = CallFormat("", "arguments", "", ", ", f"{TOOL_CALLS} [", "]")
PLAIN = CallFormat("", "arguments", "", ";")


def call_format(template: str | None) -> CallFormat:
    """The format that a chat template shows, Hermes's if it knows no tools (`offer_in_text` explains that one)."""
    if not knows_tools(template) or TOOL_CALL in (template or ""):
        return HERMES
    if TOOL_CALLS in (template or ""):
        return MISTRAL
    return LLAMA if PYTHON_TAG in template or '"parameters"' in template else PLAIN  # type: ignore[operator]


def knows_tools(template: str | None) -> bool:
    """Whether a chat template shows tools to the model."""
    return re.search(r"\btools\b", template or "") is not None


@dataclass(frozen=True)
class ToolUse:
    """Tools that the model may or must call.

    Attributes:
        tools: as chat templates take them.
        choice: auto | required | the name of the one tool to call, if `named`.
        parallel: whether there may be more calls than one.
        legacy: whether they came as `functions`, so that the answer has a `function_call`.
    """

    tools: list[dict[str, Any]]
    choice: str
    named: bool
    parallel: bool
    legacy: bool

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]

    @property
    def schemas(self) -> dict[str, Any]:
        """Of the arguments, by name."""
        return {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.tools}

    @property
    def must_call(self) -> bool:
        return self.named or self.choice == "required"

    def grammar(self, form: CallFormat, tokenizer: Tokenizer | None) -> GrammarSpec:
        """One call or more, of the named tool or of any."""
        callable_ = [
            tool["function"]
            for tool in self.tools
            if not self.named or tool["function"]["name"] == self.choice
        ]
        rules = []
        parts = []
        for number, function in enumerate(callable_):
            head = orjson.dumps(f'{{"name": "{function["name"]}", "{form.key}": ').decode()
            rules.append(f'tool{number}: {head} @arguments{number} "}}"')
            parts.append(Part(f"arguments{number}", "json", _arguments_schema(function)))
        begin, end, opening, closing = (
            _expression(text, tokenizer) for text in (form.begin, form.end, form.opening, form.closing)
        )
        more = (
            ""
            if self.named or not self.parallel
            else f" ({_expression(form.separator, tokenizer)} call){{0,{MAX_CALLS - 1}}}"
        )
        which = " | ".join(f"tool{number}" for number in range(len(callable_)))
        main = "\n".join(
            [f"start: {opening} call{more} {closing}", f"call: {begin} body {end}", f"body: {which}", *rules]
        )
        return GrammarSpec((Part("calls", "lark", main), *parts), "tools")


def read_tools(body: ChatBody) -> ToolUse | None:
    """What the request says about tools, in today's fields or the old ones; None if there are none to be called.

    Raises RequestError for two tools of one name, and for a choice that is none of them.
    """
    if body.tools and body.functions:
        raise RequestError("tools and functions exclude each other; leave one out", param="functions")
    choice: str | FunctionName | None = None
    allowed: list[str] | None = None
    if isinstance(body.tool_choice, AllowedTools):
        choice = body.tool_choice.allowed_tools.mode
        allowed = [tool.function.name for tool in body.tool_choice.allowed_tools.tools]
    elif isinstance(body.tool_choice, NamedTool):
        choice = body.tool_choice.function
    else:
        choice = body.tool_choice
    functions = [tool.function for tool in body.tools or ()]
    use = make_tool_use(functions, choice, body.parallel_tool_calls is not False, allowed=allowed)
    return make_tool_use(body.functions or (), body.function_call, False, legacy=True) or use


def make_tool_use(
    functions: Sequence[Function],
    choice: str | FunctionName | None,
    parallel: bool,
    *,
    allowed: Sequence[str] | None = None,
    legacy: bool = False,
) -> ToolUse | None:
    """What a request says about tools; None if there are none to be called.

    choice: none, auto (also None), required, or the name of the one to call. allowed: those of them that may be
    called, None: all; the model is shown no others.

    Raises RequestError for two functions of one name, and for a choice that is none of them.
    """
    choice_field, field = ("function_call", "functions") if legacy else ("tool_choice", "tools")
    tools = _as_tools(functions, field)
    if allowed is not None:
        for name in allowed:
            _check_choice(FunctionName(name=name), tools, choice_field, field)
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
    chosen, named = _check_choice(choice, tools, choice_field, field)
    if not tools or (chosen == "none" and not named):
        return None
    return ToolUse(tools, chosen, named, parallel, legacy)


def _as_tools(functions: Sequence[Function], field: str) -> list[dict[str, Any]]:
    names = [function.name for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"two {field} are named '{twice}'", param=field)
    return [{"type": "function", "function": function.given} for function in functions]


def _check_choice(
    choice: str | FunctionName | None, tools: list[dict[str, Any]], field: str, tools_field: str
) -> tuple[str, bool]:
    """none, auto, required or a name; and whether it is a name."""
    if choice in (None, "none", "auto"):
        return choice or "auto", False
    name = choice.name if isinstance(choice, FunctionName) else choice
    if not tools:
        raise RequestError(f"{field} is {shorten(name)}, but there are no {tools_field}", param=field)
    if not isinstance(choice, FunctionName):
        return choice, False
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise RequestError(
            f"{field} names {shorten(name)}, which is none of the {tools_field}: {shorten(', '.join(names), 300)}",
            param=field,
        )
    return name, True


def _arguments_schema(function: dict[str, Any]) -> str:
    """The schema of a call's arguments; keys that it does not list are not made up."""
    schema: dict[str, Any] = {"type": "object"} | (function.get("parameters") or _NO_PARAMETERS)
    if "properties" in schema:
        schema = {"additionalProperties": False} | schema
    return schema_text(schema, "tools")


def _expression(text: str, tokenizer: Tokenizer | None) -> str:
    """`text` as an expression of Lark, in which marks that are special tokens stand for themselves."""
    pieces = re.split(f"({'|'.join(map(re.escape, MARKS))})", text)
    return " ".join(literal(piece, tokenizer) for piece in pieces if piece)
