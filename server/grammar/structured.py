"""Structured output: `response_format` and other servers' fields for it, as the grammar that they ask for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from sleb.errors import RequestError
from sleb.server.errors import shorten
from sleb.server.grammar.grammar_spec import GrammarSpec, Kind, Part
from sleb.server.json_input import load_json

if TYPE_CHECKING:
    from sleb.server.protocol import GenerationBody

MAX_CHOICES = 10_000
GRAMMARS = "GBNF, as llama.cpp has it, or llguidance's dialect of Lark."
_KINDS = ("json", "regex", "choice", "grammar")
_FIELDS = {
    "guided_json": "json",
    "json_schema": "json",
    "format": "json",
    "guided_regex": "regex",
    "regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "grammar": "grammar",
    "ebnf": "grammar",
}
_ANY_OBJECT = {"type": "object"}

JsonSchema = Annotated[dict[str, Any] | str, Field(description="A JSON schema, or one as a string.")]
AnswerChoices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)
]


class TextFormat(BaseModel):
    type: Literal["text"] = "text"


class JsonObjectFormat(BaseModel):
    type: Literal["json_object"]
    json_schema: JsonSchema | None = Field(None, alias="schema")


class NamedSchema(BaseModel):
    json_schema: JsonSchema = Field(alias="schema")


class JsonSchemaFormat(BaseModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(BaseModel):
    """vLLM's field: what one of these says."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"enum": [None, False]}})

    json_schema: JsonSchema | Literal[False] | None = Field(None, alias="json")
    regex: str | Literal[False] | None = None
    choice: AnswerChoices | Literal[False] | None = None
    grammar: str | Literal[False] | None = None
    json_object: bool | None = None


def answer_grammar(body: GenerationBody) -> GrammarSpec | None:
    """The grammar of the answer; None if it is free.

    Raises RequestError for a field that is malformed, and for two fields that both say what the answer must be.
    """
    found = [
        spec for spec in (_response_format(body), *_single_fields(body), *_structured_outputs(body)) if spec
    ]
    if len(found) > 1:
        names = " and ".join(spec.param for spec in found[:2])
        raise RequestError(f"{names} exclude each other; leave one out", param=found[1].param)
    return found[0] if found else None


def json_grammar(schema: Any, param: str) -> GrammarSpec:
    """The grammar of answers that fit a JSON schema; None: any object. Raises RequestError as `schema_text`."""
    return _spec("json", schema_text(_ANY_OBJECT if schema is None else schema, param), param)


def schema_text(schema: Any, param: str) -> str:
    """A JSON schema as text. Raises RequestError for what is no JSON object, or is nested too deeply."""
    if isinstance(schema, str):
        try:
            schema = load_json(schema)
        except ValueError as error:
            raise RequestError(f"{param} is not valid JSON: {str(error)[:200]}", param=param) from None
    if not isinstance(schema, dict):
        raise RequestError(f"{param} is {shorten(schema)}; it must be a JSON schema, an object", param=param)
    try:
        return orjson.dumps(schema).decode()
    except TypeError as error:
        raise RequestError(f"{param} cannot be used: {str(error)[:200]}", param=param) from None


def _response_format(body: GenerationBody) -> GrammarSpec | None:
    given, param = body.response_format or {}, "response_format"
    kind = given.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = given.get("schema")
        return json_grammar(None if schema == {} else schema, param)
    if kind != "json_schema":
        raise RequestError(
            f"response_format.type is {shorten(kind)}; it must be 'text', 'json_object' or 'json_schema'",
            param=param,
        )
    described = given.get("json_schema")
    if not isinstance(described, dict) or described.get("schema") is None:
        raise RequestError("response_format.json_schema.schema is missing", param=param)
    return json_grammar(described["schema"], param)


def _single_fields(body: GenerationBody) -> list[GrammarSpec | None]:
    given = {name: getattr(body, name) for name in _FIELDS}
    if given["format"] == "json":
        given["format"] = _ANY_OBJECT
    return [_of_kind(_FIELDS[name], value, name) for name, value in given.items()]


def _structured_outputs(body: GenerationBody) -> list[GrammarSpec | None]:
    param = "structured_outputs"
    given = {
        name: value
        for name, value in (body.structured_outputs or {}).items()
        if value is not None and value is not False
    }
    for name in given:
        if name not in (*_KINDS, "json_object"):
            raise RequestError(
                f"{param} has {shorten(name)}; it may have one of {', '.join(_KINDS)}, json_object",
                param=param,
            )
    if "json_object" in given:
        if given.pop("json_object") is not True:
            raise RequestError(f"{param}.json_object must be true or false", param=param)
        if given.get("json") in (None, {}):
            given["json"] = _ANY_OBJECT
    return [_of_kind(kind, value, param) for kind, value in given.items()]


def _of_kind(kind: str, value: Any, param: str) -> GrammarSpec | None:
    if value is None:
        return None
    if kind == "json":
        return json_grammar(value, param)
    if kind == "choice":
        return _spec("lark", _choice(value, param), param)
    if not isinstance(value, str):
        raise RequestError(f"{param} is {shorten(value)}; its {kind} must be a string", param=param)
    return _spec("regex" if kind == "regex" else "any", value, param)


def _choice(choices: Any, param: str) -> str:
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise RequestError(f"{param} must list the answers to choose from, none of them empty", param=param)
    if not 0 < len(choices) <= MAX_CHOICES:
        raise RequestError(f"{param} has {len(choices)} choices; give 1 to {MAX_CHOICES}", param=param)
    # A terminal, which the lexer's automaton reads: alternatives of a rule would each be an item of the parser.
    return "start: CHOICE\nCHOICE: " + " | ".join(
        json.dumps(choice, ensure_ascii=False) for choice in choices
    )


def _spec(kind: Kind, text: str, param: str) -> GrammarSpec:
    return GrammarSpec((Part("answer", kind, text),), param)
