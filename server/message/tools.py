"""Tools that a request offers: checked, offered to the chat template, and the grammar of calls that must be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from sleb.errors import RequestError
from sleb.server.errors import shorten
from sleb.server.grammar.grammar_spec import GrammarSpec
from sleb.server.message.call_grammar import call_grammar
from sleb.server.message.tool_formats import ToolFormat

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sleb.server.protocol import ChatBody

MAX_TOOLS = 256
ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class Parameters(BaseModel):
    """A JSON schema."""

    type: Literal["object"] = "object"


class Function(BaseModel):
    """A function that can be called; `given` is all that was said of it, in its order, as the model shall see it."""

    name: ToolName
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

    def grammar(self, form: ToolFormat, tokenizer: Tokenizer | None) -> GrammarSpec:
        """One call or more, of the named tool or of any."""
        functions = [tool["function"] for tool in self.tools]
        if self.named:
            functions = [function for function in functions if function["name"] == self.choice]
        return call_grammar(form, functions, tokenizer, several=self.parallel and not self.named)


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
