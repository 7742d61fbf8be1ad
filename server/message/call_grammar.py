"""The grammar of an answer that must call tools, in each format: the form that its model writes calls in.

Arguments are held to their schema. Where each is written by itself (XML's parameters, Python's keywords), that is the
schema of each property, in its order and whether it is required; what a schema says of all of them together is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sleb.server.grammar.grammar_spec import GrammarSpec, Part
from sleb.server.grammar.structured import schema_text
from sleb.server.message.special_tokens import literal, text_up_to
from sleb.server.message.tool_formats import ToolFormat
from sleb.server.message.values import is_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_CALLS = 32  # in an answer that must call
_MAX_FREE = 32  # arguments that a schema does not name
_LONGEST = 1000  # characters of a text whose length is held to its schema; a regular expression grows with it
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_PYTHON_BOOLEAN, _PYTHON_CHARACTER = '"True" | "False"', r"([^'\\\n]|\\[nt'\\])"
_OF_ANY_STRING = {"type", "description", "title", "default", "minLength", "maxLength", "$defs", "definitions"}
_KEY, _ID = "/[a-zA-Z_][a-zA-Z0-9_]{0,63}/", "/[a-zA-Z0-9]{1,9}/"


def call_grammar(
    form: ToolFormat, functions: Sequence[dict[str, Any]], tokenizer: Tokenizer | None, *, several: bool
) -> GrammarSpec:
    """One call of the functions, or if `several` are allowed up to `MAX_CALLS`."""
    return _Calls(form, tokenizer).grammar(functions, several)


class _Calls:
    def __init__(self, form: ToolFormat, tokenizer: Tokenizer | None) -> None:
        self._form = form
        self._tokenizer = tokenizer
        self._rules: list[str] = []
        self._parts: list[Part] = []

    def grammar(self, functions: Sequence[dict[str, Any]], several: bool) -> GrammarSpec:
        form, write = self._form, self._expression
        bodies = [self._body(number, function) for number, function in enumerate(functions)]
        more = f" ({write(form.separator)} call){{0,{MAX_CALLS - 1}}}" if several else ""
        start = f"start: {write(form.opening)} call{more} {write(form.closing)}"
        call = f"call: {write(form.begin)} body {write(form.end)}"
        if form.notation == "channels":
            start, call = self._channels(len(bodies))
        main = [start, call, f"body: {' | '.join(bodies)}", *self._rules]
        return GrammarSpec((Part("calls", "lark", "\n".join(main)), *self._parts), "tools")

    def _body(self, number: int, function: dict[str, Any]) -> str:
        """Adds the rules of one tool's calls; the name of the first."""
        form, rule = self._form, f"tool{number}"
        schema: dict[str, Any] = {"type": "object"} | (function.get("parameters") or _NO_PARAMETERS)
        name, call_id = function["name"], ""
        if form.call_id is not None:
            before, behind = map(self._expression, form.call_id)
            call_id = f"({before} {_ID} {behind})?"
        if form.notation == "object":
            head = json.dumps(f'{{"name": "{name}", "{form.key}": ')
            body = f'{head} {self._arguments(number, schema)} {call_id} "}}"'
        elif form.notation == "channels":
            before, kind = self._channels_of_a_name()
            body = f"{json.dumps(name)} {kind} {self._arguments(number, schema)}"
            self._rules.append(f"in_role{number}: {json.dumps(name)} {before} {kind} @arguments{number}")
        elif form.notation == "python":
            body = f'{json.dumps(name + "(")} {self._keywords(number, schema)} ")"'
        elif form.notation == "parameters":
            body = (
                f"{json.dumps(name)} {self._expression(form.after_name)} {self._parameters(number, schema)}"
            )
        else:
            after = self._expression(form.after_name)
            body = f"{json.dumps(name)} {call_id} {after} {self._arguments(number, schema)}"
        self._rules.append(f"{rule}: {body}")
        return rule

    def _arguments(self, number: int, schema: dict[str, Any]) -> str:
        """An object; keys that its schema does not list are not made up."""
        if "properties" in schema:
            schema = {"additionalProperties": False} | schema
        return self._json(f"arguments{number}", schema)

    def _json(self, name: str, schema: dict[str, Any]) -> str:
        self._parts.append(Part(name, "arguments", schema_text(schema, "tools")))
        return f"@{name}"

    def _properties(
        self, number: int, schema: dict[str, Any]
    ) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
        """Of each property a name for its rule, its key, its schema by itself, and whether it is required."""
        shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        properties, required = schema.get("properties"), schema.get("required")
        for index, (key, each) in enumerate(properties.items() if isinstance(properties, dict) else ()):
            needed = isinstance(required, list) and key in required
            yield f"a{number}_{index}", key, shared | (each if isinstance(each, dict) else {}), needed

    def _keywords(self, number: int, schema: dict[str, Any]) -> str:
        """Python's `key=value`, with commas between those that are there."""
        if "properties" not in schema:
            free = f'{_KEY} "=" {self._json(f"any{number}", {})}'
            return f'({free} (", " {free}){{0,{_MAX_FREE - 1}}})?'
        following, first = '""', '""'
        for rule, key, own, needed in reversed(list(self._properties(number, schema))):
            value = self._json(f"{rule}_value", own)
            if own.get("type") == "boolean":
                value += f" | {_PYTHON_BOOLEAN}"
            elif isinstance(own.get("enum"), list):
                value += "".join(
                    f" | {json.dumps(repr(each))}" for each in own["enum"] if isinstance(each, str)
                )
            elif set(own) <= _OF_ANY_STRING and own.get("type") == "string":
                value += f" | /'{_PYTHON_CHARACTER}{_length(own)}'/"
            self._rules.append(f"{rule}: {json.dumps(key + '=')} ({value})")
            self._rules += [f"{rule}_first: {rule} {following}", f'{rule}_next: ", " {rule} {following}']
            if not needed:
                self._rules[-2] += f" | {first}"
                self._rules[-1] += f" | {following}"
            first, following = f"{rule}_first", f"{rule}_next"
        return first

    def _parameters(self, number: int, schema: dict[str, Any]) -> str:
        """Each argument in marks of its own."""
        form, write = self._form, self._expression
        if "properties" not in schema:
            value = self._text(f"any{number}", {})
            return f"({write(form.parameter)} {_KEY} {write(form.value)} {value}){{0,{_MAX_FREE}}}"
        found = []
        for rule, key, own, needed in self._properties(number, schema):
            if is_text(schema, key):
                value = self._text(f"{rule}_value", own)
            else:
                value = self._json(f"{rule}_value", own)
                if own.get("type") == "boolean":
                    value += f" | {_PYTHON_BOOLEAN}"
                value = f'"\\n"? ({value}) {write(form.value_end)}'
            head = f"{write(form.parameter)} {json.dumps(key)} {write(form.value)}"
            self._rules.append(f"{rule}: {head} {value}")
            found.append(rule if needed else f"{rule}?")
        return " ".join(found)

    def _text(self, rule: str, schema: dict[str, Any]) -> str:
        """A text up to the mark behind it; of its schema, its length and the texts that it may be are kept."""
        end = self._form.value_end
        if isinstance(schema.get("enum"), list):
            return f"({' | '.join(map(json.dumps, schema['enum']))}) {self._expression(end)}"
        pattern = rf"/\n?(.|\n){_length(schema)}\n?/"
        expression, rules = text_up_to(rule, end.strip(), self._tokenizer, pattern)
        self._rules += rules
        behind = end[len(end.rstrip()) :]
        return f"{expression} {self._expression(behind)}"

    def _channels(self, num_tools: int) -> tuple[str, str]:
        """A message to a tool, after another with thoughts or not; the recipient may stand before the channel."""
        write = self._expression
        thoughts, rules = text_up_to("thoughts", "<|end|>", self._tokenizer)
        self._rules += rules
        analysis = f'{write("<|channel|>")} "analysis" {write("<|message|>")} {thoughts}'
        start = f'start: ({analysis} {write("<|start|>")} "assistant")? call'
        in_role = " | ".join(f"in_role{number}" for number in range(num_tools))
        in_channel = f'{write("<|channel|>")} "commentary to=functions." body'
        return start, f'call: {in_channel} | " to=functions." ({in_role})'

    def _channels_of_a_name(self) -> tuple[str, str]:
        """What stands behind a tool's name: the channel where that is not told before, and the kind of content."""
        write = self._expression
        kind = f'(" "? {write("<|constrain|>")} " "? | " ") "json" {write("<|message|>")}'
        return f'{write("<|channel|>")} "commentary"', kind

    def _expression(self, text: str) -> str:
        return expression(text, self._form.marks, self._tokenizer)


def expression(text: str, marks: Sequence[str], tokenizer: Tokenizer | None) -> str:
    """`text` as an expression of Lark: marks that are special tokens stand for themselves, and white space at the ends
    and beside marks may be left out."""
    found = []
    for piece in re.split(f"({'|'.join(map(re.escape, marks))})" if marks else "(?!)", text):
        if piece in marks:
            found.append(literal(piece, tokenizer))
            continue
        parts = re.split(r"(^\s+|\s+$)", piece)
        found += [f"{json.dumps(part, ensure_ascii=False)}{'?' if part.isspace() else ''}" for part in parts]
    return " ".join(part for part in found if part != '""') or '""'


def _length(schema: dict[str, Any]) -> str:
    """How many characters a text of a schema may have, as a regular expression says it."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    numbers = (least, 0 if most == "" else most)
    if not all(isinstance(each, int) and 0 <= each <= _LONGEST for each in numbers):
        return "*"
    return f"{{{least},{most}}}"
