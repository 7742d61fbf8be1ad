"""Answers read by a checkpoint's own response template: transformers' `ResponseParser` behind our parsers' interface.

It finds the regions of a text; what they hold is read here, within bounds: a template comes with a checkpoint, and an
answer may be anything. What a template cannot read is content.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sleb.engine.response_template import AnswerTemplate
from sleb.server.message.call_readers import ObjectReader
from sleb.server.message.reasoning import Delta, join_deltas
from sleb.server.message.values import is_text, typed

logger = logging.getLogger("sleb.server")

_REASONING = ("thinking", "reasoning_content", "reasoning", "thoughts")
_LONGEST = 32 * 1024  # characters of a region that is no JSON
_RESULT = tuple[str, str]  # of a call: its name and its arguments


class TemplateParser:
    """A message parser (`MessageParser`) by a response template.

    Args:
        schemas: of the tools' arguments, by name. prompt_end: the end of the prompt, which may have begun a region.
        single: whether calls after the first are dropped.
    """

    def __init__(
        self,
        template: AnswerTemplate,
        schemas: Mapping[str, Any],
        prompt_end: str = "",
        *,
        single: bool = False,
    ) -> None:
        from transformers.utils.chat_parsing.response_parser import ResponseParser

        self.num_calls: int = 0
        self._template = template
        self._schemas = schemas
        self._single = single
        self._regions = template.regions()
        self._new: list[Delta] = []
        self._body = ""  # of the region that is open
        self._said = False  # whether some of it is told
        self._space = ""  # white space that belongs to a text if more of it follows
        self._reader: ObjectReader | None = None  # of calls that are objects of JSON
        self._told = self._broken = False
        self._captures: dict[str, str] = {}  # by the mark that opened the region
        anchor = self._regions.start_anchor_re.search(prompt_end)
        self._parser: Any = ResponseParser(self._regions, prefix=prompt_end if anchor else "")
        for event in self._parser.initial_events:
            self._follow(event)
        self._new.clear()
        self._body, self._said, self._space = "", False, ""

    @property
    def plain(self) -> bool:
        return False

    def push(self, text: str, finish_reason: str | None) -> list[Delta]:
        """What `text` makes certain; all of the rest if the answer ends with it."""
        try:
            events = [] if self._broken else self._parser.feed(text)
            if finish_reason is not None and not self._broken:
                events += self._parser.finalize()[1]
        except TimeoutError:
            logger.warning(
                "the model's response_template takes too long to read an answer; the rest is content"
            )
            self._broken, events = True, []
        if self._broken:
            self._new.append(Delta("content", text))
        for event in events:
            self._follow(event, finish_reason)
        new, self._new = self._new, []
        return join_deltas(new)

    def _follow(self, event: Mapping[str, Any], finish_reason: str | None = None) -> None:
        name = event["field"]
        if event["type"] == "region_open":
            self._body, self._said, self._space = "", False, ""
            self._reader, self._told = None, False
            opened: Any = self._regions.fields[name].open_re
            self._captures = {} if opened is None else opened.captured.pop(0)
        elif event["type"] == "region_chunk":
            self._body += event["text"]
            if name == "content" or name in _REASONING:
                self._tell(name, event["text"])
            elif name == "tool_calls" and self._template.fields[name].content == "json":
                self._tell_call(event["text"])
        elif name == "tool_calls" and not self._told:
            self._read_calls(cut=finish_reason == "length")

    def _tell(self, name: str, text: str) -> None:
        """Text of a region, without the white space at its ends if the template does not keep that."""
        strips = self._template.fields[name].content_args.get("strip", True)
        kind = "content" if name == "content" else "reasoning"
        if strips:
            text = self._space + text if self._said else text.lstrip()
            kept = text.rstrip()
            self._space, text = text[len(kept) :], kept
        if text:
            self._said = True
            self._new.append(Delta(kind, text))  # type: ignore[arg-type]

    def _tell_call(self, text: str) -> None:
        """Arguments as they come, of a call that is one object with its name first."""
        if self._reader is None:
            if not self._body.lstrip().startswith("{"):
                return
            self._reader, text = ObjectReader(self._schemas, needs_arguments=False), self._body.lstrip()
        for character in text:
            if self._reader.step(character) is not None:
                break
        if self._reader.name is None or (self._single and self.num_calls and not self._told):
            return
        if not self._told:
            self._told = True
            self._new.append(Delta("call", self._reader.name, self.num_calls))
            self.num_calls += 1
        self._new.append(Delta("arguments", self._reader.take(), self.num_calls - 1))

    def _read_calls(self, *, cut: bool) -> None:
        """The calls of a region that has ended; its text as content if they are none."""
        calls = self._calls()
        if calls is None:
            if not cut:
                self._new.append(Delta("content", self._body))
            return
        for name, arguments in calls:
            if not (self._single and self.num_calls):
                self._new.append(Delta("call", name, self.num_calls))
                self._new.append(Delta("arguments", arguments, self.num_calls))
                self.num_calls += 1

    def _calls(self) -> list[_RESULT] | None:
        from transformers.utils.chat_parsing.content_parsers import parse_content, process_field

        field, body = self._template.fields["tool_calls"], self._body
        if len(body) > _LONGEST and (field.content != "json" or field.content_args):
            return None
        try:
            if field.content == "xml-inline":
                content = self._tags(body, field.content_args)
            else:
                content = parse_content(body, field.content, field.content_args)
            whole = replace(field, content="json", content_args={})
            value = process_field(json.dumps(content, allow_nan=False), whole, self._captures)
            return [self._call(each) for each in (value if isinstance(value, list) else [value])]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, TimeoutError):
            return None  # of what the model wrote

    def _tags(self, text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Transformers' `xml-inline`, with a pattern whose search ends."""
        from transformers.utils.chat_parsing.content_parsers import parse_content

        inner = arguments.get("value_parser")
        found: dict[str, Any] = {}
        for match in self._template.tags["tool_calls"].finditer(text):
            groups = match.groupdict()
            value: Any = groups.get("value") or ""
            if inner is not None:
                value = parse_content(value, inner.get("name", "text"), inner.get("args", {}))
            if groups["key"] in found and arguments.get("merge_duplicates"):
                earlier = found[groups["key"]]
                value = [*(earlier if isinstance(earlier, list) else [earlier]), value]
            found[groups["key"]] = value
        return found

    def _call(self, value: Any) -> _RESULT:
        """Raises KeyError, TypeError or ValueError for what is no call of a tool."""
        function = value.get("function", value)
        name, arguments = function["name"], function.get("arguments", function.get("parameters", {}))
        schema = self._schemas[name]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise TypeError
        told = {
            key: typed(each) if isinstance(each, str) and not is_text(schema, key) else each
            for key, each in arguments.items()
        }
        return name, json.dumps(told, ensure_ascii=False, allow_nan=False)
