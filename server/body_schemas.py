"""JSON schemas of request bodies: the types of `protocol`, and the rules that only the code behind it knows.

A schema cannot say everything; what it leaves out is refused with 400 all the same: a prompt or a grammar that is too
large, a chat template's own rules, a tool that is named but not offered.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from sleb.engine.requests.sampling_params import (
    COUNT_RANGES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    NUMBER_RANGES,
)
from sleb.server.api.chat import OWN_ARGUMENTS
from sleb.server.api.completions import MAX_PROMPTS
from sleb.server.api.tokenize import MAX_TOKENS, DetokenizeBody, TokenizeBody
from sleb.server.grammar.structured import MAX_CHOICES
from sleb.server.message.incoming import MAX_MESSAGES
from sleb.server.message.tools import MAX_TOOLS, NAME_PATTERN
from sleb.server.protocol import (
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    TOKEN_ID_PATTERN,
    ChatBody,
    CompletionBody,
)
from sleb.server.schema_terms import (
    BOOLEAN,
    MAYBE_OBJECT,
    MAYBE_TEXT,
    NULL,
    REFERENCE,
    TEXT,
    Schema,
    a_list,
    an_object,
    any_of,
    maybe,
    one_of,
    reference,
)

_NOT_TRUE: Schema = {"not": {"const": True}}
_FULL_TEXT: Schema = {"type": "string", "minLength": 1}
_SCHEMA_OBJECT: Schema = {"type": ["object", "string"], "description": "A JSON schema, or one as a string."}


def body_schemas(vocab_size: int, tokenizer_size: int) -> dict[str, Schema]:
    """Schemas of bodies, and of what they are made of, by name.

    vocab_size: token ids that the model knows. tokenizer_size: those that the tokenizer can turn into text.
    """
    token: Schema = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    sampling = _sampling(token)
    grammar = _grammar()
    chat = sampling | grammar | _chat()
    completion = sampling | grammar | _completion(token)
    known: Schema = {"type": "integer", "minimum": 0, "maximum": tokenizer_size - 1}
    return _parts() | {
        "ChatBody": _body(ChatBody, chat, ["messages"]),
        "CompletionBody": _body(CompletionBody, completion, ["prompt"]),
        "TokenizeBody": _body(TokenizeBody, {}, []) | {"anyOf": _tokenize_shapes()},
        "DetokenizeBody": _body(DetokenizeBody, {"tokens": a_list(known, most=MAX_TOKENS)}, ["tokens"]),
    }


def _body(model: type[BaseModel], known: dict[str, Schema], required: list[str]) -> Schema:
    """The model's schema with what is known better in place of its own properties."""
    schema = model.model_json_schema(ref_template=REFERENCE)
    definitions = schema.pop("$defs", {})
    for name, stated in schema["properties"].items():
        stated = _inline(stated, definitions)
        stated.pop("title", None)
        if name in known:
            stated = known[name] if name in required else known[name] | {"default": stated.get("default")}
        schema["properties"][name] = stated
    schema.pop("required", None)
    return schema | ({"required": required} if required else {})


def _inline(value: Any, definitions: dict[str, Schema]) -> Any:
    """`value` with definitions in place of references to them."""
    if isinstance(value, dict):
        name = str(value.get("$ref", "")).rsplit("/", 1)[-1]
        value = definitions.get(name, value)
        return {key: _inline(each, definitions) for key, each in value.items() if key != "title"}
    return [_inline(each, definitions) for each in value] if isinstance(value, list) else value


def _count(name: str) -> Schema:
    least, most = COUNT_RANGES[name]
    return {"type": ["integer", "null"], "minimum": least, "maximum": most}


def _sampling(token: Schema) -> dict[str, Schema]:
    schemas = {name: _count(name) for name in COUNT_RANGES}
    for name, (low, high, above) in NUMBER_RANGES.items():
        least = "exclusiveMinimum" if above else "minimum"
        schemas[name] = {"type": ["number", "null"], least: low, "maximum": high}
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
    schemas["max_completion_tokens"] = schemas["max_tokens"] | {"description": "Wins over max_tokens."}
    schemas["stop"] = any_of(stop, a_list(stop, most=MAX_STOP_STRINGS), NULL)
    schemas["stop_token_ids"] = maybe(a_list(token, most=MAX_STOP_TOKEN_IDS))
    schemas["logit_bias"] = {
        "type": ["object", "null"],
        "propertyNames": {"pattern": f"^{TOKEN_ID_PATTERN}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": MAX_LOGIT_BIAS,
        "description": "Token ids to numbers.",
    }
    return schemas


def _grammar() -> dict[str, Schema]:
    choices = a_list(_FULL_TEXT, least=1, most=MAX_CHOICES)
    absent = one_of([None, False])
    described = an_object({"schema": _SCHEMA_OBJECT})
    return {
        "response_format": any_of(
            an_object({}, {"type": {"const": "text"}}),
            an_object({"type": {"const": "json_object"}}, {"schema": maybe(_SCHEMA_OBJECT)}),
            an_object({"type": {"const": "json_schema"}, "json_schema": described}),
            NULL,
        ),
        "guided_json": maybe(_SCHEMA_OBJECT),
        "guided_regex": MAYBE_TEXT,
        "guided_choice": maybe(choices),
        "guided_grammar": MAYBE_TEXT | {"description": "In llguidance's dialect of Lark."},
        "structured_outputs": {
            "type": ["object", "null"],
            "properties": {
                "json": any_of(_SCHEMA_OBJECT, absent),
                "regex": any_of(TEXT, absent),
                "choice": any_of(choices, absent),
                "grammar": any_of(TEXT, absent),
                "json_object": maybe(BOOLEAN),
            },
            "additionalProperties": absent,
        },
    }


def _chat() -> dict[str, Schema]:
    choices = one_of(["none", "auto", "required"])
    function = an_object({"name": TEXT})
    named = an_object({"function": function}, {"type": {"const": "function"}})
    return {
        "messages": a_list(reference("Message"), least=1, most=MAX_MESSAGES),
        "logprobs": {"type": ["boolean", "null"]},
        "top_logprobs": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": MAX_TOP_LOGPROBS,
            "description": "More than 0 needs logprobs to be true.",
        },
        "tools": maybe(a_list(reference("Tool"), most=MAX_TOOLS)),
        "tool_choice": any_of(choices, named, NULL),
        "functions": maybe(a_list(reference("Function"), most=MAX_TOOLS)),
        "function_call": any_of(one_of(["none", "auto"]), function, NULL),
        "modalities": maybe(a_list({"const": "text"})),
        "audio": NULL,
        "chat_template_kwargs": _template_arguments(),
    }


def _template_arguments() -> Schema:
    """What is not a field of the request itself."""
    return MAYBE_OBJECT | {"propertyNames": {"not": one_of(OWN_ARGUMENTS)}}


def _one_end() -> Schema:
    """A conversation either goes on with the last message or with a new one."""
    names = ("continue_final_message", "add_generation_prompt")
    return any_of(*({"properties": {name: _NOT_TRUE}} for name in names))


def _completion(token: Schema) -> dict[str, Schema]:
    ids = a_list(token, least=1)
    return {
        "prompt": any_of(TEXT, a_list(TEXT, 1, MAX_PROMPTS), ids, a_list(ids, 1, MAX_PROMPTS)),
        "suffix": {"type": ["string", "null"], "maxLength": 0, "description": "Not supported."},
        "best_of": _count("n") | {"description": "None other than n is supported."},
    }


def _tokenize_shapes() -> list[Schema]:
    prompt = {"prompt": TEXT, "messages": NULL}
    messages = {
        "messages": a_list(reference("Message"), least=1, most=MAX_MESSAGES),
        "prompt": NULL,
        "add_special_tokens": _NOT_TRUE,
        "chat_template_kwargs": _template_arguments(),
    }
    return [
        {"required": ["prompt"], "properties": prompt},
        {"required": ["messages"], "properties": messages, **_one_end()},
    ]


def _parts() -> dict[str, Schema]:
    """Messages and tools."""
    part = an_object({"type": {"const": "text"}, "text": TEXT})
    content = any_of(TEXT, a_list(part))
    call = an_object({"name": TEXT}, {"arguments": {"type": ["string", "object", "null"]}})
    calls = {
        "tool_calls": maybe(a_list(an_object({"function": reference("CalledFunction")}))),
        "function_call": maybe(reference("CalledFunction")),
    }
    role = {"type": "string", "minLength": 1, "maxLength": 64, "examples": ["system", "user", "tool"]}
    parameters: Schema = {"type": ["object", "null"], "properties": {"type": {"const": "object"}}}
    name = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}
    return {
        "Message": any_of(reference("SaidMessage"), reference("AssistantMessage")),
        "SaidMessage": an_object({"role": role, "content": content}, calls, "Of any role, with a content."),
        "AssistantMessage": an_object({"role": {"const": "assistant"}}, {"content": maybe(content), **calls}),
        "CalledFunction": call,
        "Function": an_object({"name": name}, {"description": MAYBE_TEXT, "parameters": parameters}),
        "Tool": an_object({"function": reference("Function")}, {"type": {"const": "function"}}),
    }
