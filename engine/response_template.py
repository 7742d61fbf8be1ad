"""A checkpoint's own way to read its answers: transformers' response template, checked when the model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sleb.errors import ModelError
from sleb.fields import shown_text

if TYPE_CHECKING:
    from transformers.utils.chat_parsing.response_templates import ResponseTemplate

SECONDS = 0.05  # that one search with a template's pattern may take; some patterns take for ever
_MAX_LENGTH = 64 * 1024  # characters of a template, as JSON
_PROBE = 'to=f <think>a</think>\n<tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call> <|end|>\n' * 20


class TimedPattern:
    """A compiled pattern whose searches end in TimeoutError.

    captured: what the named groups of each match that opened a region caught, in their order.
    """

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern
        self.captured: list[dict[str, str]] = []

    @property
    def groupindex(self) -> Mapping[str, int]:
        return dict(self._pattern.groupindex)

    def search(self, text: str, start: int = 0, *, partial: bool = False) -> Any:
        found = self._pattern.search(text, start, partial=partial, timeout=SECONDS)
        return None if found is None else _Match(found, self.captured)

    def finditer(self, text: str) -> Any:
        return self._pattern.finditer(text, timeout=SECONDS)


class _Match:
    """A match as `ResponseParser` uses it: it asks for the groups of those alone that open regions."""

    def __init__(self, match: Any, captured: list[dict[str, str]]) -> None:
        self._match, self._captured = match, captured
        self.start, self.end, self.partial = match.start, match.end, match.partial

    def groupdict(self) -> dict[str, str]:
        self._captured.append(
            {name: text for name, text in self._match.groupdict().items() if text is not None}
        )
        return self._captured[-1]


@dataclass(frozen=True)
class AnswerTemplate:
    """A response template in two parts: where its regions begin and end, and what their text means.

    Attributes:
        fields: of a message, as the template has them, with patterns that end.
        tags: the compiled `tag_pattern` of each field that has one.
        text: all of it as JSON, in which special tokens are looked for.
    """

    fields: Mapping[str, Any]
    text: str
    _template: ResponseTemplate = field(repr=False)
    tags: Mapping[str, TimedPattern] = field(default_factory=dict)

    def regions(self) -> ResponseTemplate:
        """For one answer: every region is plain text there, so that following it fails for no answer."""
        fields = {
            name: replace(
                each,
                open_re=None if each.open_re is None else TimedPattern(each.open_re),
                close_re=None if each.close_re is None else TimedPattern(each.close_re),
                content="text",
                content_args={"strip": False},
                transform=None,
                transform_each=False,
                repeats=True,
                join=None,
                optional=True,
            )
            for name, each in self.fields.items()
        }
        return replace(
            self._template,
            fields=fields,
            defaults={},
            start_anchor_re=TimedPattern(self._template.start_anchor_re),
        )


def read_response_template(given: Any, source: str) -> AnswerTemplate:
    """The response template of `source`, checked. Raises ModelError, with what transformers says of it."""
    import regex
    from transformers.utils.chat_parsing.response_templates import load_response_template

    remedy = "mend it, or take it out: --tool-format then names how calls are written"
    try:
        text = json.dumps(given, ensure_ascii=False)
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"it has {len(text)} characters, of at most {_MAX_LENGTH}")
        template = load_response_template(given)
        tags = {}
        for name, each in template.fields.items():
            if each.content == "xml-inline":
                pattern = each.content_args.get("tag_pattern")
                if not isinstance(pattern, str):
                    raise ValueError(f"Field '{name}': xml-inline needs a 'tag_pattern', a string")
                if '"xml-inline"' in json.dumps(each.content_args):
                    raise ValueError(f"Field '{name}': tags inside of tags are not read")
                tags[name] = TimedPattern(regex.compile(pattern, regex.DOTALL))
                if "key" not in tags[name].groupindex:
                    raise ValueError(f"Field '{name}': its tag_pattern has no group 'key'")
        made = AnswerTemplate(template.fields, text, template, tags)
        _try(made)
    except TimeoutError:
        reason = f"a pattern of it takes longer than {SECONDS:g} s for a short text"
    except Exception as error:  # of no class of its own: what a template's values happen to break
        reason = shown_text(" ".join(str(error).split()))[:300] or type(error).__name__
    else:
        return made
    raise ModelError(f"the response_template in {source} cannot be used: {reason}; {remedy}")


def _try(template: AnswerTemplate) -> None:
    """Follows a text that has a little of everything, and ends long runs of one character."""
    from transformers.utils.chat_parsing.response_parser import ResponseParser

    for text in (_PROBE, "a" * 2000 + "!", " " * 2000 + "\n"):
        parser = ResponseParser(template.regions(), prefix=text)
        parser.feed(text)
        parser.finalize()
        for pattern in template.tags.values():
            list(pattern.finditer(text))
