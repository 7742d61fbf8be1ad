"""How a model's answers are read, and what form they must have: by its templates, its tokens and the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sleb.server.grammar.grammar_spec import GrammarSpec
from sleb.server.message.channels import ChannelParser
from sleb.server.message.parser import MarkedParser, MessageParser
from sleb.server.message.reasoning import ReasoningMarks, ReasoningParser, reasoning_marks
from sleb.server.message.response_template import TemplateParser
from sleb.server.message.special_tokens import special_token_id, thought_rules
from sleb.server.message.tool_formats import AUTO, GPT_OSS, ToolFormat, choose, knows_tools
from sleb.server.message.tool_parser import CallMarks, ToolParser
from sleb.server.message.tools import ToolUse

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sleb.engine.response_template import AnswerTemplate


@dataclass(frozen=True)
class AnswerReading:
    """The reading of the answers to one request.

    Attributes:
        template: the chat template. response_template: the checkpoint's own way to read answers, if it has one.
        tools, answer: what the request lets the model call, and the grammar of what it says.
        tool_format: a format's name, or "auto".
        prompt_end: the end of the prompt as text, marks and all. continued: the message that the answer continues.
    """

    template: str | None
    response_template: AnswerTemplate | None
    tokenizer: Tokenizer | None
    tools: ToolUse | None
    answer: GrammarSpec | None
    tool_format: str = AUTO
    prompt_end: str = ""
    continued: str | None = None

    @cached_property
    def form(self) -> ToolFormat:
        return choose(self.template, self.tool_format)

    @cached_property
    def _thoughts(self) -> ReasoningMarks | None:
        return None if self.form is GPT_OSS else reasoning_marks(self.template, self.tokenizer)

    @cached_property
    def _thought_open(self) -> bool:
        """Whether the prompt ends inside of thoughts."""
        if self._thoughts is None:
            return False
        begin, end = self._thoughts.begin, self._thoughts.end
        if self.continued is not None:
            return self.continued.rfind(begin) > self.continued.rfind(end)
        return self.prompt_end.rstrip().endswith(begin)

    @cached_property
    def _own_template(self) -> AnswerTemplate | None:
        """The response template, unless the form is named, or kept by a grammar that is made from a format."""
        must_call = self.tools is not None and (self.tools.must_call or self.answer is not None)
        return None if must_call or self.tool_format != AUTO else self.response_template

    @property
    def shown_special_ids(self) -> list[int]:
        """The marks that the answer is read by and that a decoder would leave out as special tokens."""
        if self._own_template is not None:
            return self._ids_in(self._own_template.text)
        marks = [] if self._thoughts is None else [*self._thoughts.marks]
        if self.form is GPT_OSS:
            marks += GPT_OSS.marks
        elif self.tools is not None:
            marks += [mark for each in self._marks.forms for mark in each.marks]
        found = {special_token_id(mark, self.tokenizer) for mark in marks}
        return sorted(token_id for token_id in found if token_id is not None)

    def _ids_in(self, text: str) -> list[int]:
        added = {} if self.tokenizer is None else self.tokenizer.get_added_tokens_decoder()
        plain = text.replace("\\\\", "")  # as patterns have them
        return sorted(id_ for id_, token in added.items() if token.special and token.content in plain)

    @property
    def _marks(self) -> CallMarks:
        # A template that knows no tools has them explained in Hermes's format, which models then write.
        return CallMarks.of(self.form, alone=self.tool_format != AUTO and knows_tools(self.template))

    def grammar(self) -> GrammarSpec | None:
        """That of the calls, if there must be some, or of the answer, which may also be calls; after any thoughts."""
        spec, tools = self.answer, self.tools
        if tools is not None and (tools.must_call or spec is not None):
            calls = tools.grammar(self.form, self.tokenizer)
            spec = calls if spec is None or tools.must_call else calls.or_else(spec)
        if spec is None or not self._thought_open or self._thoughts is None:
            return spec
        return spec.after(thought_rules(self.tokenizer, self._thoughts.end))

    def make_parser(self) -> MessageParser:
        """A parser for one choice."""
        tools = self.tools
        names, single = (() if tools is None else tools.names), tools is not None and not tools.parallel
        if self._own_template is not None:
            schemas = {} if tools is None else tools.schemas
            return TemplateParser(self._own_template, schemas, self.prompt_end, single=single)
        if self.form is GPT_OSS:
            return ChannelParser(names, self.prompt_end, single=single)
        reasoning = None if self._thoughts is None else ReasoningParser(self._thought_open, self._thoughts)
        if tools is None:
            return MarkedParser(reasoning, None)
        parser = ToolParser(names, tools.schemas, self._marks, live=tools.must_call, single=single)
        return MarkedParser(reasoning, parser)
