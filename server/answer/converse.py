"""From a conversation to a generation: the checks, the prompt, the grammar and the reading that every format shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request

from sleb.engine.requests.sampling_params import SamplingParams
from sleb.server.answer.generation import Generation, Prompt
from sleb.server.context import ServerContext, get_context
from sleb.server.conversation import Conversation
from sleb.server.grammar.grammar_spec import GrammarSpec
from sleb.server.grammar.token_rules import grammar_source
from sleb.server.json_input import num_characters
from sleb.server.message.incoming import normalise_messages
from sleb.server.message.parser import MessageParser, MessageShape
from sleb.server.message.reasoning import END_THINK, THINK, ReasoningParser
from sleb.server.message.special_tokens import special_token_id, thought_rules
from sleb.server.message.tool_parser import MARKS, ToolParser
from sleb.server.message.tool_prompt import offer_in_text
from sleb.server.message.tools import call_format, knows_tools
from sleb.server.text_threads import run

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sleb.engine.requests.tier import Tier

_NUM_LAST_TOKENS = 16  # of a prompt, in which a mark and the line ends after it have room


@dataclass(frozen=True)
class Begun:
    """An answer that nothing is known to be wrong with: `generation` is not started; `shape` reads what it makes."""

    context: ServerContext
    generation: Generation
    shape: MessageShape
    tier: Tier


async def begin(request: Request, conversation: Conversation) -> Begun:
    """Checks and renders a conversation, and compiles its grammar.

    Raises RequestError for what cannot be honoured, EngineDeadError, ShuttingDownError.
    """
    context = get_context(request)
    context.engine.check()
    engine, tier = context.engine.engine, context.tier(conversation.model)
    fields: dict[str, Any] = {"max_tokens": None} | dict(conversation.sampling)
    fields["logprobs"] = conversation.num_logprobs
    fields["prompt_logprobs"] = conversation.num_prompt_logprobs
    SamplingParams(**fields)  # a value out of range is told before anything is computed
    prompt = Prompt(await _render(request, conversation)).cut(
        conversation.truncate_prompt_tokens, fields["max_tokens"], engine.max_model_len
    )
    reading = _Reading(context, conversation, prompt)
    fields["grammar"] = await grammar_source(
        engine, conversation.allowed_token_ids, conversation.bad_words, reading.grammar()
    )
    fields["shown_special_ids"] = reading.shown_special_ids
    model = context.name_of(tier, conversation.model)
    params = SamplingParams(**fields)
    generation = Generation(context, request.state.request_id, tier, [prompt], params, model)
    legacy = conversation.tools is not None and conversation.tools.legacy
    return Begun(context, generation, MessageShape(reading.make_parser, legacy), tier)


async def count_tokens(request: Request, conversation: Conversation) -> int:
    """How many tokens the prompt of a conversation has. Raises RequestError as `begin` does."""
    get_context(request).tier(conversation.model)
    return len(await _render(request, conversation))


class _Reading:
    """How the answer to a request is read, which depends on the model: its template, its tokens, its prompt."""

    def __init__(self, context: ServerContext, conversation: Conversation, prompt: Prompt) -> None:
        engine = context.engine.engine
        self._tools = conversation.tools
        self._answer = conversation.answer
        self._template = engine.chat_template_for(conversation.tools is not None)
        self._tokenizer = engine.tokenizer
        self._thought_open = _opens_thought(conversation, prompt, self._tokenizer)
        known = self._tokenizer is not None and self._tokenizer.token_to_id(THINK) is not None
        self._thinks = self._thought_open or known or THINK in (self._template or "")

    @property
    def shown_special_ids(self) -> list[int]:
        """The marks that the answer is read by and that a decoder would leave out as special tokens."""
        marks = [THINK, END_THINK] if self._thinks else []
        if self._tools is not None:
            marks += MARKS
        found = (special_token_id(mark, self._tokenizer) for mark in marks)
        return [token_id for token_id in found if token_id is not None]

    def grammar(self) -> GrammarSpec | None:
        """That of the calls, if there must be some, or of the answer, which may also be calls; after any thoughts."""
        spec, tools = self._answer, self._tools
        if tools is not None and (tools.must_call or spec is not None):
            calls = tools.grammar(call_format(self._template), self._tokenizer)
            spec = calls if spec is None or tools.must_call else calls.or_else(spec)
        if spec is None or not self._thought_open:
            return spec
        return spec.after(thought_rules(self._tokenizer))

    def make_parser(self) -> MessageParser:
        """A parser for one choice."""
        reasoning = ReasoningParser(self._thought_open) if self._thinks else None
        tools = self._tools
        if tools is None:
            return MessageParser(reasoning, None)
        parser = ToolParser(tools.names, tools.schemas, live=tools.must_call, single=not tools.parallel)
        return MessageParser(reasoning, parser)


def _opens_thought(conversation: Conversation, prompt: Prompt, tokenizer: Tokenizer | None) -> bool:
    """Whether the prompt ends inside of thoughts."""
    if tokenizer is None:
        return False
    if conversation.continue_final_message:
        content = str(conversation.messages[-1].get("content") or "")
        return content.rfind(THINK) > content.rfind(END_THINK)
    end = tokenizer.decode(prompt.token_ids[-_NUM_LAST_TOKENS:], skip_special_tokens=False)
    return str(end).rstrip().endswith(THINK)


async def _render(request: Request, conversation: Conversation) -> list[int]:
    num_bytes = request.state.num_bytes
    return await run(lambda: _render_now(get_context(request), conversation, num_bytes), num_bytes)


def _render_now(context: ServerContext, conversation: Conversation, num_bytes: int) -> list[int]:
    tools = conversation.tools
    template = context.engine.engine.chat_template_for(tools is not None)
    messages = normalise_messages(conversation.messages, template)
    options: dict[str, Any] = {
        "add_generation_prompt": conversation.add_generation_prompt,
        "continue_final_message": conversation.continue_final_message,
        "variables": dict(conversation.template_variables),
    }
    if not knows_tools(template):
        messages = offer_in_text(messages, [] if tools is None else tools.tools)
    elif tools is not None:
        options["tools"] = tools.tools
    if num_bytes > context.max_characters:  # they may be escapes and names
        context.check_length(num_characters([messages, options]))
    return context.engine.engine.render_chat(messages, **options)
