"""Between users and llguidance: what they write as it reads it, and what it refuses in their words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from sleb.server.grammar.grammar_spec import Part

# That llguidance holds an answer to; JSON Schema lets any other be an annotation.
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)
MAX_GBNF_LENGTH = (
    64 * 1024
)  # characters; the converter is Python, and takes time by the rules' number squared
MAX_GBNF_RULES = 1000
MAX_MULTIPLE = 20_000  # an automaton has as many states, each about a kilobyte
_GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "example", "examples")
_MAX_MESSAGE = 500
_IN_WORDS = [
    (
        r"(?s)^.*?Unimplemented keys: \[(.*?)\].*$",
        r"answers cannot be held to \1 of a JSON schema; leave that out, and check it in the answer",
    ),
    (
        r"(?s)^.*?oneOf constraints are not supported.*$",
        "the alternatives of a 'oneOf' may overlap, and answers cannot be held to exactly one of them; use 'anyOf'",
    ),
    (
        r"(?s)^.*?Resource '(.*?)' is not present in a registry.*$",
        r"'$ref' to \1 leaves the schema, and nothing is fetched; put it under '$defs'",
    ),
]


class GrammarError(Exception):
    """A grammar that cannot be used, in words for the user."""


def as_llguidance(matcher: Any, part: Part) -> dict[str, Any]:
    """The one grammar of a part, as llguidance's JSON has it. Raises GrammarError.

    matcher: the class `llguidance.LLMatcher`.
    """
    try:
        if part.kind in ("json", "arguments"):  # a small model could spend all its tokens on white space
            space = " ?" if part.kind == "arguments" else ""
            options = {
                "whitespace_flexible": False,
                "item_separator": f",{space}",
                "key_separator": f":{space}",
            }
            schema = orjson.dumps(_held(orjson.loads(part.text))).decode()
            made = matcher.grammar_from_json_schema(schema, overrides=options)
        elif part.kind == "regex":
            made = matcher.grammar_from_regex(part.text)
        else:
            is_gbnf = part.kind == "any" and _GBNF_RULE.search(part.text)
            return {"lark_grammar": _gbnf_as_lark(part.text) if is_gbnf else part.text}
    except ValueError as error:
        raise GrammarError(in_words(str(error))) from None
    grammar: dict[str, Any] = json.loads(made)["grammars"][0]
    return grammar


def in_words(message: str) -> str:
    """llguidance's message without its state, or ours for it; of a long one the beginning and the end."""
    message = re.split("<(?:backtrace|state|non-verbose/)>", message)[0].strip()
    for pattern, words in _IN_WORDS:
        message = re.sub(pattern, words, message)
    half = _MAX_MESSAGE // 2
    return message if len(message) <= _MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def _gbnf_as_lark(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    num_rules = len(_GBNF_RULE.findall(text))
    if len(text) > MAX_GBNF_LENGTH or num_rules > MAX_GBNF_RULES:
        raise GrammarError(
            f"it has {len(text)} characters and {num_rules} rules; GBNF may have {MAX_GBNF_LENGTH} and {MAX_GBNF_RULES}"
        )
    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise GrammarError("its groups are nested too deeply") from None
    except Exception as error:  # of no class of its own, some of them by chance
        raise GrammarError(f"it is no GBNF grammar: {in_words(str(error))}") from None


def _held(schema: Any) -> Any:
    """A JSON schema without what means nothing, in place: unknown formats, and `uniqueItems: false`.

    Raises GrammarError for multiples that are too large, together too: those of an 'allOf' become one.
    """
    multiples: list[Fraction] = []
    for each in _subschemas(schema):
        if isinstance(each.get("multipleOf"), int | float):
            multiples.append(Fraction(str(float(each["multipleOf"]))))
        if isinstance(each.get("format"), str) and each["format"] not in FORMATS:
            del each["format"]
        if each.get("uniqueItems") is False:
            del each["uniqueItems"]
    unit = math.lcm(*(multiple.denominator for multiple in multiples))
    common = 1
    for multiple in multiples:
        common = math.lcm(common, int(multiple * unit) or 1)
        if common > MAX_MULTIPLE:  # before it is too long a number
            raise GrammarError(
                f"its 'multipleOf' have a common multiple of more than {MAX_MULTIPLE}, in units of their last "
                "digit; leave the largest out, and check it in the answer"
            )
    return schema


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The objects in a schema that are schemas themselves, itself first."""
    to_do = [schema]
    while to_do:
        each = to_do.pop()
        if isinstance(each, list):
            to_do += each
        elif isinstance(each, dict):
            yield each
            for name, value in each.items():
                if name in _SCHEMAS_BY_NAME and isinstance(value, dict):
                    to_do += value.values()
                elif name not in _VALUES:
                    to_do.append(value)
